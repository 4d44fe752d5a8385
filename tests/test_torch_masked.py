"""BatchNorm of masked batches: exact results at valid positions, independent of the padding."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import multibn_torch as ours
from multibn import BatchNormSpec
from multibn.layer.types import Array
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.judging.judge import judge_maker

IMPLEMENTATIONS: list[Any] = ["kernel", "framework"]


class Padded:
    """Subject that scatters each input of the suite among garbage padding, and returns the results at the valid positions."""

    def __init__(self, num_features: int, spec: BatchNormSpec) -> None:
        self.subject = ours.BACKEND.make(num_features, spec, "cpu", "kernel")
        self.layer: Any = self.subject._layer  # type: ignore[attr-defined]

    def load(self, *arrays: Any) -> None:
        self.subject.load(*arrays)

    def forward(self, x: Array, training: bool) -> Array:
        self.shape = x.shape
        values = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])  # (m, C)
        count = len(values)
        places = np.random.default_rng(count).permutation(3 * math.ceil((count + 1) / 2))[:count]
        mask = np.zeros((3, math.ceil((count + 1) / 2)), bool)
        mask.reshape(-1)[places] = True
        self.mask = torch.from_numpy(mask)
        self.layer.ranks = (3,)
        self.layer.train(training)
        self.layer.zero_grad()
        self.x = self._padded(values, 1e30)
        if self.x.is_floating_point():
            self.x.requires_grad_()
        self.y = self.layer(self.x, mask=self.mask)
        return self._counting(self.y)

    def backward(self, dy: Array) -> Any:
        self.y.backward(self._padded(np.moveaxis(dy, 1, -1).reshape(-1, dy.shape[1]), float("nan")))
        gradients = (None if p is None or p.grad is None else p.grad.numpy().copy() for p in (self.layer.weight, self.layer.bias))
        return self._counting(self.x.grad), *gradients

    def moving(self) -> Any:
        return self.subject.moving()

    def _padded(self, values: Array, garbage: float) -> Any:
        whole = np.full((*self.mask.shape, values.shape[1]), garbage if values.dtype.kind == "f" else 0).astype(values.dtype)
        whole[self.mask.numpy()] = values
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(whole, -1, 1)))

    def _counting(self, t: Any) -> Array:
        t = t.detach().movedim(1, -1)
        assert not t[~self.mask].any()
        n, c, *space = self.shape
        return np.moveaxis(t[self.mask].numpy().reshape(n, *space, c), -1, 1)


def judged() -> Iterator[Any]:
    """Yield all cases except those on the bits of a given shape, which packing changes, and those on invalid ranks."""
    for case in CASES.values():
        ranks = {len(step.values.shape) for step in case.steps if step.values is not None}
        if case.against == "oracle" and min(ranks, default=2) >= 2:
            yield pytest.param(case, id=case.id)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # 1e30 is inf in float16: garbage too
@pytest.mark.filterwarnings("ignore::multibn.layer.PoisonedBatch")
@pytest.mark.parametrize("case", list(judged()))
def test_values_among_padding_are_judged_like_all_others(case: Any) -> None:
    judgement = judge_maker(Padded, case, "torch/masked", "exact")
    assert judgement.status in ("pass", "skip"), judgement.message


def example() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    return torch.randn(4, 3, 7), torch.arange(7) < torch.tensor([[7], [2], [5], [1]]), torch.randn(4, 3, 7)


def step(layer: Any, x: Any, dy: Any, **keywords: Any) -> list[Any]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x, **keywords)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_the_bits_are_those_of_the_packed_values(training: bool, implementation: Any) -> None:
    x, mask, dy = example()
    layer: Any = ours.BatchNorm1d(3, implementation=implementation)
    for _ in range(2):
        packed = copy.deepcopy(layer)
        y, dx, *state = step(layer.train(training), x, dy, mask=mask)
        wanted = step(packed.train(training), x.movedim(1, -1)[mask], dy.movedim(1, -1)[mask])
        if training:
            for got, right in zip((y.movedim(1, -1)[mask], dx.movedim(1, -1)[mask], *state), wanted, strict=True):
                assert torch.equal(got, right)
        else:  # y is elementwise; sums of gradients run over all positions, in another order
            for got, right in zip((y.movedim(1, -1)[mask], dx.movedim(1, -1)[mask], *state), wanted, strict=True):
                torch.testing.assert_close(got, right)
        assert y.is_contiguous()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e38])
def test_padding_counts_for_nothing(garbage: float, training: bool, implementation: Any) -> None:
    x, mask, dy = example()
    layers: Any = [ours.BatchNorm1d(3, implementation=implementation).train(training) for _ in range(2)]
    dirty, dirty_dy = (torch.where(mask[:, None], t, torch.tensor(garbage)) for t in (x, dy))
    clean = step(layers[0], x, dy, mask=mask)
    for got, wanted in zip(step(layers[1], dirty, dirty_dy, mask=mask), clean, strict=True):
        assert torch.equal(got, wanted)
    for t in clean[:2]:
        assert not t.movedim(1, -1)[~mask].any()
        assert t.movedim(1, -1)[mask].all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_true_is_no_mask(implementation: Any) -> None:
    x, mask, dy = example()
    layers: Any = [ours.BatchNorm1d(3, implementation=implementation) for _ in range(2)]
    masked, plain = step(layers[0], x, dy, mask=torch.ones_like(mask)), step(layers[1], x, dy)
    for got, wanted in zip(masked, plain, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_all_false_is_an_empty_batch(momentum: Any, implementation: Any) -> None:
    x, mask, dy = example()
    layer: Any = ours.BatchNorm1d(3, momentum=momentum, implementation=implementation)
    before = copy.deepcopy(layer.state_dict())
    for training in (True, False):
        y, dx, *gradients = step(layer.train(training), x, dy, mask=torch.zeros_like(mask))[:4]
        assert y.shape == dx.shape == x.shape
        for t in (y, dx, *gradients):
            assert not t.any()
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


KIND = "expected a mask of type torch.bool, True at valid positions, got {}. Convert it: mask != 0."
ONE_VALUE = (
    "Expected more than 1 value per channel when training, got a mask that is True once (BN-12). One value is its own mean, "
    "so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference."
)
SHAPE = (
    "expected a mask of shape (4, 7), that of the input without its channel axis, got {}. The mask applies to all channels of a "
    "position: remove its channel axis, or expand the other axes."
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.arange(28).view(4, 7) == 3, ValueError, ONE_VALUE),
        (torch.ones(4, 1, 7, dtype=torch.bool), ValueError, SHAPE.format("(4, 1, 7)")),
        (torch.ones(4, 3, 7, dtype=torch.bool), ValueError, SHAPE.format("(4, 3, 7)")),
        (torch.ones(7, dtype=torch.bool), ValueError, SHAPE.format("(7,)")),
        (
            torch.ones(4, 7),
            TypeError,
            KIND.format("one of type torch.float32"),
        ),
        (
            [7, 2, 5, 1],
            TypeError,
            KIND.format("list"),
        ),
        (
            torch.ones(4, 7, dtype=torch.bool, device="meta"),
            RuntimeError,
            "expected a mask on cpu, where the input is, got one on meta. Move it: mask.to(x.device).",
        ),
    ],
)
def test_wrong_masks_are_refused_and_change_nothing(mask: Any, error: Any, message: Any, implementation: Any) -> None:
    layer: Any = ours.BatchNorm1d(3, implementation=implementation)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error) as caught:
        layer(example()[0], mask=mask)
    assert str(caught.value) == message
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_one_value_that_counts_is_enough_for_inference() -> None:
    x, mask, _ = example()
    layer = ours.BatchNorm1d(3).eval()
    single = torch.zeros_like(mask)
    single[2, 4] = True
    torch.testing.assert_close(layer(x, mask=single), torch.where(single[:, None], layer(x), torch.zeros(())))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_derivatives_of_a_masked_layer(implementation: Any) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for training in (True, False):
        layer: Any = ours.BatchNorm1d(2, implementation=implementation).double().train(training)
        layer.update_statistics = False
        x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

        def function(x: Any, layer: Any = layer) -> Any:
            return layer(x, mask=mask)

        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_vmap_takes_one_mask_for_all_in_training() -> None:
    x, mask, _ = example()
    layer: Any = ours.BatchNorm1d(3)
    layer.update_statistics = False
    both, masks = torch.stack([x, 2 * x]), torch.stack([mask, ~mask])
    torch.testing.assert_close(
        torch.vmap(lambda x: layer(x, mask=mask))(both), torch.stack([layer(each, mask=mask) for each in both])
    )
    with pytest.raises(RuntimeError) as caught:
        torch.vmap(lambda x, mask: layer(x, mask=mask))(both, masks)
    assert str(caught.value) == (
        "expected one mask for all that vmap maps over, got one for each: how many values count would differ among them. "
        "Call the layer for each in turn, or use inference."
    )
    layer.eval()
    each = torch.stack([layer(x, mask=mask) for x, mask in zip(both, masks, strict=True)])
    torch.testing.assert_close(torch.vmap(lambda x, mask: layer(x, mask=mask))(both, masks), each)
