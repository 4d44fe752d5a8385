"""Gradients of gradients in Gluon: ``implementation="composed"`` against differences of the reference's own gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")

from gluon_arrays import array
from gluon_arrays import numpy_mode as numpy_mode

import multibn_mxnet
from multibn import BatchNormSpec, reference
from multibn.layer.types import Array

SPECS = [
    BatchNormSpec(eps=1e-3),
    BatchNormSpec(momentum=None, moving_variance="unbiased"),
    BatchNormSpec(scale=False),
    BatchNormSpec(center=False),
    BatchNormSpec(normalize_with="moving"),
    BatchNormSpec(update_statistics=False),
]
SHAPES = [((5, 2), 1), ((2, 3, 2, 2), 1), ((3, 2, 2), -1), ((2, 3, 2), 0)]


def random(*shape: int, seed: int = 0, dtype: str = "float64") -> Array:
    return np.random.RandomState(seed).normal(0.5, 1, shape).astype(dtype)


class Point:
    """Where and along what derivatives of tanh(y) are taken: x, gamma and beta, the gradient of tanh(y), and the weights of dx,
    dgamma and dbeta in a sum of them.
    """

    def __init__(self, shape: tuple[int, ...], axis: int = 1, dtype: str = "float64") -> None:
        state, channels = "float64" if dtype == "float64" else "float32", shape[axis]
        self.axis, self.dtype = axis, dtype
        self.at = {"x": random(*shape, dtype=dtype)}
        self.at |= {name: random(channels, seed=1 + i, dtype=state) for i, name in enumerate(("gamma", "beta"))}
        self.head = random(*shape, seed=8, dtype=dtype)
        self.weights = {"dx": random(*shape, seed=3, dtype=dtype)}
        self.weights |= {f"d{name}": random(channels, seed=4 + i, dtype=state) for i, name in enumerate(("gamma", "beta"))}
        self.moving = random(channels, seed=6, dtype=state), random(channels, seed=7, dtype=state) ** 2 + np.asarray(0.5, state)

    def gradients(self, spec: BatchNormSpec, training: bool, **at: Array) -> dict[str, Array]:
        """Return the first gradients of the reference."""
        at = {name: values.astype("d") for name, values in {**self.at, **at}.items()}
        mean, var = (each.astype("d") for each in self.moving)
        done = reference.forward(at["x"], at["gamma"], at["beta"], mean, var, spec, training, self.axis)
        its = reference.backward(self.head.astype("d") * (1 - np.tanh(done.y) ** 2), done.saved)
        return {name: each for name, each in (("dx", its.dx), ("dgamma", its.dgamma), ("dbeta", its.dbeta)) if each is not None}

    def second(self, spec: BatchNormSpec, training: bool, name: str) -> Array:
        """Return the gradient of their weighted sum, by finite differences."""

        def total(values: Array) -> float:
            its = self.gradients(spec, training, **{name: values})
            return float(sum((its[each] * self.weights[each].astype("d")).sum() for each in its))

        start, step = self.at[name].astype("d"), 1e-5
        found = np.zeros_like(start)
        for place in np.ndindex(*start.shape):
            change = np.zeros_like(start)
            change[place] = step
            found[place] = (total(start + change) - total(start - change)) / (2 * step)
        return found


def block_at(point: Point, spec: BatchNormSpec, block: Any = None) -> Any:
    """Make a block with the point's gamma, beta and moving statistics."""
    channels = point.at["gamma"].size
    block = block or multibn_mxnet.GluonBatchNorm(point.axis, epsilon=spec.eps, in_channels=channels, implementation="composed")
    block.initialize()
    block.cast(point.dtype)
    for name, values in (*point.at.items(), *zip(("running_mean", "running_var"), point.moving, strict=True)):
        if hasattr(block, name):
            getattr(block, name).set_data(array(values))
    return block


def derive(block: Any, point: Point, training: bool) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the first and second gradients of a block."""
    x, tanh = array(point.at["x"]), mx.np.tanh if mx.util.is_np_array() else mx.nd.tanh
    x.attach_grad()
    names = [name for name in ("gamma", "beta") if hasattr(block, name) and getattr(block, name).grad_req != "null"]
    with mx.autograd.record(train_mode=training):
        variables = [x, *(getattr(block, name).data() for name in names)]
        its = mx.autograd.grad(tanh(block(x)), variables, head_grads=array(point.head), create_graph=True)
    first = dict(zip(("dx", *(f"d{name}" for name in names)), its, strict=True))
    mx.autograd.backward(its, head_grads=[array(point.weights[name]) for name in first])
    second = {"x": x.grad} | {name: getattr(block, name).grad() for name in names}
    return tuple({name: each.asnumpy() for name, each in found.items()} for found in (first, second))  # type: ignore[return-value]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_second_gradients_on_every_axis(shape: tuple[int, ...], axis: int, training: bool, numpy_mode: bool) -> None:
    point, spec = Point(shape, axis), BatchNormSpec(eps=1e-3)
    first, second = derive(block_at(point, spec), point, training)
    for name, values in point.gradients(spec, training).items():
        np.testing.assert_allclose(first[name], values, rtol=1e-10, atol=1e-10)
    for name, values in second.items():
        np.testing.assert_allclose(values, point.second(spec, training, name), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_second_gradients_of_every_spec(spec: BatchNormSpec, training: bool, numpy_mode: bool) -> None:
    point = Point((4, 2, 3))
    block = block_at(point, spec, multibn_mxnet.BatchNorm(2, 3, spec, implementation="composed"))
    first, second = derive(block, point, training)
    x, gamma, beta = point.at.values()
    done = reference.forward(x, gamma, beta, *point.moving, spec, training)
    np.testing.assert_allclose(block.moving_mean.data().asnumpy(), done.moving_mean, rtol=1e-14)  # one forward, one update
    np.testing.assert_allclose(block.moving_var.data().asnumpy(), done.moving_var, rtol=1e-14)
    assert set(first) == {"dx", *(["dgamma"] if spec.scale else []), *(["dbeta"] if spec.center else [])}
    for name, values in second.items():
        np.testing.assert_allclose(values, point.second(spec, training, name), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("dtype", "off"), [("float16", 4e-3), ("float32", 1e-5)])
def test_second_gradients_of_narrow_types(dtype: str, off: float, numpy_mode: bool) -> None:
    point, spec = Point((6, 3, 2), dtype=dtype), BatchNormSpec(eps=1e-3)
    block = block_at(point, spec)
    first, second = derive(block, point, True)
    assert {name: values.dtype.name for name, values in second.items()} == {"x": dtype, "gamma": "float32", "beta": "float32"}
    assert block.running_var.data().dtype == np.float32
    right = point.gradients(spec, True)
    for name, values in [*first.items(), *second.items()]:
        its = right[name] if name in right else point.second(spec, True, name)
        np.testing.assert_allclose(values, its, rtol=0, atol=off * np.abs(its).max())


@pytest.mark.parametrize("power", [-40, 45])
def test_the_scale_of_x_does_not_matter(power: int) -> None:
    point, scale = Point((6, 3, 2), dtype="float32"), 2.0**power
    first, second = derive(block_at(point, BatchNormSpec(eps=1e-3)), point, True)
    point.at["x"] = point.at["x"] * np.float32(scale)
    point.weights["dx"] = point.weights["dx"] * np.float32(scale)
    its_first, its_second = derive(block_at(point, BatchNormSpec(eps=1e-3 * scale**2)), point, True)
    for its, right in ((its_first, first), (its_second, second)):
        for name, values in its.items():
            np.testing.assert_array_equal(values * np.float32(scale if name in ("x", "dx") else 1), right[name])


class Dense(mx.gluon.HybridBlock):  # type: ignore[misc,name-defined]
    """A matrix product that MXNet can differentiate twice: of (1, N, inputs)."""

    def __init__(self, units: int, inputs: int) -> None:
        super().__init__()
        with self.name_scope():
            self.weight = self.params.get("weight", shape=(1, inputs, units))

    def hybrid_forward(self, F: Any, x: Any, weight: Any) -> Any:
        return F.batch_dot(x, weight)


def penalty(net: Any, x: Any, create_graph: bool) -> Any:
    """(1, N, inputs): the squares of the gradient of the net's outputs."""
    gradient = mx.autograd.grad(net(x), [x], create_graph=create_graph, retain_graph=True)[0]
    return mx.nd.square(gradient)


def test_a_net_learns_by_a_gradient_penalty() -> None:
    nn, x = mx.gluon.nn, array(random(1, 8, 3))
    net = nn.HybridSequential()
    net.add(Dense(4, 3), nn.BatchNorm(axis=-1, momentum=0.5), nn.HybridLambda("tanh"), Dense(1, 4))
    net.initialize(mx.init.Uniform(0.7))
    net.cast("float64")
    multibn_mxnet.swap(net, implementation="composed")
    net(x)
    x.attach_grad()
    parameters = [net[0].weight, net[1].gamma, net[1].beta, net[3].weight]
    start = [parameter.data().asnumpy() for parameter in parameters]

    def total(values: list[Array]) -> float:
        for parameter, its in zip(parameters, values, strict=True):
            parameter.set_data(array(its))
        with mx.autograd.record():
            return float(penalty(net, x, False).sum().asscalar())

    with mx.autograd.record():
        penalty(net, x, True).backward()
    gradients = [parameter.grad().asnumpy() for parameter in parameters]
    mean = net[0](x).asnumpy().mean(axis=(0, 1))
    np.testing.assert_allclose(net[1].running_mean.data().asnumpy(), 0.5 * mean, rtol=1e-12)  # one step, one update
    multibn_mxnet.swap(net, implementation="kernel")  # the first gradients are its own
    before = total(start)
    for which, its in enumerate(gradients):
        for place in np.ndindex(*its.shape):
            around = []
            for step in (1e-6, -1e-6):
                values = [each.copy() for each in start]
                values[which][place] += step
                around.append(total(values))
            assert its[place] == pytest.approx((around[0] - around[1]) / 2e-6, rel=1e-5, abs=1e-7)
    total(start)
    mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 1e-3}).step(1)
    assert total([parameter.data().asnumpy() for parameter in parameters]) < before


@pytest.mark.parametrize("request_", ["write", "add", "null"])
def test_requests_of_second_gradients(request_: str) -> None:
    point, spec = Point((4, 2, 3)), BatchNormSpec(eps=1e-3)
    block = block_at(point, spec)
    block.gamma.grad_req = request_
    x = array(point.at["x"])
    for _ in range(2):
        x.attach_grad()
        with mx.autograd.record():
            y = mx.nd.tanh(block(x))
            dx = mx.autograd.grad(y, [x], head_grads=array(point.head), create_graph=True)[0]
        dx.backward(array(point.weights["dx"]))
    for name in point.weights:
        point.weights[name] = point.weights[name] * (name == "dx")
    right = point.second(spec, True, "gamma")
    if request_ != "null":
        its = block.gamma.grad().asnumpy()
        np.testing.assert_allclose(its, right * (2 if request_ == "add" else 1), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(x.grad.asnumpy(), point.second(spec, True, "x"), rtol=1e-7, atol=1e-7)


def test_it_is_the_only_way_and_hybridized_nets_have_none() -> None:
    point, spec = Point((4, 2, 3)), BatchNormSpec(eps=1e-3)
    _, right = derive(block_at(point, spec), point, True)

    def last_line(block: Any) -> str:
        with pytest.raises(mx.base.MXNetError) as error:
            derive(block, point, True)
        return str(error.value).splitlines()[-1]

    for implementation, name in (("kernel", "_backward_CustomFunction"), ("framework", "_backward_Custom")):
        other = multibn_mxnet.BatchNorm(2, 3, spec, implementation=implementation)
        assert last_line(block_at(point, spec, other)) == (
            f"MXNetError: Operator {name} is non-differentiable because it didn't register FGradient attribute."
        )
    net = mx.gluon.nn.HybridSequential()
    net.add(block_at(point, spec))
    net.hybridize()
    assert last_line(net) == (
        "MXNetError: Check failed: !Imperative: :Get()->is_recording(): CachedOp does not support higher order gradients. If you "
        "want to do backward with create_graph=True please do not use hybridize."
    )
    block = block_at(point, spec)
    block.hybridize()  # alone, as in a parent that is no HybridBlock: it has nothing to gain
    _, second = derive(block, point, True)
    for name, values in right.items():
        np.testing.assert_array_equal(second[name], values)


def test_a_hybridized_parent_and_an_exported_model_compute_by_the_kernel(tmp_path: Path) -> None:
    x, found = array(random(4, 2, 3, dtype="float32")), []
    for implementation in ("auto", "composed"):
        net = mx.gluon.nn.HybridSequential(prefix="net_")
        with net.name_scope():
            net.add(multibn_mxnet.GluonBatchNorm(in_channels=2, implementation=implementation))
        net.initialize()
        net.hybridize()
        with mx.autograd.record():
            net(x)
        found.append(net(x).asnumpy())
    np.testing.assert_array_equal(*found)
    block = multibn_mxnet.BatchNorm(2, 3, implementation="composed")
    block.initialize()
    block.hybridize()
    with mx.autograd.record():
        block(x)
    block.export(str(tmp_path / "model"))
    with pytest.warns(UserWarning, match="Cannot decide type for the following arguments"):
        loaded = mx.gluon.SymbolBlock.imports(str(tmp_path / "model-symbol.json"), ["data"], str(tmp_path / "model-0000.params"))
    np.testing.assert_allclose(loaded(x).asnumpy(), block(x).asnumpy(), rtol=1e-5, atol=1e-6)


def test_swap_sets_it_for_all_and_keeps_it() -> None:
    nn = mx.gluon.nn
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.BatchNorm(), nn.BatchNormReLU(), multibn_mxnet.BatchNorm(3, 2))

    def implementations() -> list[str]:
        return [block.layer.implementation for block in net]

    with pytest.raises(ValueError, match=r"^implementation must be 'auto', 'kernel', 'framework', 'composed', got 'twice'\.$"):
        multibn_mxnet.swap(net, implementation="twice")
    assert type(net[0]) is nn.BatchNorm
    assert multibn_mxnet.swap(net) == ["net_batchnorm0", "net_batchnormrelu0"]
    assert implementations() == ["auto"] * 3
    assert multibn_mxnet.swap(net, implementation="composed") == []
    assert implementations() == ["composed"] * 3
    assert multibn_mxnet.swap(net) == []
    assert implementations() == ["composed"] * 3
    net.initialize()
    x, found = array(random(5, 3, dtype="float32")), []
    for implementation in ("composed", "kernel"):
        multibn_mxnet.swap(net, implementation=implementation)
        with mx.autograd.train_mode():
            found.append(net(x).asnumpy())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_between_convolutions_it_is_the_kernel_within_rounding() -> None:
    nn, found = mx.gluon.nn, []
    for implementation in ("kernel", "composed"):
        mx.random.seed(1)
        net = nn.HybridSequential()
        net.add(nn.Conv2D(16, 3, in_channels=16), nn.BatchNormReLU(in_channels=16), nn.Conv2D(16, 3, in_channels=16))
        net.initialize(mx.init.Xavier())
        multibn_mxnet.swap(net, implementation)
        x = array(random(4, 16, 12, 12, dtype="float32"))
        x.attach_grad()
        with mx.autograd.record():
            y = net(x)
        y.backward()
        found.append([each.asnumpy() for each in (y, x.grad, net[0].weight.grad(), net[1].running_var.data())])
    for kernel, its in zip(*found, strict=True):
        np.testing.assert_allclose(its, kernel, rtol=0, atol=1e-5 * np.abs(kernel).max())


@pytest.mark.filterwarnings("ignore::multibn.layer.PoisonedBatch")
def test_a_variance_that_is_too_large_is_poison() -> None:
    x = random(6, 2, dtype="float32")
    x[:, 1] *= np.float32(1e25)
    block = multibn_mxnet.BatchNorm(2, 2, implementation="composed")
    block.initialize()
    with mx.autograd.record():
        y = block(array(x)).asnumpy()
    assert np.isnan(y).all(axis=0).tolist() == [False, True]
    assert block.running_var.data().asnumpy()[1] == 1
    block.running_var.set_data(mx.nd.array([1, np.inf]))
    assert np.isnan(block(array(x)).asnumpy()).all(axis=0).tolist() == [False, True]


def test_more_axes_than_mxnet_transposes() -> None:
    block = multibn_mxnet.GluonBatchNorm(in_channels=2, implementation="composed")
    block.initialize()
    assert block(mx.nd.ones((1, 2, 1, 1, 1, 2))).shape == (1, 2, 1, 1, 1, 2)
    message = (
        "implementation='composed' takes input of rank 2 to 6, got rank 7, shape (1, 2, 1, 1, 1, 1, 2): MXNet transposes no more "
        "axes. Reshape the input, or use implementation='auto'."
    )
    with pytest.raises(mx.base.MXNetError, match=f"^{re.escape(message)}$"):
        block(mx.nd.ones((1, 2, 1, 1, 1, 1, 2)))


def test_mxnets_dense_is_silently_wrong_as_the_readme_says() -> None:
    weight, x = random(2, 3), array(random(4, 3))

    def second(dense: Any) -> Array:
        x.attach_grad()
        with mx.autograd.record():
            dx = mx.autograd.grad(mx.nd.tanh(dense(x)), [x], create_graph=True)[0]
        dx.backward()
        found: Array = x.grad.asnumpy()
        return found

    y = x.asnumpy() @ weight.T
    slope = -2 * np.tanh(y) * (1 - np.tanh(y) ** 2)
    right = (slope * weight.sum(axis=1)) @ weight
    its = second(lambda x: mx.nd.FullyConnected(x, array(weight), no_bias=True, num_hidden=2))
    assert not np.allclose(its, right)
    x = array(random(1, 4, 3))
    its = second(lambda x: mx.nd.batch_dot(x, array(weight.T[None].copy())))[0]
    np.testing.assert_allclose(its, right, rtol=0, atol=1e-14)


def test_a_mean_far_from_zero_is_right_to_an_ulp() -> None:
    x = np.float32(1000) + random(100_000, 2, dtype="float32")
    block = multibn_mxnet.BatchNorm(2, 2, BatchNormSpec(momentum=0.0), implementation="composed")
    block.initialize()
    with mx.autograd.train_mode():
        block(array(x))
    np.testing.assert_allclose(block.moving_mean.data().asnumpy(), x.astype("d").mean(axis=0), rtol=0, atol=2.0**-14)
