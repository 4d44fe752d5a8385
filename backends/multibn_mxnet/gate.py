"""The gate: check every NDArray before compiled code gets the address of its values."""

# mypy: disable-error-code="attr-defined, import-untyped, no-any-return, call-arg, call-overload, no-untyped-call"
# Numba's decorators change the signatures of functions.

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
"""Name of a type -> MXNet's type code."""
FLOAT32, FLOAT64, INT64 = TYPES["float32"], TYPES["float64"], TYPES["int64"]

ADDRESS = types.intp
FUNCTIONS = (
    "MXNDArrayFree", "MXNDArrayGetContext", "MXNDArrayGetData", "MXNDArrayGetDType", "MXNDArrayGetShapeEx",
    "MXNDArrayGetStorageType", "MXNDArrayWaitToRead",
)  # fmt: skip
"""Functions of MXNet's C API that compiled code calls."""

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
"""Errors that ``wait`` returns instead of 0. FAILED is MXNet's own code too: the message is MXNet's last error in this thread."""
_DENSE = 0
_CPUS = (1, 3, 5)  # cpu, cpu_pinned, cpu_shared

SOURCES = hashlib.sha256(KERNEL_SOURCES.encode() + (get_data(__package__, "gate.py") or b"")).hexdigest()


def compiled(function: Any) -> Any:
    """``multibn.kernel.jit.compiled`` for the functions of this file."""
    return keep(kernel_compiled(function), SOURCES)


@compiled
def kind_of(handle: int, slot: Any) -> int:  # pragma: no cover - compiled: coverage cannot trace it
    """Return MXNet's type code of an NDArray. Here and below, slot is a buffer for two integers."""
    slot[0] = 0
    _get_type(handle, slot.ctypes.data)
    return int(np.int32(slot[0]))


@compiled
def plain(handle: int, kind: int, count: int, slot: Any) -> int:  # pragma: no cover
    """Return the address of a dense NDArray in CPU memory with this type and number of values; 0 for any other NDArray."""
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
    """Return a copy of an NDArray's shape; MXNet's own is valid until the next call."""
    slot[:] = 0
    get_shape(handle, slot.ctypes.data, slot[1:].ctypes.data)
    return carray(pointer(slot[1]), max(np.int32(slot[0]), 0), np.int32).copy()


@compiled
def plain_like(handle: int, other: int, kind: int, count: int, slot: Any) -> int:  # pragma: no cover
    """``plain``, but 0 also if the two arrays differ in shape."""
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
    """Return the compiled function that waits for pending writes to NDArrays.

    The function takes the address of an array of handles (0 for no NDArray), the number of handles, and the index of the first
    of two states. The result is 0; FAILED if an operator that writes an NDArray failed; REFUSED if an NDArray has no memory, or
    if the states share memory.
    """
    return c_function(types.int64(ADDRESS, types.int64, types.int64), _wait, SOURCES).ctypes


def _address(handle: int, kind: int, count: int) -> int:  # pragma: no cover
    return plain(handle, kind, count, np.zeros(2, np.int64))


@cache
def _compiled_address() -> Any:
    return c_function(ADDRESS(ADDRESS, ADDRESS, ADDRESS), _address, SOURCES)


def address(name: str, array: Any, kind: str, count: int, like: Any = None) -> int:
    """Return the address of an NDArray's values, for the kernel.

    Args:
        name: name of the array, for the message.
        kind, count: type and number of values that the kernel requires.
        like: an NDArray whose shape the array must have, or None.

    Raises:
        MXNetError: the array has another type, shape or number of values, is sparse, or is not on a CPU.
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
    """Return the error message for an array that the gate refuses."""
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
