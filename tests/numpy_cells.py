"""Wrong and unusual arguments of the NumPy layers and of ``multibn.kernel``: each argument times each kind of wrongness.

A cell compares with ``multibn.reference`` or ``multibn.whitening.reference`` itself, and gives what is wrong, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from processes import main

import multibn
from multibn import BatchNormSpec, kernel, reference
from multibn.array import BatchNorm
from multibn.layer.types import Array
from multibn.whitening import reference as whitening_reference
from multibn.whitening.layer import Whitening

C, SHAPE = 6, (5, 6, 3, 2)
STATE = ("gamma", "beta", "moving_mean", "moving_var")


class Subclass(np.ndarray[Any, Any]):
    pass


def _misaligned(a: Array) -> Array:
    room = np.zeros(a.nbytes + 1, np.uint8)
    its = room[1:].view(a.dtype).reshape(a.shape)
    its[...] = a
    return its


def _read_only(a: Array) -> Array:
    its = a.copy()
    its.flags.writeable = False
    return its


def _strided(a: Array) -> Array:
    its = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)[..., ::2]
    its[...] = a
    return its


WRONG: dict[str, Callable[[Array], Any]] = {
    "None": lambda a: None,
    "a list": lambda a: a.tolist(),
    "a number": lambda a: 1.0,
    "float16": lambda a: a.astype(np.float16),
    "float64": lambda a: a.astype(np.float64),
    "longdouble": lambda a: a.astype(np.longdouble),
    "int32": lambda a: a.astype(np.int32),
    "complex": lambda a: a.astype(np.complex64),
    "objects": lambda a: a.astype(object),
    "big-endian": lambda a: a.astype(">f4"),
    "one value": lambda a: np.ones(1, a.dtype),
    "fewer": lambda a: a[: len(a) // 2],
    "more": lambda a: np.concatenate([a, a]),
    "a value fewer": lambda a: a[:-1],
    "an axis more": lambda a: a[None],
    "flat": lambda a: a.reshape(-1),
    "no axis": lambda a: a.reshape(-1)[0].reshape(()),
    "empty": lambda a: a[:0],
    "strided": _strided,
    "backwards": lambda a: a[::-1].copy()[::-1],
    "Fortran's order": np.asfortranarray,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "misaligned": _misaligned,
    "read-only": _read_only,
    "a subclass": lambda a: a.view(Subclass),
    "masked": lambda a: np.ma.masked_array(a, a > 0),  # type: ignore[no-untyped-call]
    "a matrix": lambda a: np.matrix(a.reshape(len(a), -1)),
    "a part": lambda a: np.concatenate([a, a])[: len(a)],
}


def arguments() -> dict[str, Array]:
    random = np.random.RandomState(0)
    given = {"x": random.normal(1, 2, SHAPE), "gamma": random.normal(1, 1, C), "beta": random.normal(0, 1, C)}
    given |= {"moving_mean": random.normal(0, 1, C), "moving_var": random.uniform(1, 2, C), "dy": random.normal(0, 1, SHAPE)}
    return {name: (np.round(8 * a) / 8).astype("f") for name, a in given.items()}  # casts lose nothing


def ours_by_kernel(its: dict[str, Any], training: bool, between: Callable[[dict[str, Any]], None]) -> tuple[Any, ...]:
    y, saved = kernel.forward(its["x"], *map(its.__getitem__, STATE), BatchNormSpec(), training)  # type: ignore[call-arg]
    between(its)
    return (y, *kernel.backward(its["dy"], saved), its["moving_mean"], its["moving_var"])


def ours_by_array(its: dict[str, Any], training: bool, between: Callable[[dict[str, Any]], None]) -> tuple[Any, ...]:
    layer = BatchNorm(C, None)
    for name in STATE:
        setattr(layer, name, its[name])
    y = layer.forward(its["x"], training)
    between(its)
    return (y, *layer.backward(its["dy"]), layer.moving_mean, layer.moving_var)


def by_reference(its: dict[str, Any], training: bool, between: Callable[[dict[str, Any]], None]) -> tuple[Any, ...]:
    done = reference.forward(its["x"], *map(its.__getitem__, STATE), BatchNormSpec(), training)  # type: ignore[call-arg]
    between(its)
    return (done.y, *reference.backward(its["dy"], done.saved), done.moving_mean, done.moving_var)


def ours_by_whitening(its: dict[str, Any], training: bool, between: Callable[[dict[str, Any]], None]) -> tuple[Any, ...]:
    layer = Whitening(C, 4, groups=3)
    layer.gamma, layer.beta, layer.moving_mean = its["gamma"], its["beta"], its["moving_mean"]
    layer.moving_covariance = its["moving_covariance"]
    y = layer.forward(its["x"], training)
    between(its)
    return (y, *layer.backward(its["dy"]), layer.moving_mean, layer.moving_covariance)


def by_whitening_reference(its: dict[str, Any], training: bool, between: Callable[[dict[str, Any]], None]) -> tuple[Any, ...]:
    spec = multibn.whitening.WhiteningSpec(groups=3)
    state = its["gamma"], its["beta"], its["moving_mean"], its["moving_covariance"]
    y, mean, covariance, saved = whitening_reference.forward(its["x"], *state, spec, training)
    between(its)
    return (y, *whitening_reference.backward(its["dy"], saved, spec), mean, covariance)


WHO = {
    "kernel": (ours_by_kernel, by_reference),
    "array": (ours_by_array, by_reference),
    "whitening": (ours_by_whitening, by_whitening_reference),
}


def given(who: str) -> dict[str, Array]:
    its = arguments()
    if who == "whitening":
        del its["moving_var"]
        its["moving_covariance"] = np.tile(np.eye(C // 3, dtype="f"), (3, 1, 1))
    return its


def cell(
    who: str, training: bool, before: Callable[[dict[str, Any]], None], between: Callable[[dict[str, Any]], None]
) -> str | None:
    """Return what is wrong with our layer, or None."""
    ours, theirs = WHO[who]
    its, others = given(who), given(who)
    before(its)
    before(others)
    for name, value in others.items():
        if isinstance(value, np.ndarray) and not value.dtype.isnative:
            others[name] = value.astype(
                "f4"
            )  # the reference refuses a dy of another byte order than x, which is the same numbers
    names = [name for name in its if name.startswith("moving")]
    old = [np.array(its[name]) for name in names]
    try:
        found = ours(its, training, between)
    except (TypeError, ValueError, AttributeError) as error:
        if "dy" not in str(error) and any(repr(a) != repr(np.array(its[n])) for n, a in zip(names, old, strict=True)):
            return f"the state has changed, and then: {error}"
        return None
    expected = theirs(others, training, between)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not np.allclose(np.asarray(a, "d"), np.asarray(b, "d"), rtol=1e-4, atol=1e-4, equal_nan=True):
            return f"result {i} is not the reference's"
    return None


def nothing(_: dict[str, Any]) -> None:
    pass


def put(name: str, make: Callable[[Array], Any], its: dict[str, Any]) -> None:
    its[name] = make(its[name])


def alias(a: str, b: str, its: dict[str, Any]) -> None:
    its[a] = its[b]


def overwrite(name: str, its: dict[str, Any]) -> None:
    its[name][...] = 7


def cells() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for who in WHO:
        for name in given(who):
            for what, make in WRONG.items():
                found[f"{who}: {name} {what}"] = partial(cell, who, True, partial(put, name, make), nothing)
            found[f"{who}: {name} read-only in inference"] = partial(cell, who, False, partial(put, name, _read_only), nothing)
            if not name.startswith("moving") and name != "dy":
                found[f"{who}: {name} overwritten in between"] = partial(cell, who, True, nothing, partial(overwrite, name))
        for a, b in (("gamma", "beta"), ("moving_mean", "gamma"), ("moving_mean", "beta"), ("dy", "x")):
            found[f"{who}: {a} is {b}"] = partial(cell, who, True, partial(alias, a, b), nothing)
        if who != "whitening":
            same = partial(alias, "moving_mean", "moving_var")
            found[f"{who}: moving_mean is moving_var"] = partial(cell, who, True, same, nothing)
    return found


CELLS = cells()

if __name__ == "__main__":
    for who in WHO:
        assert cell(who, True, nothing, nothing) is None
    for kind in ("float16", "float64"):  # compiles, so that no cell has to
        kernel.prepare("int16" if kind == "float16" else kind)
    main(CELLS)
