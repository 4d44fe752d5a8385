"""MXNet's callbacks for CPU input, compiled: no Python, so no GIL, between MXNet and the kernel.

These are the callbacks of the Custom operator, and the backward of ``direct/call.py``. MXNet calls an operator's callbacks by C
function pointers (``CustomOpPropCallbacks`` and ``CustomOpCallbacks`` of ``c_api.h``), from its own threads. Here pointers are
integers. Rare cases, and input so large that Python's overhead is negligible, go to ``callbacks.py``: every error, types other
than float32, input worth huge pages, channel counts beyond the table.
"""

# mypy: disable-error-code="attr-defined, import-untyped, no-any-return, call-arg, call-overload, no-untyped-call"
# Numba's decorators change the signatures of functions.

from __future__ import annotations

import ctypes
import hashlib
from pkgutil import get_data
from typing import Any

import llvmlite.binding
import numpy as np
from numba import carray, types

from multibn.kernel.addresses import keep, pointer
from multibn.kernel.cache import keep as keep_on_disk
from multibn.kernel.entry import CREATING, LARGE, SERIAL
from multibn.kernel.jit import c_function
from multibn.kernel.jit import compiled as kernel_compiled
from multibn.kernel.schedule import backward_at, forward_at
from multibn.memory import HUGE
from multibn_mxnet.compat import ADD, NULL
from multibn_mxnet.gate import ADDRESS as _ADDRESS
from multibn_mxnet.gate import FLOAT32, FLOAT64, INT64, SOURCES, TYPES, get_shape, kind_of, plain, plain_like

CONFIG = np.dtype(
    [(name, np.int64) for name in ("arguments", "outputs", "states", "dependencies")]  # addresses of the lists
    + [("operator", np.int64, 3), ("python_operator", np.int64, 3)]  # each an MXCallbackList
    + [(name, np.int64) for name in ("dependency_count", "inputs", "gamma", "beta", "scale", "center", "axis", "rank", "within")]
    + [
        (name, np.int64)
        for name in ("unbiased", "normalize_with_batch", "update", "average", "saved_shapes", "saved_shapes_count")
    ]
    + [("eps", np.float64), ("momentum", np.float64)]
    + [(name, np.int64) for name in ("starters", "threads", "forward", "backward")]
)
"""Configuration of a layer; MXNet passes its address to the callbacks as their state. ``gamma`` and ``beta`` are input indices, 0
if the layer has none; ``rank`` is 0 if any rank is allowed; ``average`` means that momentum is None; ``threads`` is the largest
number of threads. ``forward`` and ``backward`` are the addresses of the kernel's bodies for float32."""


class Record(ctypes.Structure):
    """Record that a call of ``direct/call.py`` keeps for its backward; in memory, ``saved`` and a copy of gamma follow.

    The first three fields are the MXCallbackList for MXNet; ``at`` holds the record's own address twice, as the state of both
    callbacks. ``configuration`` is the address of a CONFIG, ``x`` the handle of an NDArray.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "functions", "contexts")),
        ("at", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("configuration", "n", "channels", "s", "x")),
    )


RECORD = np.dtype(Record)
RECORD_SIZE = ctypes.sizeof(Record)

_SHAPE = types.int32(types.int32, _ADDRESS, _ADDRESS, _ADDRESS)
_TYPE = types.int32(types.int32, _ADDRESS, _ADDRESS)
_RUN = types.int32(types.int32, _ADDRESS, _ADDRESS, _ADDRESS, types.int32, _ADDRESS)
_CALL = types.int32(types.int32, types.int32, _ADDRESS, _ADDRESS, types.int32, _ADDRESS)

_release = types.ExternalFunction("free", types.void(_ADDRESS))
_free = types.ExternalFunction("MXNDArrayFree", types.int32(_ADDRESS))
_python_shape = types.ExternalFunction("multibn_mxnet_infer_shape", _SHAPE)
_python_type = types.ExternalFunction("multibn_mxnet_infer_type", _TYPE)
_python_forward = types.ExternalFunction("multibn_mxnet_forward", _RUN)
_python_backward = types.ExternalFunction("multibn_mxnet_backward", _RUN)
_python_call_backward = types.ExternalFunction("multibn_mxnet_call_backward", _CALL)

WORTH_PYTHON = HUGE // 4
"""Input of this many float32 values or more goes to Python, which requests huge pages."""

FLOAT16, BFLOAT16 = TYPES["float16"], TYPES["bfloat16"]


def link(callbacks: dict[str, int]) -> None:
    """Tell the compiler the addresses of Python callbacks (name -> address), before compiling code that calls them."""
    for name, address in callbacks.items():
        llvmlite.binding.add_symbol("multibn_mxnet_" + name, address)


_SOURCES = hashlib.sha256(SOURCES.encode() + (get_data(__package__, "native.py") or b"")).hexdigest()


def compiled(function: Any) -> Any:
    """``multibn.kernel.jit.compiled`` for the functions of this file."""
    return keep_on_disk(kernel_compiled(function), _SOURCES)


# Coverage cannot trace the compiled functions below.


@compiled
def _config(state: int) -> Any:  # pragma: no cover
    return carray(pointer(state), 1, CONFIG)[0]


@compiled
def _by_channel(handle: int, axis: int, slot: Any) -> tuple[int, int, int]:  # pragma: no cover
    """Return the shape as (N, C, S): the axes before the channel axis, the channels, the axes after the channel axis."""
    slot[:] = 0
    get_shape(handle, slot.ctypes.data, slot[1:].ctypes.data)
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
def _floats(address: int, shape: Any) -> Any:  # pragma: no cover
    return carray(pointer(address), shape, np.float32)


@compiled
def _vector(handles: Any, place: int, channels: int, absent: float, slot: Any) -> Any:  # pragma: no cover
    """Return the values of the handle at a place; a constant if place <= 0; an empty array if the gate refuses the handle."""
    if place <= 0:
        return np.full(channels, absent, np.float32)
    address = plain(handles[place], FLOAT32, channels, slot)
    return _floats(address, (channels if address else 0,))


@compiled
def _rows(address: int, channels: int) -> Any:  # pragma: no cover
    """Return a view of ``saved`` at an address."""
    return carray(pointer(address), (3, channels), np.float64)


@compiled
def _team(config: Any, body: int, size: int) -> Any:  # pragma: no cover
    """Choose the threads that run a body: ``multibn.kernel.entry.team`` in compiled code, which cannot call Python."""
    awake = carray(pointer(config.starters), 1, np.int64)[0] != 0
    return body, config.starters, config.threads if size >= (SERIAL if awake else CREATING) else 1, LARGE


@compiled
def _apart(a: int, b: int, size: int) -> bool:  # pragma: no cover
    """Return whether two arrays of at most ``size`` float32 values share no memory."""
    return abs(a - b) >= 4 * size


@compiled
def _normalize(config: Any, handles: Any, saved: Any, train: bool, shape: Any, slot: Any) -> int:  # pragma: no cover
    """``by_kernel.forward``; -1, with nothing changed, if the gate refuses an array or the states share memory with another.

    Handles are in the operator's order; the handle of ``saved`` is ignored.
    """
    inputs, channels = config.inputs, shape[1]
    size = shape[0] * channels * shape[2]
    x, y = plain(handles[0], FLOAT32, size, slot), plain_like(handles[inputs], handles[0], FLOAT32, size, slot)
    gamma = _vector(handles, config.gamma if config.scale else 0, channels, 1.0, slot)
    beta = _vector(handles, config.beta if config.center else 0, channels, 0.0, slot)
    mean, var = plain(handles[inputs + 2], FLOAT32, channels, slot), plain(handles[inputs + 3], FLOAT32, channels, slot)
    counter = plain(handles[inputs + 4], INT64, 1, slot) if config.average else 1
    if not (x and y and gamma.size and beta.size and mean and var and counter):
        return -1
    use_batch = train and config.normalize_with_batch != 0
    update = train and config.update != 0
    if update and not (_apart(mean, var, channels) and _apart(mean, x, size) and _apart(var, x, size)):
        return -1
    for parameter in (gamma.ctypes.data, beta.ctypes.data):
        if update and not (_apart(mean, parameter, channels) and _apart(var, parameter, channels)):
            return -1
    old = config.momentum
    if update and config.average:
        batches = carray(pointer(counter), (1,), np.int64)
        old = batches[0] / (batches[0] + 1)
        batches[0] += 1
    left = forward_at(
        _team(config, config.forward, size), shape, x, y, gamma.ctypes.data, beta.ctypes.data,
        mean, var, saved.ctypes.data, 0, config.eps, old, config.unbiased != 0, use_batch, update, False,
    )  # fmt: skip
    keep((gamma, beta))
    saved[2] = 1.0 if use_batch else 0.0
    return left


@compiled
def _differentiate(
    config: Any, dy: int, x: int, gamma: Any, saved: Any, gradients: Any, requests: Any, shape: Any, slot: Any
) -> bool:  # pragma: no cover
    """``by_kernel.backward``; False, with nothing changed, if the gate refuses an array.

    dy, x and gradients are handles; ``gradients`` begins with that of x, and those of the parameters follow.
    """
    channels, size = shape[1], shape[0] * shape[1] * shape[2]
    its_x, its_dy = plain(x, FLOAT32, size, slot), plain_like(dy, x, FLOAT32, size, slot)
    its_dx = plain_like(gradients[0], x, FLOAT32, size, slot) if requests[0] != NULL else 1
    if not (its_x and its_dy and its_dx and gamma.size):
        return False
    for place in (config.gamma, config.beta):
        if place > 0 and requests[place] != NULL and not plain(gradients[place], FLOAT32, channels, slot):
            return False
    into = requests[0] != NULL and requests[0] != ADD
    dx = _floats(its_dx, shape) if into else np.empty(shape, np.float32)
    dgamma, dbeta = np.empty(channels, np.float32), np.empty(channels, np.float32)
    backward_at(
        _team(config, config.backward, size), shape, its_x, its_dy, dx.ctypes.data,
        gamma.ctypes.data, gamma.ctypes.data, saved.ctypes.data, dgamma.ctypes.data, dbeta.ctypes.data, saved[2, 0] != 0, False,
    )  # fmt: skip
    keep((dx, gamma))
    if requests[0] == ADD:
        total = _floats(its_dx, shape)
        total += dx
    for place, counts, gradient in ((config.gamma, config.scale, dgamma), (config.beta, config.center, dbeta)):
        if place > 0 and requests[place] != NULL:
            out = _floats(plain(gradients[place], FLOAT32, channels, slot), (channels,))
            for c in range(channels):
                out[c] = (gradient[c] if counts else np.float32(0)) + (out[c] if requests[place] == ADD else np.float32(0))
    return True


def _forward(count: int, handle_list: int, tags: int, request_list: int, train: int, state: int) -> int:  # pragma: no cover
    config, slot = _config(state), np.zeros(2, np.int64)
    handles = carray(pointer(handle_list), count, np.int64)
    requests = carray(pointer(request_list), 2, np.int32)
    shape = _by_channel(handles[0], config.axis, slot)
    kind, m = kind_of(handles[0], slot), shape[0] * shape[2]
    if kind != FLOAT32 or m < 2 or m * shape[1] >= WORTH_PYTHON or requests[0] in (NULL, ADD):
        return _python_forward(count, handle_list, tags, request_list, train, state)
    where = plain(handles[config.inputs + 1], FLOAT64, 3 * shape[1], slot) if requests[1] != NULL else 0
    saved = _rows(where, shape[1]) if where else np.empty((3, shape[1]))
    if (requests[1] != NULL and not where) or _normalize(config, handles, saved, train != 0, shape, slot) < 0:
        return _python_forward(count, handle_list, tags, request_list, train, state)
    for handle in handles:
        _free(handle)
    return 1


def _backward(count: int, handle_list: int, tags: int, request_list: int, train: int, state: int) -> int:  # pragma: no cover
    config, slot = _config(state), np.zeros(2, np.int64)
    handles = carray(pointer(handle_list), count, np.int64)
    requests = carray(pointer(request_list), config.inputs, np.int32)
    shape = _by_channel(handles[2], config.axis, slot)
    kind, m = kind_of(handles[2], slot), shape[0] * shape[2]
    if kind != FLOAT32 or m == 0 or m * shape[1] >= WORTH_PYTHON:
        return _python_backward(count, handle_list, tags, request_list, train, state)
    inputs, channels = config.inputs, shape[1]
    gamma = _vector(handles, 2 + config.gamma if config.gamma and config.scale else 0, channels, 1.0, slot)
    where = plain(handles[inputs + 3], FLOAT64, 3 * channels, slot)
    if not where or not _differentiate(
        config, handles[0], handles[2], gamma, _rows(where, channels), handles[inputs + 4 :], requests, shape, slot
    ):
        return _python_backward(count, handle_list, tags, request_list, train, state)
    for handle in handles:
        _free(handle)
    return 1


@compiled
def _record(at: int) -> Any:  # pragma: no cover
    return carray(pointer(at), 1, RECORD)[0]


@compiled
def _gamma(at: int, channels: int) -> Any:  # pragma: no cover
    """Return a view of the copy of gamma that follows a record and its ``saved``."""
    return carray(pointer(at + RECORD_SIZE + 24 * channels), channels, np.float32)


def _call_forward(handle_list: int, train: int, at: int) -> int:  # pragma: no cover
    record, slot = _record(at), np.zeros(2, np.int64)
    config, channels = _config(record.configuration), record.channels
    handles = carray(pointer(handle_list), config.inputs + (5 if config.average else 4), np.int64)
    gamma = _vector(handles, config.gamma if config.scale else 0, channels, 1.0, slot)
    if gamma.size == 0:
        return -1
    _gamma(at, channels)[:] = gamma
    return _normalize(config, handles, _rows(at + RECORD_SIZE, channels), train != 0, (record.n, channels, record.s), slot)


def _call_backward(
    outputs: int, inputs: int, handle_list: int, request_list: int, train: int, at: int
) -> int:  # pragma: no cover
    record, slot = _record(at), np.zeros(2, np.int64)
    config, channels = _config(record.configuration), record.channels
    handles = carray(pointer(handle_list), outputs + inputs, np.int64)
    requests = carray(pointer(request_list), inputs, np.int32)
    gamma, saved, shape = _gamma(at, channels), _rows(at + RECORD_SIZE, channels), (record.n, channels, record.s)
    if not _differentiate(config, handles[0], record.x, gamma, saved, handles[1:], requests, shape, slot):
        return _python_call_backward(outputs, inputs, handle_list, request_list, train, at)
    for handle in handles:
        _free(handle)
    return 1


def _call_end(at: int) -> int:  # pragma: no cover
    _free(_record(at).x)
    _release(at)
    return 1


def _infer_shape(count: int, rank_list: int, shape_list: int, state: int) -> int:  # pragma: no cover
    config = _config(state)
    ranks = carray(pointer(rank_list), count, np.int32)
    shapes = carray(pointer(shape_list), count, np.int64)
    rank, inputs = ranks[0], config.inputs
    axis = config.axis + rank if config.axis < 0 else config.axis
    if rank < 2 + config.within or not config.within <= axis < rank or (config.rank and rank != config.rank):
        return _python_shape(count, rank_list, shape_list, state)
    channels = carray(pointer(shapes[0]), rank, np.int32)[axis]
    if not 0 < channels < config.saved_shapes_count:
        return _python_shape(count, rank_list, shape_list, state)
    for i in range(1, inputs):
        known = carray(pointer(shapes[i]), 1, np.int32)[0] if ranks[i] == 1 else channels
        if known > 0 and known != channels:
            return _python_shape(count, rank_list, shape_list, state)
    per_channel = shapes[0] + 4 * axis  # the shape (C,) is one element of x's shape
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
    on_cpu = carray(pointer(context), 1, np.uint8)[0] == 99  # "c" of "cpu(0)"
    callbacks = carray(pointer(out), 3, np.int64)
    for i in range(3):
        callbacks[i] = config.operator[i] if on_cpu else config.python_operator[i]
    return 1


def _delete(state: int) -> int:  # pragma: no cover
    return 1


def compile_callbacks() -> tuple[list[Any], list[Any]]:
    """Compile the callbacks of the operator's description and of the operator, both in MXNet's order."""
    delete, lists = types.int32(_ADDRESS), types.int32(_ADDRESS, _ADDRESS)
    dependencies = types.int32(_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS)
    create = types.int32(_ADDRESS, types.int32, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS)
    description = [
        (delete, _delete), (lists, _list_arguments), (lists, _list_outputs), (lists, _list_states), (_SHAPE, _infer_shape),
        (dependencies, _declare_dependencies), (create, _create), (_TYPE, _infer_type),
    ]  # fmt: skip
    operator = [(delete, _delete), (_RUN, _forward), (_RUN, _backward)]
    return [_callback(*each) for each in description], [_callback(*each) for each in operator]


def compile_calls() -> tuple[Any, Any, Any]:
    """Compile the forward, backward and end of a call of ``direct/call.py``."""
    return (
        _callback(types.int64(_ADDRESS, types.int32, _ADDRESS), _call_forward), _callback(_CALL, _call_backward),
        _callback(types.int32(_ADDRESS), _call_end),
    )  # fmt: skip


def _give_back(tensor: int) -> None:  # pragma: no cover
    carray(pointer(tensor), 8, np.int64)[6] = 0


def compile_give_back() -> Any:
    """Compile the deleter that MXNet calls with a DLManagedTensor of ``direct/output_memory.py`` after its last use."""
    return _callback(types.void(_ADDRESS), _give_back)


def _callback(signature: Any, function: Any) -> Any:
    return c_function(signature, function, _SOURCES)
