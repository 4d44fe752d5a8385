"""Gradients of gradients in Gluon: ``implementation="composed"`` against differences of the reference's own gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")

import multibn_mxnet
from multibn import BatchNormSpec, reference
from multibn.layer import Array

SPECS = [
    BatchNormSpec(eps=1e-3),
    BatchNormSpec(momentum=None, moving_variance="unbiased"),
    BatchNormSpec(scale=False),
    BatchNormSpec(center=False),
    BatchNormSpec(normalize_with="moving"),
    BatchNormSpec(update_statistics=False),
]
SHAPES = [((5, 2), 1), ((2, 3, 2, 2), 1), ((3, 2, 2), -1), ((2, 3, 2), 0)]


@pytest.fixture(params=[False, True], ids=["nd", "np"])
def numpy_mode(request: Any) -> Iterator[bool]:
    if request.param:
        mx.npx.set_np()
    yield request.param
    mx.npx.reset_np()


def array(values: Array) -> Any:
    make = mx.np.array if mx.util.is_np_array() else mx.nd.array
    return make(values, dtype=values.dtype)


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
        """The first ones, by the reference."""
        at = {name: values.astype("d") for name, values in {**self.at, **at}.items()}
        mean, var = (each.astype("d") for each in self.moving)
        done = reference.forward(at["x"], at["gamma"], at["beta"], mean, var, spec, training, self.axis)
        its = reference.backward(self.head.astype("d") * (1 - np.tanh(done.y) ** 2), done.saved)
        return {name: each for name, each in (("dx", its.dx), ("dgamma", its.dgamma), ("dbeta", its.dbeta)) if each is not None}

    def second(self, spec: BatchNormSpec, training: bool, name: str) -> Array:
        """The gradient of their weighted sum, by differences."""

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
    """A block with the point's gamma and moving statistics."""
    channels = point.at["gamma"].size
    block = block or multibn_mxnet.GluonBatchNorm(
        axis=point.axis, epsilon=spec.eps, momentum=spec.momentum, scale=spec.scale, center=spec.center,
        use_global_stats=spec.normalize_with == "moving", in_channels=channels, implementation="composed",
    )  # fmt: skip
    block.initialize()
    block.cast(point.dtype)
    state = {
        "gamma": point.at["gamma"],
        "beta": point.at["beta"],
        "running_mean": point.moving[0],
        "running_var": point.moving[1],
    }
    for name, values in state.items():
        if hasattr(block, name):
            getattr(block, name).set_data(array(values))
    return block


def derive(block: Any, point: Point, training: bool) -> tuple[dict[str, Array], dict[str, Array]]:
    """The first and second gradients of a block."""
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
    assert set(first) == {"dx", *(["dgamma"] if spec.scale else []), *(["dbeta"] if spec.center else [])}
    for name, values in second.items():
        np.testing.assert_allclose(values, point.second(spec, training, name), rtol=1e-7, atol=1e-7)
