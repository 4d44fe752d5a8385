"""Wrong and unusual arguments of the Gluon layers: each argument, times each kind of wrongness, times each way to run a layer.

A cell gives what the layer returns in a forward and a backward, or an error. ``test_mxnet_cells.py`` compares ours with MXNet's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from processes import main

import multibn_mxnet
from multibn import BatchNormSpec
from multibn_mxnet import gate

C = 16
SHAPE = (8, C, 4, 4)
PARAMETERS = ("gamma", "beta", "running_mean", "running_var")


def random(*shape: int, seed: int = 0) -> Any:
    return mx.nd.array(np.random.RandomState(seed).normal(1, 2, shape), dtype="float32")


class StateChanged(Exception):
    """An error that left the state changed."""


class Run:
    """One forward and backward of a layer, with the objects that a cell may change before and between them."""

    def __init__(self, kind: str, way: str) -> None:
        self.layer = LAYERS[kind]()
        self.layer.initialize()
        self.net = gluon.nn.HybridSequential() if way == "in a graph" else self.layer
        if way == "in a graph":
            if kind == "whitening":
                self.net.add(convolution(), self.layer, convolution())
            else:
                self.net.add(gluon.nn.HybridLambda(lambda F, x: x * 1), self.layer)
            self.net.hybridize()
        self.layer(random(*SHAPE, seed=5)).wait_to_read()  # parameters are there
        self.x, self.dy, self.grad = random(*SHAPE), random(*SHAPE, seed=1), None
        self.x, self.dy = (self.x * 8).round() / 8, self.dy.round()  # so that casts lose nothing
        if hasattr(self.layer, "gamma"):
            self.layer.gamma.set_data(random(C, seed=2))

    def state(self) -> list[Any]:
        return [values(p._data[0]) for p in self.layer.collect_params().values() if isinstance(p._data, list)]

    def replace(self, name: str, array: Any) -> None:
        """Replace the array of a parameter."""
        getattr(self.layer, name)._data[0] = array

    def go(self, before: Callable[[Run], None], between: Callable[[Run], None]) -> dict[str, Any]:
        before(self)
        mx.nd.waitall()
        old = self.state()
        try:
            if self.grad is not None:
                autograd.mark_variables([self.x], [self.grad])
            elif isinstance(self.x, mx.nd.NDArray):
                self.x.attach_grad()
            with autograd.record():
                y = self.net(self.x)
            mx.nd.waitall()
            found = {"y": values(y)}
        except Exception:
            if not same(self.state(), old):
                raise StateChanged from None
            raise
        between(self)
        mx.nd.waitall()
        old = self.state()
        try:
            y.backward(self.dy)
            mx.nd.waitall()
        except Exception:
            if not same(self.state(), old):
                raise StateChanged from None
            raise
        found["dx"] = values(self.x.grad)
        for name in PARAMETERS:
            parameter = getattr(self.layer, name, None)
            if parameter is not None:
                found[name] = values(parameter._data[0])
                if parameter.grad_req != "null":
                    found["d" + name] = values(parameter._grad[0])
        return found


def values(array: Any) -> Any:
    if isinstance(array, mx.nd.NDArray):
        array = array.asnumpy() if array.handle and array.stype != "undefined" else None
    return None if array is None else np.asarray(array).astype("d").tolist()


def same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)


LAYERS: dict[str, Callable[[], Any]] = {
    "own": lambda: gluon.nn.BatchNorm(in_channels=C),
    "ours": lambda: multibn_mxnet.GluonBatchNorm(in_channels=C),
    "counter": lambda: multibn_mxnet.BatchNorm(C, 4, BatchNormSpec(momentum=None)),
    "whitening": lambda: multibn_mxnet.Whitening(C, 4, groups=4),
}
WAYS = ("called", "in a graph")


def nothing(_: Run) -> None:
    pass


def empty_handle() -> Any:
    from mxnet.ndarray.ndarray import _new_empty_handle

    return mx.nd.NDArray(_new_empty_handle())


def part(array: Any) -> Any:
    """Return the same values as a slice of a larger array."""
    larger = mx.nd.zeros((array.shape[0] + 2, *array.shape[1:]), dtype=array.dtype)
    larger[1:-1] = array
    return larger[1:-1]


IDENTITY = np.eye(C, dtype="f").reshape(C, C, 1, 1)


def convolved(like: Any) -> Any:
    """Return an array in oneDNN's internal layout."""
    return mx.nd.Convolution(like, mx.nd.array(IDENTITY), num_filter=C, kernel=(1, 1), no_bias=True)


def convolution() -> Any:
    """Make a convolution that returns its input, in oneDNN's layout."""
    layer = gluon.nn.Conv2D(C, 1, use_bias=False, in_channels=C)
    layer.initialize(mx.init.Constant(mx.nd.array(IDENTITY)))
    return layer


ARRAYS: dict[str, Callable[[Any], Any]] = {
    "None": lambda a: None,
    "numpy": lambda a: a.asnumpy(),
    "list": lambda a: a.asnumpy().tolist(),
    "a number": lambda a: 1.0,
    "float64": lambda a: a.astype("float64"),
    "float16": lambda a: a.astype("float16"),
    "int32": lambda a: a.astype("int32"),
    "one value": lambda a: mx.nd.ones((1,)),
    "fewer": lambda a: a[: a.shape[0] // 2],
    "more": lambda a: mx.nd.concat(a, a, dim=0),
    "flat": lambda a: a.reshape((-1,)),
    "an axis more": lambda a: a.expand_dims(0),
    "row_sparse": lambda a: a.tostype("row_sparse"),
    "another context": lambda a: a.as_in_context(mx.cpu(1)),
    "no memory": lambda a: empty_handle(),
    "a part": part,
    "the other interface": lambda a: a.as_np_ndarray(),
}
"""Kinds of wrongness of any array, made of the right one."""

IMAGES: dict[str, Callable[[Any], Any]] = {
    "rank 3": lambda a: a[0],
    "other channels": lambda a: a[:, : C - 1],
    "other order of axes": lambda a: a.transpose((1, 0, 2, 3)),
    "csr": lambda a: a.reshape((8 * C, 16)).tostype("csr"),
    "transposed": lambda a: a.transpose((1, 0, 2, 3)).copy().transpose((1, 0, 2, 3)),
    "convolved": convolved,
}
"""Those of arrays of the input's shape."""


def set_x(make: Callable[[Any], Any], run: Run) -> None:
    run.x = make(run.x)


def set_dy(make: Callable[[Any], Any], run: Run) -> None:
    run.dy = make(run.dy)


def set_parameter(name: str, make: Callable[[Any], Any], run: Run) -> None:
    run.replace(name, make(getattr(run.layer, name).data()))


def set_gradient(make: Callable[[Any], Any], run: Run) -> None:
    run.grad = make(mx.nd.zeros(SHAPE))


def set_parameters_gradient(make: Callable[[Any], Any], run: Run) -> None:
    gamma = run.layer.gamma
    gradient = make(mx.nd.zeros((C,)))
    gamma._grad[0] = gradient
    autograd.mark_variables([gamma.data()], [gradient])


def alias(a: str, b: str, run: Run) -> None:
    run.replace(a, getattr(run.layer, b).data())


def overlap(run: Run) -> None:
    larger = random(C + 8, seed=4).abs()
    run.replace("running_mean", larger[:C])
    run.replace("running_var", larger[8:])


def slices(a: str, b: str, run: Run) -> None:
    """Two parameters that share no values, but an array, for which MXNet's engine has one lock."""
    its = [getattr(run.layer, name).data() for name in (a, b)]
    larger = mx.nd.concat(*(each.reshape((-1,)) for each in its), dim=0)
    larger[:] = larger * 1  # still running when the layer is called
    run.replace(a, larger[: its[0].size].reshape(its[0].shape))
    run.replace(b, larger[its[0].size :].reshape(its[1].shape))


def zero_x(run: Run) -> None:
    run.x[:] = 0


def cast(name: str, dtype: str, run: Run) -> None:
    getattr(run.layer, name).cast(dtype)


def gone(name: str, run: Run) -> None:
    getattr(run.layer, name)._data = None


def wide_layer(run: Run) -> None:
    run.layer.cast("float64")


def x_from_state(run: Run) -> None:
    run.x = run.layer.running_mean.data().reshape((1, C, 1, 1)).broadcast_to((2, C, 1, 1))


def dy_is_x(run: Run) -> None:
    run.dy = run.x


def dy_is_the_gradient(run: Run) -> None:
    run.x.grad[:] = run.dy
    run.dy = run.x.grad


def grad_is_x(run: Run) -> None:
    run.grad = run.x


def request(how: str, run: Run) -> None:
    run.layer.gamma.grad_req = how


Change = tuple[Callable[[Run], None], Callable[[Run], None]]


def changes() -> dict[str, Change]:
    """Return name -> actions before the forward, and between forward and backward."""
    found: dict[str, Change] = {"nothing": (nothing, nothing)}
    for what, make in (ARRAYS | IMAGES).items():
        found[f"x {what}"] = partial(set_x, make), nothing
        if what != "no memory":  # MXNet allocates it, and leaves in it what was there
            found[f"dy {what}"] = nothing, partial(set_dy, make)
        if what not in ("numpy", "list", "a number", "None"):
            found[f"gradient of x {what}"] = partial(set_gradient, make), nothing
    for what, make in ARRAYS.items():
        for name in PARAMETERS:
            found[f"{name} {what}"] = partial(set_parameter, name, make), nothing
        if what not in ("numpy", "list", "a number", "None"):
            found[f"gradient of gamma {what}"] = partial(set_parameters_gradient, make), nothing
    for name in PARAMETERS:
        for dtype in ("float16", "float64", "int32"):
            found[f"{name} cast to {dtype}"] = partial(cast, name, dtype), nothing
            found[f"{name} cast to {dtype} in between"] = nothing, partial(cast, name, dtype)
        found[f"{name} gone"] = partial(gone, name), nothing
        found[f"{name} smaller in between"] = nothing, partial(set_parameter, name, ARRAYS["one value"])
    for a, b in (("running_mean", "running_var"), ("running_mean", "gamma"), ("running_var", "beta"), ("gamma", "beta")):
        found[f"{a} is {b}"] = partial(alias, a, b), nothing
    for a, b in (("running_mean", "running_var"), ("running_var", "running_mean"), ("gamma", "running_mean"), ("gamma", "beta")):
        found[f"{a} and {b} are slices"] = partial(slices, a, b), nothing
    found |= {
        "running_mean and running_var overlap": (overlap, nothing),
        "x zero in between": (nothing, zero_x),
        "float64 layer": (wide_layer, nothing),
        "float64 layer in between": (nothing, wide_layer),
        "x of the state": (x_from_state, nothing),
        "dy is x": (nothing, dy_is_x),
        "dy is the gradient of x": (nothing, dy_is_the_gradient),
        "gradient of x is x": (grad_is_x, nothing),
        "gamma asks for no gradient": (partial(request, "null"), nothing),
        "gamma adds its gradient": (partial(request, "add"), nothing),
        "gamma adds in between": (nothing, partial(request, "add")),
    }
    return found


def of_the_counter() -> dict[str, Change]:
    found: dict[str, Change] = {"nothing": (nothing, nothing)}
    for what, make in ARRAYS.items():
        found[f"num_batches_tracked {what}"] = partial(set_parameter, "num_batches_tracked", make), nothing
    found["num_batches_tracked gone"] = partial(gone, "num_batches_tracked"), nothing
    return found


def of_whitening() -> dict[str, Change]:
    found = {name: change for name, change in changes().items() if name == "nothing" or name.startswith(("x ", "dy "))}
    found["running_mean and running_covariance are slices"] = partial(slices, "running_mean", "running_covariance"), nothing
    for name in ("dy None", "dy is x", "x zero in between"):  # asks for other numbers, and there is no other whitening to compare
        del found[name]
    for what, make in ARRAYS.items():
        for name in ("gamma", "beta", "running_mean", "running_covariance"):
            found[f"{name} {what}"] = partial(set_parameter, name, make), nothing
    return found


CELLS = {
    **{f"{way}: {name}": ("own", "ours", way, change) for name, change in changes().items() for way in WAYS},
    **{f"{way}, counter: {name}": ("", "counter", way, change) for name, change in of_the_counter().items() for way in WAYS},
    **{f"whitening {way}: {name}": ("", "whitening", way, change) for name, change in of_whitening().items() for way in WAYS},
}
"""Name of a cell -> MXNet's own layer or "", ours, how it is run, and what is changed."""


def one(kind: str, way: str, change: Change) -> Any:
    return Run(kind, way).go(*change)


if __name__ == "__main__":
    for kind in ("own", "ours", "counter"):  # compile, so that no cell has to; after a Custom operator in Python, fork hangs
        one(kind, "in a graph", (nothing, nothing))
        one(kind, "called", (nothing, nothing))
    gate.address("x", mx.nd.ones((1,)), "float32", 1)
    mx.nd.waitall()
    main(
        {
            f"{whose}|{name}": partial(one, kind, way, change)
            for name, (own, ours, way, change) in CELLS.items()
            for whose, kind in (("own", own), ("ours", ours))
            if kind
        }
    )
