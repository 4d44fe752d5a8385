"""The gate: every NDArray passes it before compiled code gets its address."""

# mypy: disable-error-code="attr-defined, import-untyped, no-any-return, call-arg, call-overload, no-untyped-call"
# Numba's decorators change what their functions take and return.

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pkgutil import get_data
from typing import Any

import llvmlite.binding
import mxnet as mx
import numpy as np
from mxnet.base import MXNetError
from numba import carray, types

from multibn.kernel.addresses import pointer
from multibn.kernel.cache import keep
from multibn.kernel.jit import SOURCES as KERNEL_SOURCES
from multibn.kernel.jit import c_function
from multibn.kernel.jit import compiled as kernel_compiled

from .compat import LIB
from .description import type_name

TYPES = {"float32": 0, "float64": 1, "float16": 2, "int64": 6, "bfloat16": 12}
"""Name of a type -> MXNet's number for it."""
FLOAT32, FLOAT64, INT64 = TYPES["float32"], TYPES["float64"], TYPES["int64"]

ADDRESS = types.intp
FUNCTIONS = (
    "MXNDArrayFree", "MXNDArrayGetContext", "MXNDArrayGetData", "MXNDArrayGetDType", "MXNDArrayGetShapeEx",
    "MXNDArrayGetStorageType", "MXNDArrayWaitToRead",
)  # fmt: skip
"""What compiled code calls of MXNet's C interface."""

for _name in FUNCTIONS:
    llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(LIB, _name), ctypes.c_void_p).value)
_one = types.int32(ADDRESS)
_two = types.int32(ADDRESS, ADDRESS)
_three = types.int32(ADDRESS, ADDRESS, ADDRESS)
_wait_to_read = types.ExternalFunction("MXNDArrayWaitToRead", _one)
_get_data = types.ExternalFunction("MXNDArrayGetData", _two)
_get_type = types.ExternalFunction("MXNDArrayGetDType", _two)
_get_storage = types.ExternalFunction("MXNDArrayGetStorageType", _two)
_get_context = types.ExternalFunction("MXNDArrayGetContext", _three)
get_shape = types.ExternalFunction("MXNDArrayGetShapeEx", _three)

FAILED, REFUSED = -1, -2
"""What ``wait`` returns instead of 0. FAILED is also what MXNet returns: its message is the last error of this thread."""
_DENSE = 0
_CPUS = (1, 3, 5)  # cpu, cpu_pinned, cpu_shared

SOURCES = hashlib.sha256(KERNEL_SOURCES.encode() + (get_data(__package__, "gate.py") or b"")).hexdigest()


def compiled(function: Any) -> Any:
    """``multibn.kernel.jit.compiled`` for the functions of this file."""
    return keep(kernel_compiled(function), SOURCES)


@compiled
def kind_of(handle: int, slot: Any) -> int:  # pragma: no cover - compiled, so that coverage cannot see the lines run
    """MXNet's number for an NDArray's type. Here and below, slot is room for two integers."""
    slot[0] = 0
    _get_type(handle, slot.ctypes.data)
    return int(np.int32(slot[0]))


@compiled
def plain(handle: int, kind: int, count: int, slot: Any) -> int:  # pragma: no cover
    """The address of an NDArray that is dense, in a CPU's memory, of this type and number of values; of any other, 0."""
    slot[:] = 0
    _get_storage(handle, slot.ctypes.data)
    if np.int32(slot[0]) != _DENSE or kind_of(handle, slot) != kind:
        return 0
    slot[:] = 0
    _get_context(handle, slot.ctypes.data, slot[1:].ctypes.data)
    if np.int32(slot[0]) not in _CPUS:
        return 0
    slot[:] = 0
    get_shape(handle, slot.ctypes.data, slot[1:].ctypes.data)
    size = 1
    for axis in range(np.int32(slot[0])):
        size *= carray(pointer(slot[1]), np.int32(slot[0]), np.int32)[axis]
    if size != count or count == 0:
        return 0
    slot[0] = 0
    _get_data(handle, slot.ctypes.data)
    return slot[0]


@compiled
def shape_of(handle: int, slot: Any) -> Any:  # pragma: no cover
    """The shape of an NDArray; MXNet's own copy lasts until the next call."""
    slot[:] = 0
    get_shape(handle, slot.ctypes.data, slot[1:].ctypes.data)
    return carray(pointer(slot[1]), max(np.int32(slot[0]), 0), np.int32).copy()


@compiled
def plain_like(handle: int, other: int, kind: int, count: int, slot: Any) -> int:  # pragma: no cover
    """``plain``, and 0 too for an array of another shape than the other's."""
    its, wanted = shape_of(handle, slot), shape_of(other, slot)
    if its.size != wanted.size or not (its == wanted).all():
        return 0
    return plain(handle, kind, count, slot)


@compiled
def _end(handle: int, start: int, slot: Any) -> int:  # pragma: no cover
    size = 8 if kind_of(handle, slot) == FLOAT64 else 4
    for length in shape_of(handle, slot):
        size *= length
    return start + size


def _wait(handle_list: int, count: int, states: int) -> int:  # pragma: no cover
    slot = np.zeros(2, np.int64)
    handles = carray(pointer(handle_list), count, np.int64)
    for handle in handles:
        if handle != 0:
            slot[0] = 0
            _get_storage(handle, slot.ctypes.data)
            if np.int32(slot[0]) < _DENSE:
                return REFUSED
            if _wait_to_read(handle) != 0:
                return FAILED
    places = np.zeros(2, np.int64)
    for i in range(2):
        _get_data(handles[states + i], places[i:].ctypes.data)
    apart = places[1] >= _end(handles[states], places[0], slot) or places[0] >= _end(handles[states + 1], places[1], slot)
    return 0 if apart else REFUSED


@cache
def wait() -> Any:
    """Compiled: wait until NDArrays are written. FAILED if an operator that writes one failed; REFUSED if one has no memory, or
    the states share memory.

    It takes the address of their handles, 0 for none, how many there are, and the place of the first of two states.
    """
    return c_function(types.int64(ADDRESS, types.int64, types.int64), _wait, SOURCES).ctypes


def _address(handle: int, kind: int, count: int) -> int:  # pragma: no cover
    return plain(handle, kind, count, np.zeros(2, np.int64))


@cache
def _compiled_address() -> Any:
    return c_function(ADDRESS(ADDRESS, ADDRESS, ADDRESS), _address, SOURCES)


def address(name: str, array: Any, kind: str, count: int, like: Any = None) -> int:
    """The address of an NDArray's values, for the kernel.

    Args:
        name: of the array, for the message.
        kind, count: the type and the number of values that the kernel takes it for.
        like: an NDArray of the same shape, or None.

    Raises:
        MXNetError: the array is another.
    """
    found: int = 0
    if isinstance(array, mx.nd.NDArray) and array.handle and (like is None or array.shape == like.shape):
        found = _compiled_address().ctypes(array.handle.value, TYPES[kind], count)
    if not found:
        raise MXNetError(refusal(name, array, kind, (count,) if like is None else like.shape))
    return found


def check_memory(name: str, array: Any) -> None:
    """Raise MXNetError if an NDArray has no memory."""
    if array.stype == "undefined":
        raise MXNetError(f"{name} has no memory yet. Initialize the parameter, or write to the array first.")


def refusal(name: str, array: Any, kind: str, shape: tuple[int, ...]) -> str:
    """The message for an array that is not what the kernel takes it for."""
    if not isinstance(array, mx.nd.NDArray):
        its = f"an object of type {type(array).__name__}"
    elif not array.handle or array.stype == "undefined":
        its = "an array without memory"
    else:
        storage = "dense" if array.stype == "default" else array.stype
        its = f"a {storage} {type_name(array)} array of shape {array.shape} on {array.context}"
    return (
        f"{name} must be a dense {kind} array of shape {shape} on a CPU, got {its}. "
        "Convert it with tostype('default'), astype, reshape or as_in_context."
    )
