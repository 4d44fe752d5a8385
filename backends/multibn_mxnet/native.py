"""The Custom operator's callbacks for small CPU input, compiled: no Python, so no GIL, between MXNet and the kernel.

MXNet calls an operator's callbacks through C function pointers (``CustomOpPropCallbacks`` and ``CustomOpCallbacks`` of its
``c_api.h``), from its own threads. Pointers are taken as integers here. What is rare, or large enough not to mind, goes to
``callbacks.py``: every error, types other than float32, input worth threads, channel counts beyond the table.
"""

# mypy: disable-error-code="attr-defined, import-untyped, no-any-return, call-arg, call-overload"
# Numba's decorators change what their functions take and return.

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding
import numpy as np
from mxnet.base import _LIB
from numba import carray, cfunc, types

from multibn.compiled import compiled
from multibn.kernel import SERIAL
from multibn.loops import backward_serial, forward_serial, pointer

CONFIG = np.dtype(
    [(name, np.int64) for name in ("arguments", "outputs", "states", "dependencies")]  # where the answers to the lists are
    + [("operator", np.int64, 3), ("python_operator", np.int64, 3)]  # an MXCallbackList each
    + [(name, np.int64) for name in ("dependency_count", "inputs", "gamma", "beta", "scale", "center", "axis", "rank")]
    + [
        (name, np.int64)
        for name in ("unbiased", "normalize_with_batch", "update", "average", "saved_shapes", "saved_shapes_count")
    ]
    + [("eps", np.float64), ("momentum", np.float64)]
)
"""A layer's configuration, at the address that MXNet hands the callbacks as their state. ``gamma`` and ``beta`` are places among
the inputs, 0 if there is none; ``rank`` is 0 where any will do; ``average`` says that momentum is None."""

_ADDRESS = types.intp

_SHAPE = types.int32(types.int32, _ADDRESS, _ADDRESS, _ADDRESS)
_TYPE = types.int32(types.int32, _ADDRESS, _ADDRESS)
_RUN = types.int32(types.int32, _ADDRESS, _ADDRESS, _ADDRESS, types.int32, _ADDRESS)

_get_data = types.ExternalFunction("MXNDArrayGetData", types.int32(_ADDRESS, _ADDRESS))
_get_shape = types.ExternalFunction("MXNDArrayGetShapeEx", types.int32(_ADDRESS, _ADDRESS, _ADDRESS))
_get_type = types.ExternalFunction("MXNDArrayGetDType", types.int32(_ADDRESS, _ADDRESS))
_free = types.ExternalFunction("MXNDArrayFree", types.int32(_ADDRESS))
_python_shape = types.ExternalFunction("multibn_mxnet_infer_shape", _SHAPE)
_python_type = types.ExternalFunction("multibn_mxnet_infer_type", _TYPE)
_python_forward = types.ExternalFunction("multibn_mxnet_forward", _RUN)
_python_backward = types.ExternalFunction("multibn_mxnet_backward", _RUN)

FLOAT32, FLOAT64, FLOAT16, INT64, BFLOAT16 = 0, 1, 2, 6, 12
NULL, ADD = 0, 3


def link(callbacks: dict[str, int]) -> None:
    """Tell the compiler where MXNet's functions and the Python callbacks (name -> address) are. Once, before any compilation."""
    for name in ("MXNDArrayGetData", "MXNDArrayGetShapeEx", "MXNDArrayGetDType", "MXNDArrayFree"):
        llvmlite.binding.add_symbol(name, ctypes.cast(getattr(_LIB, name), ctypes.c_void_p).value)
    for name, address in callbacks.items():
        llvmlite.binding.add_symbol("multibn_mxnet_" + name, address)


# Compiled, so that coverage cannot see the lines run.


@compiled
def _config(state: int) -> Any:  # pragma: no cover
    return carray(pointer(state), 1, CONFIG)[0]


@compiled
def _address(handle: int, slot: Any) -> int:  # pragma: no cover
    """Where an NDArray's values are."""
    _get_data(handle, slot.ctypes.data)
    return slot[0]


@compiled
def _by_channel(handle: int, axis: int, slot: Any) -> tuple[int, int, int]:  # pragma: no cover
    """The shape as (N, C, S): the axes before the channel axis, the channels, the axes after it."""
    _get_shape(handle, slot.ctypes.data, slot[1:].ctypes.data)
    rank = np.int32(slot[0])
    shape = carray(pointer(slot[1]), rank, np.int32)
    before, after = 1, 1
    axis = axis + rank if axis < 0 else axis
    for i in range(axis):
        before *= shape[i]
    for i in range(axis + 1, rank):
        after *= shape[i]
    return before, np.int64(shape[axis]), after


@compiled
def _view(handle: int, shape: Any, slot: Any) -> Any:  # pragma: no cover
    return carray(pointer(_address(handle, slot)), shape, np.float32)


@compiled
def _vector(handles: Any, place: int, channels: int, absent: float, slot: Any) -> Any:  # pragma: no cover
    """The values of one of the handles, or a constant where there is none."""
    return _view(handles[place], (channels,), slot) if place > 0 else np.full(channels, absent, np.float32)


@compiled
def _saved(handle: int, channels: int, row: int, slot: Any) -> Any:  # pragma: no cover
    """Rows 0 and 1 of ``saved``, or rows 2 and 3, of which 3 is not there."""
    return carray(pointer(_address(handle, slot) + 8 * row * channels), (2, channels), np.float64)


@compiled
def _normalize(config: Any, handles: Any, keep: bool, train: bool, shape: Any, slot: Any) -> None:  # pragma: no cover
    inputs, channels = config.inputs, shape[1]
    x, y = _view(handles[0], shape, slot), _view(handles[inputs], shape, slot)
    gamma = _vector(handles, config.gamma if config.scale else 0, channels, 1.0, slot)
    beta = _vector(handles, config.beta if config.center else 0, channels, 0.0, slot)
    mean, var = _view(handles[inputs + 2], (channels,), slot), _view(handles[inputs + 3], (channels,), slot)
    use_batch = train and config.normalize_with_batch != 0
    update = train and config.update != 0
    old = config.momentum
    if update and config.average:
        batches = carray(pointer(_address(handles[inputs + 4], slot)), (1,), np.int64)
        old = batches[0] / (batches[0] + 1)
        batches[0] += 1
    saved = _saved(handles[inputs + 1], channels, 0, slot) if keep else np.empty((2, channels))
    forward_serial(x, y, gamma, beta, mean, var, saved, config.eps, old, config.unbiased != 0, use_batch, update)
    if keep:
        _saved(handles[inputs + 1], channels, 2, slot)[0] = 1.0 if use_batch else 0.0


@compiled
def _differentiate(config: Any, handles: Any, requests: Any, shape: Any, slot: Any) -> None:  # pragma: no cover
    inputs, channels = config.inputs, shape[1]
    dy, x = _view(handles[0], shape, slot), _view(handles[2], shape, slot)
    gamma = _vector(handles, 2 + config.gamma if config.gamma and config.scale else 0, channels, 1.0, slot)
    saved, through = _saved(handles[inputs + 3], channels, 0, slot), _saved(handles[inputs + 3], channels, 2, slot)[0, 0] != 0
    gradients = handles[inputs + 4 :]
    dx = np.empty(shape, np.float32) if requests[0] == NULL else _view(gradients[0], shape, slot)
    dgamma, dbeta = np.empty(channels, np.float32), np.empty(channels, np.float32)
    backward_serial(x, dy, dx, gamma, saved, dgamma, dbeta, through)
    for place, counts, gradient in ((config.gamma, config.scale, dgamma), (config.beta, config.center, dbeta)):
        if place > 0 and requests[place] != NULL:
            out = _view(gradients[place], (channels,), slot)
            for c in range(channels):
                out[c] = (gradient[c] if counts else np.float32(0)) + (out[c] if requests[place] == ADD else np.float32(0))


def _forward(count: int, handle_list: int, tags: int, request_list: int, train: int, state: int) -> int:  # pragma: no cover
    config, slot = _config(state), np.zeros(2, np.int64)
    handles = carray(pointer(handle_list), count, np.int64)
    requests = carray(pointer(request_list), 2, np.int32)
    shape = _by_channel(handles[0], config.axis, slot)
    slot[:] = 0
    _get_type(handles[0], slot.ctypes.data)
    kind, m = np.int32(slot[0]), shape[0] * shape[2]
    if kind != FLOAT32 or m < 2 or m * shape[1] >= SERIAL or requests[0] in (NULL, ADD):
        return _python_forward(count, handle_list, tags, request_list, train, state)
    _normalize(config, handles, requests[1] != NULL, train != 0, shape, slot)
    for handle in handles:
        _free(handle)
    return 1


def _backward(count: int, handle_list: int, tags: int, request_list: int, train: int, state: int) -> int:  # pragma: no cover
    config, slot = _config(state), np.zeros(2, np.int64)
    handles = carray(pointer(handle_list), count, np.int64)
    requests = carray(pointer(request_list), config.inputs, np.int32)
    shape = _by_channel(handles[2], config.axis, slot)
    slot[:] = 0
    _get_type(handles[2], slot.ctypes.data)
    kind, m = np.int32(slot[0]), shape[0] * shape[2]
    if kind != FLOAT32 or m == 0 or m * shape[1] >= SERIAL or requests[0] == ADD:
        return _python_backward(count, handle_list, tags, request_list, train, state)
    _differentiate(config, handles, requests, shape, slot)
    for handle in handles:
        _free(handle)
    return 1


def _infer_shape(count: int, rank_list: int, shape_list: int, state: int) -> int:  # pragma: no cover
    config = _config(state)
    ranks = carray(pointer(rank_list), count, np.int32)
    shapes = carray(pointer(shape_list), count, np.int64)
    rank, inputs = ranks[0], config.inputs
    axis = config.axis + rank if config.axis < 0 else config.axis
    if rank < 2 or not 0 <= axis < rank or (config.rank and rank != config.rank):
        return _python_shape(count, rank_list, shape_list, state)
    channels = carray(pointer(shapes[0]), rank, np.int32)[axis]
    if not 0 < channels < config.saved_shapes_count:
        return _python_shape(count, rank_list, shape_list, state)
    for i in range(1, inputs):
        known = carray(pointer(shapes[i]), 1, np.int32)[0] if ranks[i] == 1 else channels
        if known > 0 and known != channels:
            return _python_shape(count, rank_list, shape_list, state)
    per_channel = shapes[0] + 4 * axis  # a shape (C,) stands inside that of x
    for i in range(1, count):
        ranks[i], shapes[i] = 1, per_channel
    ranks[inputs], shapes[inputs] = rank, shapes[0]
    ranks[inputs + 1], shapes[inputs + 1] = 2, config.saved_shapes + 8 * channels
    if config.average:
        shapes[inputs + 4] = config.saved_shapes + 12  # row 1 of the table is (3, 1)
    return 1


def _infer_type(count: int, type_list: int, state: int) -> int:  # pragma: no cover
    config = _config(state)
    kinds = carray(pointer(type_list), count, np.int32)
    inputs = config.inputs
    kind = kinds[0] if kinds[0] >= 0 else kinds[inputs]
    if kind < 0:
        kinds[inputs + 1] = FLOAT64
        return 1
    state_kind = FLOAT64 if kind == FLOAT64 else FLOAT32
    for i in range(1, count):
        if i < inputs or i in (inputs + 2, inputs + 3):
            if kinds[i] >= 0 and kinds[i] != state_kind:
                return _python_type(count, type_list, state)
            kinds[i] = state_kind
    if kind not in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16):
        return _python_type(count, type_list, state)
    kinds[0], kinds[inputs], kinds[inputs + 1] = kind, kind, FLOAT64
    if config.average:
        kinds[inputs + 4] = INT64
    return 1


@compiled
def _answer(out: int, value: int) -> int:  # pragma: no cover
    carray(pointer(out), 1, np.int64)[0] = value
    return 1


def _list_arguments(out: int, state: int) -> int:  # pragma: no cover
    return _answer(out, _config(state).arguments)


def _list_outputs(out: int, state: int) -> int:  # pragma: no cover
    return _answer(out, _config(state).outputs)


def _list_states(out: int, state: int) -> int:  # pragma: no cover
    return _answer(out, _config(state).states)


def _declare_dependencies(dy: int, x: int, y: int, count: int, out: int, state: int) -> int:  # pragma: no cover
    config = _config(state)
    carray(pointer(count), 1, np.int32)[0] = config.dependency_count
    return _answer(out, config.dependencies)


def _create(context: int, count: int, shapes: int, ranks: int, kinds: int, out: int, state: int) -> int:  # pragma: no cover
    config = _config(state)
    on_cpu = carray(pointer(context), 1, np.uint8)[0] == 99  # "cpu(0)" begins with a c
    callbacks = carray(pointer(out), 3, np.int64)
    for i in range(3):
        callbacks[i] = config.operator[i] if on_cpu else config.python_operator[i]
    return 1


def _delete(state: int) -> int:  # pragma: no cover
    return 1


def compile_callbacks() -> tuple[list[Any], list[Any]]:
    """The compiled callbacks of the operator's description and of the operator, each in MXNet's order."""
    delete, lists = types.int32(_ADDRESS), types.int32(_ADDRESS, _ADDRESS)
    dependencies = types.int32(_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS)
    create = types.int32(_ADDRESS, types.int32, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS)
    description = [
        (delete, _delete), (lists, _list_arguments), (lists, _list_outputs), (lists, _list_states), (_SHAPE, _infer_shape),
        (dependencies, _declare_dependencies), (create, _create), (_TYPE, _infer_type),
    ]  # fmt: skip
    operator = [(delete, _delete), (_RUN, _forward), (_RUN, _backward)]
    return [_callback(*each) for each in description], [_callback(*each) for each in operator]


def _callback(signature: Any, function: Any) -> Any:
    try:
        return cfunc(signature, nopython=True, cache=True)(function)
    except RuntimeError:  # Numba found no directory that it may write
        return cfunc(signature, nopython=True)(function)
