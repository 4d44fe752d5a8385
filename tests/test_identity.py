"""``init="identity"``: the first training batch passes unchanged, within a derived bound, and no other state is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from multibn import BatchNormSpec, identity
from multibn.array import BatchNorm
from multibn.layer.types import Array

EPS = 1e-5


def draw(mean: float, std: float, dtype: str = "float32", shape: tuple[int, ...] = (8, 3, 5, 4), seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(mean, std, shape).astype(dtype)


INPUTS = [(m, s, "float32") for m, s in ((0, 1), (0.3, 2), (1000, 1), (-5, 1e-3), (1e4, 1e4), (1, 0))]
INPUTS += [(2, 3, "float16"), (2, 3, "float64"), (1e4, 1, "float64")]


def within_bound(y: Array, x: Array) -> None:
    assert y.dtype == x.dtype
    off = np.abs(y.astype(np.float64) - x.astype(np.float64))
    assert (off <= identity.bound(x, EPS)).all(), (off / identity.bound(x, EPS)).max()


@pytest.mark.parametrize(("mean", "std", "dtype"), INPUTS)
def test_numpy(mean: float, std: float, dtype: str) -> None:
    x = draw(mean, std, dtype)
    layer: Any = BatchNorm(3, 4, init="identity")
    if dtype == "float64":
        layer.gamma, layer.beta = np.ones(3), np.zeros(3)
        layer.moving_mean, layer.moving_var = np.zeros(3), np.ones(3)
    within_bound(layer.forward(x, training=True), x)
    gamma = layer.gamma.copy()
    axes = (0, 2, 3)
    values = x.astype(np.float64)
    np.testing.assert_allclose(gamma, np.sqrt(values.var(axis=axes) + EPS), rtol=2**-23)
    layer.forward(draw(7, 7, dtype), training=True)
    assert np.array_equal(layer.gamma, gamma)


def test_the_bound_is_no_wider_than_what_rounding_needs() -> None:
    """It would catch a gamma that is the variance, as the article has it, and a gamma and beta a few ulp off."""
    x = draw(0.3, 2)
    bound = identity.bound(x, EPS)
    layer = BatchNorm(3, 4)
    for change in ("variance", "gamma", "beta"):
        gamma, beta = identity.parameters(x, EPS, np.float32)
        layer.gamma, layer.beta = {
            "variance": (gamma**2, beta),
            "gamma": (gamma * np.float32(1 + 2**-21), beta),
            "beta": (gamma, beta + np.float32(2**-20)),
        }[change]
        assert (np.abs(layer.forward(x, training=True).astype(np.float64) - x) > bound).any(), change


@pytest.mark.filterwarnings("ignore::multibn.layer.PoisonedBatch")
def test_a_channel_that_is_not_finite_is_left_alone() -> None:
    x = draw(1, 2)
    x[0, 1, 0, 0] = np.inf
    layer = BatchNorm(3, 4, init="identity")
    y = layer.forward(x, training=True)
    assert layer.gamma is not None
    assert layer.beta is not None
    assert (layer.gamma[1], layer.beta[1]) == (1, 0)
    within_bound(y[:, ::2], x[:, ::2])


def test_inference_and_empty_batches_begin_nothing() -> None:
    layer = BatchNorm(3, 4, init="identity")
    layer.forward(draw(1, 2), training=False)
    layer.forward(draw(1, 2)[:0], training=True)
    assert layer.gamma is not None
    assert layer.gamma.tolist() == [1, 1, 1]
    x = draw(1, 2)
    within_bound(layer.forward(x, training=True), x)
    assert repr(layer) == "BatchNorm(3, 4, eps=1e-05, momentum=0.9, init='identity')"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": False}, "scale=False, center=True, normalize_with='batch'"),
        ({"center": False}, "scale=True, center=False, normalize_with='batch'"),
        ({"normalize_with": "moving"}, "scale=True, center=True, normalize_with='moving'"),
    ],
)
@pytest.mark.parametrize("home", ["numpy", "torch", "mxnet"])
def test_what_has_nothing_to_begin_with_is_refused(options: dict[str, Any], said: str, home: str) -> None:
    module = {"numpy": "multibn.array", "torch": "multibn_torch", "mxnet": "multibn_mxnet"}[home]
    layers = pytest.importorskip(module, reason=f"{home} is not installed")
    with pytest.raises(ValueError) as caught:
        layers.BatchNorm(3, 4, BatchNormSpec(**options), init="identity")
    assert str(caught.value) == (
        "init='identity' needs a gamma, a beta and normalize_with='batch', for it sets both from the batch that normalises, got "
        f"{said}. Use init='standard'."
    )
    with pytest.raises(ValueError) as caught:
        layers.BatchNorm(3, 4, init="ones")
    assert str(caught.value) == "init must be 'standard' or 'identity', got 'ones'."


# In PyTorch.


def torch_run(layer: Any, x: Array) -> Array:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    y: Array = layer(torch.from_numpy(x)).detach().numpy()
    return y


@pytest.mark.parametrize(("mean", "std", "dtype"), INPUTS)
def test_torch(mean: float, std: float, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import multibn_torch

    kind = torch.float64 if dtype == "float64" else torch.float32
    for layer in (
        multibn_torch.BatchNorm(3, 4, init="identity", dtype=kind),
        multibn_torch.BatchNorm2d(3, init="identity", dtype=kind),
    ):
        x = draw(mean, std, dtype)
        within_bound(torch_run(layer, x), x)


def test_torch_begins_once_and_keeps_what_was_loaded() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import copy

    import multibn_torch

    x, other = draw(1, 2), draw(5, 3, seed=1)
    layer: Any = multibn_torch.BatchNorm2d(3, init="identity", implementation="framework")
    assert repr(layer).endswith(", init='identity', implementation='framework', by=multibn)")
    fresh = copy.deepcopy(layer.state_dict())
    layer.eval()(torch.from_numpy(other))
    np.testing.assert_allclose(torch_run(layer.train(), x), x, atol=1e-5)
    gamma = layer.weight.detach().clone()
    assert list(layer.state_dict()) == list(torch.nn.BatchNorm2d(3).state_dict())
    for again in (layer, copy.deepcopy(layer), multibn_torch.BatchNorm2d(3, init="identity")):
        again.load_state_dict(copy.deepcopy(layer.state_dict()))
        torch_run(again, other)
        assert torch.equal(again.weight, gamma)
    layer.reset_running_stats()
    torch_run(layer, other)
    assert torch.equal(layer.weight, gamma)
    for restart in (lambda: layer.load_state_dict(fresh), layer.reset_parameters):
        restart()
        np.testing.assert_allclose(torch_run(layer, other), other, atol=1e-5)
    set_by_hand = multibn_torch.BatchNorm(3, 4, init="identity")
    torch.nn.init.zeros_(set_by_hand.weight)
    torch_run(set_by_hand, x)
    assert set_by_hand.weight.tolist() == [0, 0, 0]
    assert repr(set_by_hand) == "BatchNorm(3, 4, eps=1e-05, momentum=0.9, init='identity')"


def test_torch_learns_from_there() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import multibn_torch

    layer: Any = multibn_torch.BatchNorm(3, 4, init="identity")
    y = layer(torch.from_numpy(draw(1, 2)))
    y.square().sum().backward()
    assert layer.gamma.grad.abs().min() > 0
    with pytest.raises(ValueError, match="init='identity' needs a gamma"):
        multibn_torch.BatchNorm2d(3, affine=False, init="identity")


# In Gluon.


@pytest.mark.parametrize("way", ["imperative", "hybridized", "parent", "static parent"])
@pytest.mark.parametrize("implementation", ["kernel", "framework", "composed"])
def test_gluon_in_every_way_that_mxnet_runs_a_block(way: str, implementation: str) -> None:
    mx = pytest.importorskip("mxnet", reason="MXNet is not installed")
    import multibn_mxnet

    block = multibn_mxnet.BatchNorm(3, 4, init="identity", implementation=implementation)
    net = block
    if "parent" in way:
        net = mx.gluon.nn.HybridSequential()
        net.add(block)
    net.initialize()
    if way != "imperative":
        net.hybridize(static_alloc=way.startswith("static"))
    x, other = draw(1, 2), draw(5, 3, seed=1)
    net(mx.nd.array(other))
    for values in (x, other):
        with mx.autograd.record():
            y = net(mx.nd.array(values))
        y.backward(mx.nd.array(draw(0, 1, seed=2)))
        if values is x:
            its = y.asnumpy()
            within_bound(its, x) if implementation == "kernel" else np.testing.assert_allclose(its, x, atol=1e-5)
            gamma = block.gamma.data().asnumpy()
            np.testing.assert_allclose(gamma, identity.parameters(x, EPS, np.float32)[0], rtol=1e-5)
            assert np.abs(block.gamma.grad().asnumpy()).min() > 0
    assert np.array_equal(block.gamma.data().asnumpy(), gamma)
    assert not np.array_equal(y.asnumpy(), other)


@pytest.mark.parametrize(("mean", "std", "dtype"), INPUTS)
def test_gluon_types_and_axes(mean: float, std: float, dtype: str) -> None:
    mx = pytest.importorskip("mxnet", reason="MXNet is not installed")
    import multibn_mxnet

    x = draw(mean, std, dtype)
    block = multibn_mxnet.GluonBatchNorm(axis=-1, init="identity")
    block.initialize()
    block.cast(dtype)
    with mx.autograd.record():
        y = block(mx.nd.array(np.moveaxis(x, 1, -1), dtype=dtype))
    within_bound(np.moveaxis(y.asnumpy(), -1, 1), x)


def test_gluon_bfloat16() -> None:
    mx = pytest.importorskip("mxnet", reason="MXNet is not installed")
    import multibn_mxnet

    block = multibn_mxnet.BatchNorm(3, 4, init="identity")
    block.initialize()
    x = mx.nd.amp_cast(mx.nd.array(draw(1, 2)), dtype=np.dtype([("bfloat16", np.uint16)]))
    with mx.autograd.record():
        y = block(x)
    y, x = (mx.nd.amp_cast(a, dtype="float32").asnumpy() for a in (y, x))
    assert np.array_equal(y, x)


def test_gluon_keeps_what_was_loaded(tmp_path: Any) -> None:
    mx = pytest.importorskip("mxnet", reason="MXNet is not installed")
    import multibn_mxnet

    def made() -> Any:
        block = multibn_mxnet.BatchNorm(3, 4, init="identity")
        block.initialize()
        return block

    first, second, file = made(), made(), str(tmp_path / "a.params")
    with mx.autograd.record():
        first(mx.nd.array(draw(1, 2)))
    first.save_parameters(file)
    second.load_parameters(file)
    with mx.autograd.record():
        second(mx.nd.array(draw(5, 3)))
    assert np.array_equal(second.gamma.data().asnumpy(), first.gamma.data().asnumpy())
    assert repr(first) == "BatchNorm(3, 4, eps=1e-05, momentum=0.9, init='identity')"
    with pytest.raises(ValueError, match="init='identity' needs a gamma"):
        multibn_mxnet.GluonBatchNorm(scale=False, init="identity")


def test_torch_begins_with_the_values_that_count() -> None:
    torch, multibn_torch = pytest.importorskip("torch"), pytest.importorskip("multibn_torch")
    layer = multibn_torch.BatchNorm1d(3, init="identity")
    x, mask = torch.randn(4, 3, 5) * 3 + 2, torch.arange(5)[None] < torch.tensor([5, 3, 1, 4])[:, None]
    one = torch.zeros(4, 5, dtype=torch.bool)
    one[0, 0] = True
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(x, mask=one)
    assert layer.weight.tolist() == [1, 1, 1]
    y = layer(torch.where(mask[:, None], x, torch.nan), mask=mask)
    torch.testing.assert_close(y, torch.where(mask[:, None], x, 0.0))


def test_torch_does_not_begin_in_a_compiled_program() -> None:
    torch, multibn_torch = pytest.importorskip("torch"), pytest.importorskip("multibn_torch")
    layer = multibn_torch.BatchNorm1d(3, init="identity")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="Train one batch before"):
        compiled(torch.randn(4, 3))
    assert layer.weight.tolist() == [1, 1, 1]
    x = torch.randn(4, 3)
    layer(x)
    torch.testing.assert_close(compiled(x), x)
