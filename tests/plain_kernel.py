"""The kernel as plain Python, with NUMBA_DISABLE_JIT=1: the golden bits, and each way of reading and writing a value.

Run by test_kernel_machines.py.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import carray as carray_of  # type: ignore[attr-defined]
from numba import config, types

from multibn.kernel import addresses, halves, jit, processor
from multibn.layer.types import Array

assert getattr(config, "DISABLE_JIT")  # noqa: B009 - numba sets it at run time
np.seterr(all="ignore")


def carray(place: int, shape: Any, dtype: Any) -> Any:
    """``numba.carray`` of an address; a structure has its fields as attributes, as in compiled code."""
    made = carray_of(ctypes.c_void_p(int(place)), shape, dtype)
    return made.view(np.recarray) if np.dtype(dtype).names else made


def fetch_add(address: int, count: int) -> int:
    place = ctypes.c_int64.from_address(int(address))
    place.value += int(count)
    return place.value - int(count)


class CFunction:
    """What ``jit.c_function`` makes, of a function that stays Python's."""

    def __init__(self, signature: Any, function: Callable[[int], int], sources: str) -> None:
        self.ctypes = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(function)
        self.address = ctypes.cast(self.ctypes, ctypes.c_void_p).value


builder = SimpleNamespace(fadd=np.add, fsub=np.subtract, fmul=np.multiply, select=np.where)
"""NumPy's operators for the compiler's."""
builder.fcmp_ordered = lambda sign, a, b: a < b if sign == "<" else a <= b


def by_lines(lanes: Sequence[int], formula: Callable[..., Any]) -> tuple[Callable[..., None], Callable[..., None]]:
    """``simd.by_lines`` in NumPy."""

    def write(out: Array, inputs: Sequence[Array], start: int, row: int, scratch: Array, j: int, number: float) -> None:
        n = simd.LINE // out.itemsize
        for i in range(start, start + simd.ROWS * row, row):
            given = [each[i : i + n].astype(np.float64) for each in inputs]
            out[i : i + n] = formula(builder, number, *given, *(scratch[j + lane : j + lane + n] for lane in lanes))

    return write, write


def into_lanes(lanes: Sequence[int], sums: Sequence[int], formula: Callable[..., Any]) -> Callable[..., None]:
    """``simd.into_lanes`` in NumPy."""

    def add(inputs: Sequence[Array], start: int, stride: int, count: int, scratch: Array, j: int, number: float) -> None:
        n = simd.LINE // inputs[0].itemsize
        for i in range(start, start + count * stride, stride):
            given = [each[i : i + n].astype(np.float64) for each in inputs]
            of_lanes = (scratch[j + lane : j + lane + n].copy() for lane in (*lanes, *sums))
            for lane, new in zip(sums, formula(builder, number, *given, *of_lanes), strict=True):
                scratch[j + lane : j + lane + n] = new

    return add


# What the compiler would make of these is known to it alone.
vars(addresses).update(
    pointer=lambda address: address,
    fetch_add=fetch_add,
    call=lambda address, given: ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(given))(int(address))(*map(int, given)),
    part=lambda array, start, width: array[start : start + width],
    unsigned=int,
)
vars(jit).update(c_function=CFunction)
vars(processor).update(set_default_mode=lambda: 0, restore_mode=lambda mode: None)

from multibn.kernel import simd

vars(simd).update(by_lines=by_lines, into_lanes=into_lanes)

from golden_bits import FILE, NAMES, SHAPES, SPEC, golden

from multibn import reference
from multibn.kernel import arrays, schedule, threads
from multibn.kernel import entry as kernel
from multibn.numpy_backend import KernelSubject

vars(schedule).update(carray=carray)
KEPT = json.loads(FILE.read_text())


def check(dtype: str, *names: str) -> None:
    """The kernel gives the golden bits for these shapes."""
    found = golden(KernelSubject, [dtype], {name: SHAPES[name] for name in names})[dtype]
    assert found == {name: KEPT[dtype][name] for name in names}, found


check("float32", "one chunk for many channels", "fully connected", "last group smaller", "a row in uneven chunks", "joined")
check("float64", "one chunk for many channels")
check("float16", "one chunk for many channels")
kernel.SERIAL = kernel.CREATING = 0  # the ways of large input, on small input
starters = np.array([0, *threads._starters[1:]])  # not OpenMP's: Python may be called from the system's alone
threads.starters = lambda: int(starters.ctypes.data)
for count in (1, 2):
    threads.limit = [lambda: 1, lambda: 2][count - 1]
    check("float32", "one chunk for many channels", "four samples at a time")
kernel.LARGE = 0
check("float32", "past the cache")

# Inference, and a channel that is not finite, against the reference; and a backward as the first call for its type.
for training, poison in ((True, np.nan), (False, 0.0)):
    x, dy = (a.copy() for a in np.random.default_rng(0).normal(2, 1, (2, 3, 2, 4)).astype(np.float32))
    x[0, 1, 1] = poison
    one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    mean, var = zero.copy(), one.copy()
    done = reference.forward(x, one, zero, mean, var, SPEC, training)
    expected: list[Array | None] = [done.y, *reference.backward(dy, done.saved), done.moving_mean, done.moving_var]
    y, saved = arrays.forward(x, one, zero, mean, var, SPEC, training)
    kernel._ready.clear()
    for name, a, b in zip(NAMES, expected, [y, *arrays.backward(dy, saved), mean, var], strict=True):
        assert a is not None, name
        np.testing.assert_array_equal(b, a, name)


def check_relu(training: bool, *shape: int) -> None:
    """A ReLU in the layer's own pass gives the bits of one after the reference."""
    x, dy = np.random.default_rng(1).normal(0, 1, (2, *shape)).astype(np.float32)
    one, zero = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)
    done = reference.forward(x, one, zero, zero, one, SPEC, training)
    through = np.where(done.y > 0, dy, 0).astype(np.float32)
    expected: list[Array | None] = [np.maximum(done.y, 0), *reference.backward(through, done.saved)]
    y, dx, dgamma, dbeta, saved = np.empty_like(x), np.empty_like(x), one.copy(), zero.copy(), np.empty((2, shape[1]))
    bodies, moved = kernel.prepare(np.float32), [zero.copy(), one.copy()]
    old, unbiased = SPEC.weight_of_old(0), SPEC.moving_variance == "unbiased"
    places = [a.ctypes.data for a in (x, y, one, zero, *moved, saved)]
    team = kernel.team(bodies.forward.address, 0)
    schedule.forward_at(team, shape, *places, 0, SPEC.eps, old, unbiased, training, training, True)
    places = [a.ctypes.data for a in (x, dy, dx, one, zero, saved, dgamma, dbeta)]
    schedule.backward_at(kernel.team(bodies.backward.address, 0), shape, *places, training, True)
    for want, got in zip(expected, (y, dx, dgamma, dbeta), strict=True):
        assert want is not None
        np.testing.assert_array_equal(got, want)


for training, kernel.LARGE in ((True, 0), (False, 0), (True, 1 << 60)):
    check_relu(training, 5, 16, 71)
    check_relu(training, 7, 2, 3)
    check_relu(training, 5, 3, 900)
    check_relu(training, 5, 9, 3)  # channels enough to fold them together, of an odd width
    check_relu(training, 1, 2, 2051)  # a row in two pieces
check_relu(True, 65, 1025, 1)  # two blocks


VALUES = [0.0, -0.0, 1.0, -1.5, 1 / 3, 65504.0, 65519.9, 65520.0, 6e-8, -1e-6, 2.0**-25, 2.0**-14, 1e-45, 3e38, 1e39]
VALUES += [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8]  # ties
VALUES += [np.inf, -np.inf, np.nan, -np.nan]


def encoded(values: Array, kind: str) -> Array:
    """float64 values in a type, by NumPy; bfloat16 by way of float32, where none of VALUES becomes a tie."""
    if kind == "int16":
        return values.astype(np.float16).view(np.int16)
    if kind != "uint16":
        return values.astype(kind)
    codes = values.astype(np.float32).view(np.uint32)
    rounded = (codes + 0x7FFF + (codes >> 16 & 1)) >> 16
    return np.where(np.isnan(values), codes >> 31 << 15 | 0x7FC0, rounded).astype(np.uint16)


def decoded(codes: Array, kind: str) -> Array:
    """The values of a type as float64, by NumPy."""
    if kind == "uint16":
        codes = (codes.astype(np.uint32) << 16).view(np.float32)
    return (codes.view(np.float16) if kind == "int16" else codes).astype(np.float64)


for kind in ("int16", "uint16", "float32", "float64"):
    values, numba_type = np.array(VALUES), getattr(types, kind)
    want = encoded(values, kind)
    for store in (halves.store, halves._store_for(types.Array(numba_type, 1, "C"), 0, 0.0)):
        out = np.zeros_like(want)
        for j, value in enumerate(values):
            store(out, j, value)
        assert out.tobytes() == want.tobytes(), (kind, out, want)
    for load in (halves.load, halves._load_for(numba_type)):
        assert np.array_equal([load(code) for code in want], decoded(want, kind), equal_nan=True), kind
