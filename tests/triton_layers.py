"""The layers over the GPU kernel, in Triton's interpreter, against the layers over the CPU kernel, bit for bit.

Run by test_gpu_interpreted.py in a process of its own: TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

assert os.environ["TRITON_INTERPRET"] == "1"

from gpu_route import ROUTED
from triton_interpreted import bits

import multibn_torch as ours
from multibn_torch import triton_kernel
from multibn_torch.forward import eager, on_gpu
from multibn_torch.forward.formulas import Moving, Settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # the interpreter computes with NumPy
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(copyreg|torch).*"),  # torch 2.13, while it compiles
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::multibn.layer.nonfinite.PoisonedBatch"),  # of the CPU kernel, which counts
]


@pytest.fixture(autouse=True)
def _seed() -> Any:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def both(program: Callable[[Any], Any], layer: Any) -> None:
    """Run a program on a copy of a layer with each kernel; results and the layer's state must have the same bits."""
    ran = []
    for gpu in (False, True):
        mine = copy.deepcopy(layer)
        with pytest.MonkeyPatch.context() as patch:
            if gpu:
                for routed in ROUTED:
                    patch.setattr(*routed)
            torch.manual_seed(1)
            results = program(mine)
        ran.append([*results, *mine.buffers(), *(p.grad for p in mine.parameters())])
    for wanted, got in zip(*ran, strict=True):
        assert got.stride() == wanted.stride()
        assert torch.equal(bits(got), bits(wanted))


def steps(shape: Any, dtype: Any = torch.float32, layout: Callable[[Any], Any] = lambda x: x, **keywords: Any) -> Any:
    """Run two training steps and an inference."""

    def program(layer: Any) -> list[Any]:
        results = []
        for training in (True, True, False):
            layer.train(training)
            x = layout((torch.randn(shape) * 2 + 1).to(dtype)).detach().requires_grad_()
            y = layer(x, **keywords)
            y.backward(torch.randn(shape).to(dtype))
            results += [y.detach(), x.grad]
        with torch.inference_mode():
            results.append(layer(x, **keywords).clone())
        return results

    return program


TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_types_and_layouts(dtype: Any, layout: Any) -> None:
    layer = ours.BatchNorm2d(3, dtype=torch.float64 if dtype == torch.float64 else None)
    both(steps((4, 3, 5, 5), dtype, layout), layer)


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-12, "momentum": 1.0}], ids=str
)
def test_options(options: Any) -> None:
    both(steps((9, 3, 7)), ours.BatchNorm1d(3, **options))


def test_switches() -> None:
    layer = ours.BatchNorm1d(3)
    layer.use_moving_statistics()
    both(steps((9, 3)), layer)
    layer.freeze_statistics()
    both(steps((9, 3)), layer)


def test_a_mask() -> None:
    both(steps((9, 3, 7), mask=torch.rand(9, 7) > 0.4), ours.BatchNorm1d(3))


def test_an_empty_batch() -> None:
    both(steps((0, 3, 7)), ours.BatchNorm1d(3))


def test_nan_and_infinity() -> None:
    def poison(x: Any) -> Any:
        x[0, 0, 0], x[1, 2, 3] = torch.nan, torch.inf
        return x

    both(steps((4, 3, 5), layout=poison), ours.BatchNorm1d(3))


def test_statistics_that_are_slices() -> None:
    layer: Any = ours.BatchNorm1d(3)
    layer.running_mean, layer.running_var = torch.zeros(6)[::2], torch.ones(6)[::2]

    def program(mine: Any) -> list[Any]:
        mine.running_mean, mine.running_var = torch.zeros(6)[::2], torch.ones(6)[::2]  # a copy has none
        return steps((4, 3, 5))(mine)  # type: ignore[no-any-return]

    both(program, layer)


def test_a_fused_relu() -> None:
    network: Any = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    assert ours.swap(network, fuse_relu=True) == ["1"]
    both(steps((4, 3, 5, 5)), network[1])


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_torch_compile(options: Any) -> None:
    def program(layer: Any) -> Any:
        return steps((4, 3, 5, 5))(torch.compile(layer, fullgraph=True, backend="aot_eager"))

    both(program, ours.BatchNorm2d(3, **options))


def test_checkpointing_updates_once() -> None:
    def program(layer: Any) -> list[Any]:
        x = torch.randn(8, 3, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=False)
        y.square().sum().backward()
        assert layer.num_batches_tracked == 1
        return [y.detach(), x.grad]

    both(program, ours.BatchNorm1d(3))


@pytest.mark.parametrize(
    ("dtype", "layout", "affine", "rectify"),
    [(dtype, "contiguous", True, True) for dtype in TYPES]
    + [(torch.bfloat16, "channels-last", True, False), (torch.float32, "transposed", False, True)],
    ids=str,
)
def test_recompute(dtype: Any, layout: str, affine: bool, rectify: bool, monkeypatch: Any) -> None:
    """The gradient of a factor after the layer is the y that backward makes again, here against the y that the CPU keeps."""
    made: list[Any] = []
    run: Any = triton_kernel.run_normalise
    monkeypatch.setattr(triton_kernel, "run_normalise", lambda *given, **more: made.append(run(*given, **more)))
    layer: Any = ours.BatchNorm2d(3, affine=affine, dtype=torch.float64 if dtype == torch.float64 else None)
    layer.fuse_relu = rectify

    def program(mine: Any) -> list[Any]:
        x = LAYOUTS[layout]((torch.randn(4, 3, 5, 5) * 2 + 1).to(dtype)).detach().requires_grad_()
        factor = torch.ones_like(x, requires_grad=True)
        with ours.recompute() if eager.kernel_again is on_gpu.kernel_again else nullcontext():
            total = (mine(x) * factor).sum()
        total.backward(retain_graph=True)
        mine.running_mean.fill_(7.0)  # the statistics that normalised are used, not those of the layer
        total.backward()
        return [x.grad, factor.grad]

    both(program, layer)
    assert len(made) == 2


def _same(t: Any) -> Any:
    return t


def _negative(t: Any) -> Any:
    return torch._neg_view(t)


def _ones(layer: Any) -> Any:
    return torch.ones(layer.num_features)


@pytest.mark.parametrize(
    ("of_x", "of_dy", "of_mean"),
    [
        (_negative, _same, _ones),
        (_same, _negative, _ones),
        (_same, lambda t: torch._efficientzerotensor(t.shape), _ones),
        (_same, _same, lambda layer: _negative(_ones(layer))),
        (_same, _same, lambda layer: layer.weight.data),
    ],
    ids=["negative input", "negative gradient", "gradient without memory", "negative moving mean", "moving mean is gamma"],
)
def test_what_lies_in_memory_in_an_unusual_way(of_x: Any, of_dy: Any, of_mean: Any) -> None:
    def program(layer: Any) -> list[Any]:
        layer.running_mean = of_mean(layer)
        x = of_x(torch.randn(4, 3, 5)).requires_grad_()
        y = layer(x)
        y.backward(of_dy(torch.randn(4, 3, 5)))
        return [y.detach(), x.grad]

    both(program, ours.BatchNorm1d(3))


def _freed(t: Any) -> Any:
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize(
    ("statistics", "told"),
    [
        (
            lambda mean, var: (var, var),
            "running_mean and running_var must not share memory, since both are written to. Call .clone() on one.",
        ),
        (
            lambda mean, var: (torch.zeros(1).expand(3), var),
            "running_mean must have memory for each channel, since it is written to, got fewer values expanded to shape (3,). "
            "Call .clone() on it.",
        ),
        (
            lambda mean, var: (_freed(mean), var),
            "running_mean needs a storage of at least 12 bytes, got one of 0. Allocate the storage before the layer is called.",
        ),
    ],
    ids=["shared", "expanded", "without memory"],
)
@pytest.mark.parametrize("gpu", [False, True])
def test_what_cannot_be_updated_is_refused_as_on_a_cpu(statistics: Any, told: str, gpu: bool, monkeypatch: Any) -> None:
    for routed in ROUTED if gpu else ():
        monkeypatch.setattr(*routed)
    layer: Any = ours.BatchNorm1d(3)
    layer.running_mean, layer.running_var = statistics(layer.running_mean, layer.running_var)
    with pytest.raises(RuntimeError) as caught:
        layer(torch.randn(4, 3, 5))
    assert str(caught.value) == told
    assert int(layer.num_batches_tracked) == 0
    assert torch.equal(layer.running_var, torch.ones(3))


def test_a_gradient_of_another_shape_is_refused() -> None:
    statistics = torch.stack([torch.zeros(3), torch.ones(3)]).double()
    with pytest.raises(RuntimeError) as caught:
        on_gpu.kernel_backward(torch.randn(1, 3, 1), torch.randn(4, 3, 5), None, statistics, True)
    assert str(caught.value) == "backward needs a gradient of the output's shape (4, 3, 5), got (1, 3, 1)."


def test_a_missing_tensor_is_named_before_anything_is_changed() -> None:
    x, mean, var = torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3)
    missing: Any = None
    with pytest.raises(TypeError) as caught:
        triton_kernel.run_forward(
            x, missing, None, None, mean, var, torch.empty(2, 3, dtype=torch.float64), 1e-5, 0.9, True, True, True
        )
    assert str(caught.value) == "expected y to be a tensor, got NoneType. Give one."
    assert mean.abs().sum() == 0


def test_transforms() -> None:
    """Under transforms, and for higher derivatives, the formulas compute."""

    def program(layer: Any) -> list[Any]:
        x = torch.randn(8, 3, requires_grad=True)
        layer.update_statistics = False
        slope = torch.func.grad(lambda x: layer(x).square().sum())(x.detach())
        mapped = torch.func.vmap(layer)(torch.randn(2, 8, 3))
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        first.square().sum().backward()  # type: ignore[no-untyped-call]
        return [slope, mapped.detach(), x.grad]

    both(program, ours.BatchNorm1d(3))


@pytest.mark.parametrize("weight_of_old", [0.9, None])
def test_the_operators_are_what_they_say(weight_of_old: float | None, monkeypatch: Any) -> None:
    """Run PyTorch's check: schema, autograd, and shapes and layouts of the fake implementations."""
    for routed in ROUTED:
        monkeypatch.setattr(*routed)
    for x in (torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)):
        x.requires_grad_()
        gamma, beta = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
        moving = Moving(torch.zeros(3), torch.ones(3), torch.tensor(0))
        how = Settings(1e-5, weight_of_old, True, True, True)
        arguments = (x, None, gamma, beta, *moving, *how, False)
        torch.library.opcheck(torch.ops.multibn.forward.default, arguments)
        statistics = torch.ops.multibn.forward(*arguments)[1]
        given = (torch.randn_like(x), x.detach(), None, gamma.detach(), None, statistics, True, False)
        torch.library.opcheck(torch.ops.multibn.backward.default, given)
