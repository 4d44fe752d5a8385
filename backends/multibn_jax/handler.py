"""The CPU kernel as handlers of XLA's typed FFI: compiled functions that read XLA's call frame, without a copy, without Python.

Importing this module registers two handlers, ``multibn_forward`` and ``multibn_backward``, so that programs from JAX's cache or
from ``jax.export`` find them. What they run is compiled when a type of input first needs it. They find their process's
addresses in ``TABLE``: compiled programs hold none.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import Any

import jax
import jaxlib.version
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

from multibn.kernel import threads
from multibn.kernel.addresses import call, keep, pointer
from multibn.kernel.compat import unpack_tuple
from multibn.kernel.entry import CREATING, LARGE, SERIAL, backward_at, forward_at
from multibn.kernel.entry import prepare as kernel_for
from multibn.kernel.jit import SOURCES, c_function, inner

FORWARD, BACKWARD = "multibn_forward", "multibn_backward"
"""The names that XLA knows the handlers by."""

ADVISED, HUGE_PAGE, MADV_HUGEPAGE = 4 << 20, 2 << 20, 14
"""XLA allocates outputs anew: from this many bytes on, ask for pages of 2 MiB (Linux), since faults then cost a fifth."""

KINDS = {"float16": "int16", "bfloat16": "uint16", "float32": "float32", "float64": "float64"}
"""Type of the input -> the type of its bits, as the kernel takes them."""

_XLA = {10: "float16", 16: "bfloat16", 11: "float32", 12: "float64"}
"""``XLA_FFI_DataType`` -> type, xla/ffi/api/c_api.h."""


def _words(*names: str) -> np.dtype[Any]:
    return np.dtype([(name, np.int64) for name in names])


# xla/ffi/api/c_api.h, API version 0.x; the handlers refuse a frame whose structs have other sizes.
_FRAME = _words(
    *("size", "extension", "api", "context", "stage"),
    *("args_size", "args_extension", "args_count", "args_types", "args"),
    *("rets_size", "rets_extension", "rets_count", "rets_types", "rets"),
    *("attrs_size", "attrs_extension", "attrs_count", "attrs_types", "attrs_names", "attrs"),
)
_BUFFER = np.dtype([("size", np.int64), ("extension", np.int64), ("kind", np.int32), ("_", np.int32)] + [
    (name, np.int64) for name in ("data", "rank", "dims")
])  # fmt: skip
_API = _words("size", "extension", "version_size", "version_extension", "version", "internal", "create_error")
_EXTENSION = _words("size", "type", "next", "metadata")
_METADATA = _words("size", "version_size", "version_extension", "version", "traits", "state")
_ARRAY = _words("type", "count", "data")
_ERROR = _words("size", "extension", "message", "code")
_FRAME_SIZE, _ARGS_SIZE, _ATTRS_SIZE, _BUFFER_SIZE = _FRAME.itemsize, 40, 48, _BUFFER.itemsize

_TABLE = _words(
    *("forward", "backward"),  # what a handler calls; first a Python function that compiles it
    *(f"{pass_}_{kind}" for kind in KINDS for pass_ in ("forward", "backward")),  # the kernel's bodies, 0 until compiled
    *("prepare", "starters", "limit", "madvise"),
    *("failed", "layout", "uncompiled"),  # messages
)
TABLE = np.zeros(1, _TABLE)
"""The addresses of this process that the handlers need."""
_TABLE_AT = int(TABLE.ctypes.data)

_OK, _LAYOUT, _UNCOMPILED = 1, 2, 3
"""What a compiled pass returns; 0 where Numba's code raised, as without memory, which it cannot tell otherwise."""

_MESSAGES = {
    "failed": "multibn: the CPU kernel failed, most likely for lack of memory; what it said stands on stderr.",
    "layout": (
        f"multibn: the call frame of jaxlib {jaxlib.version.__version__} differs from the one that multibn_jax knows. Use a "
        "version of jax that multibn_jax was tested with, or implementation='framework'."
    ),
    "uncompiled": "multibn: the CPU kernel could not be compiled; the reason stands on stderr.",
}
_INTERNAL = 13
"""``XLA_FFI_Error_Code``."""


@intrinsic
def _called(_: Any, address: Any, arguments: Any) -> Any:  # pragma: no cover - runs in the compiler
    """What the C function at an address returns for a tuple of integers."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        given = unpack_tuple(builder, values[1])
        function = ir.FunctionType(word, [word] * len(given)).as_pointer()
        return builder.call(builder.inttoptr(values[0], function), given)

    return types.int64(types.int64, arguments), generate


@inner
def _record(address: int, kind: Any) -> Any:
    """The struct at an address."""
    return carray(pointer(address), 1, kind)[0]


@inner
def _integers(address: int, count: int) -> Any:
    return carray(pointer(address), count, np.int64)


@inner
def _describes(frame_at: int) -> bool:
    """Whether XLA asks for the version that the handler was written for, which is answered, rather than calls it."""
    frame = _record(frame_at, _FRAME)
    if frame.extension == 0:
        return False
    extension = _record(frame.extension, _EXTENSION)
    if extension.type & 0xFFFFFFFF != 1:
        return False
    metadata = _record(extension.metadata, _METADATA)
    metadata.version = _record(frame.api, _API).version  # whatever it is: each call checks the sizes of the structs
    metadata.traits = 0
    return True


@inner
def _known(frame_at: int, args: int, rets: int) -> bool:
    """Whether the structs of a call have the sizes, and the buffers the count, that are read here."""
    frame = _record(frame_at, _FRAME)
    known: bool = (
        frame.size >= _FRAME_SIZE
        and frame.args_size == _ARGS_SIZE
        and frame.rets_size == _ARGS_SIZE
        and frame.attrs_size == _ATTRS_SIZE
        and frame.args_count == args
        and frame.rets_count == rets
        and frame.attrs_count == 1
        and _record(_integers(frame.args, 1)[0], _BUFFER).size == _BUFFER_SIZE
    )
    return known


@inner
def _at(list_: int, i: int) -> int:
    """Where the values of a buffer are."""
    address: int = _record(_integers(list_, i + 1)[i], _BUFFER).data
    return address


@inner
def _settings(frame_at: int) -> Any:
    """The one attribute, an array of float64."""
    its = _record(_integers(_record(frame_at, _FRAME).attrs, 1)[0], _ARRAY)
    return carray(pointer(its.data), its.count, np.float64)


@inner
def _shape(list_: int) -> tuple[int, int, int, int]:
    """How many BatchNorms lie one after the other (vmap), and N, C, S of each."""
    its = _record(_integers(list_, 1)[0], _BUFFER)
    dims = _integers(its.dims, its.rank)
    count = 1
    for i in range(its.rank - 3):
        count *= dims[i]
    return count, dims[its.rank - 3], dims[its.rank - 2], dims[its.rank - 1]


@inner
def _sizes(kind: int) -> tuple[int, int]:
    """Bytes of a value of the input, and of one of the parameters."""
    return (8, 8) if kind == 12 else (4, 4) if kind == 11 else (2, 4)


@inner
def _body(table_at: int, kind: int, backward: bool) -> int:
    """The address of the kernel's compiled loops for a type of input, compiled if need be; 0 if that fails."""
    table = _record(table_at, _TABLE)
    for attempt in range(2):
        if kind == 10:
            address = table.backward_float16 if backward else table.forward_float16
        elif kind == 16:
            address = table.backward_bfloat16 if backward else table.forward_bfloat16
        elif kind == 11:
            address = table.backward_float32 if backward else table.forward_float32
        else:
            address = table.backward_float64 if backward else table.forward_float64
        if address != 0 or attempt == 1:
            break
        call(table.prepare, (kind,))
    return address


@inner
def _team(table_at: int, body: int, size: int) -> tuple[int, int, int, int]:
    """Who does the call, as ``multibn.kernel.entry.team`` says."""
    table = _record(table_at, _TABLE)
    awake = _integers(table.starters, 1)[0] != 0
    return body, table.starters, table.limit if size >= (SERIAL if awake else CREATING) else 1, LARGE


@inner
def _advise(table_at: int, address: int, nbytes: int) -> None:
    """Ask for huge pages for a large output."""
    madvise = _record(table_at, _TABLE).madvise
    if nbytes >= ADVISED and madvise != 0:
        start = -(-address // HUGE_PAGE) * HUGE_PAGE
        call(madvise, (start, (address + nbytes - start) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE))


@inner
def _copy(source: int, target: int, nbytes: int) -> None:
    if source != target:  # XLA may write an output over the input that it replaces
        carray(pointer(target), nbytes, np.uint8)[:] = carray(pointer(source), nbytes, np.uint8)


@inner
def _read(frame_at: int, table_at: int, args: int, rets: int, backward: bool) -> Any:
    """Read a call that has this many arguments and results.

    Returns (status, address of the kernel's loops, addresses of the lists of arguments and of results, number of BatchNorms under
    vmap, (N, C, S) of each, bytes of a value of the input, bytes of a parameter). Unless the status is ``_OK``, the rest is 0.
    """
    if not _known(frame_at, args, rets):
        return _LAYOUT, 0, 0, 0, 0, (0, 0, 0), 0, 0
    frame = _record(frame_at, _FRAME)
    kind = np.int64(_record(_integers(frame.args, 1)[0], _BUFFER).kind)
    body = _body(table_at, kind, backward)
    if body == 0:
        return _UNCOMPILED, 0, 0, 0, 0, (0, 0, 0), 0, 0
    count, n, channels, s = _shape(frame.args)
    size_x, size_p = _sizes(kind)
    return _OK, body, frame.args, frame.rets, count, (n, channels, s), size_x, size_p


def _forward(frame_at: int, table_at: int) -> int:
    """x, gamma, beta, moving mean, moving var, batches -> y, statistics, new mean, new var."""
    status, body, args, rets, count, shape, size_x, size_p = _read(frame_at, table_at, 6, 4, False)
    if status != _OK:
        return status
    how, channels, size = _settings(frame_at), shape[1], shape[0] * shape[1] * shape[2]
    batches = carray(pointer(_at(args, 5)), count, np.int32)
    _copy(_at(args, 3), _at(rets, 2), count * channels * size_p)
    _copy(_at(args, 4), _at(rets, 3), count * channels * size_p)
    _advise(table_at, _at(rets, 0), count * size * size_x)
    for i in range(count):
        old = batches[i] / (batches[i] + 1) if how[1] < 0 else how[1]
        p, q = i * channels * size_p, i * size * size_x
        forward_at(
            _team(table_at, body, size), shape, _at(args, 0) + q, _at(rets, 0) + q, _at(args, 1) + p, _at(args, 2) + p,
            _at(rets, 2) + p, _at(rets, 3) + p, _at(rets, 1) + i * channels * 16, 0,
            how[0], old, how[2] != 0, how[3] != 0, how[4] != 0, False,
        )  # fmt: skip
    return _OK


def _backward(frame_at: int, table_at: int) -> int:
    """x, dy, gamma, statistics -> dx, dgamma, dbeta."""
    status, body, args, rets, count, shape, size_x, size_p = _read(frame_at, table_at, 4, 3, True)
    if status != _OK:
        return status
    how, channels, size = _settings(frame_at), shape[1], shape[0] * shape[1] * shape[2]
    _advise(table_at, _at(rets, 0), count * size * size_x)
    for i in range(count):
        p, q = i * channels * size_p, i * size * size_x
        backward_at(
            _team(table_at, body, size), shape, _at(args, 0) + q, _at(args, 1) + q, _at(rets, 0) + q, _at(args, 2) + p,
            _at(args, 2) + p, _at(args, 3) + i * channels * 16, _at(rets, 1) + p, _at(rets, 2) + p, how[0] != 0, False,
        )  # fmt: skip
    return _OK


@inner
def _error(frame_at: int, message: int) -> int:
    """An error that XLA raises as ``XlaRuntimeError``; its address."""
    error = np.zeros(4, np.int64)
    its = _record(error.ctypes.data, _ERROR)
    its.size, its.message, its.code = 28, message, _INTERNAL
    made: int = _called(_record(_record(frame_at, _FRAME).api, _API).create_error, (error.ctypes.data,))
    keep(error)
    return made


@inner
def _handle(frame_at: int, table_at: int, backward: bool) -> int:
    """Answer XLA: 0, or the address of an error."""
    if _describes(frame_at):
        return 0
    table = _record(table_at, _TABLE)
    if table.backward == 0 or table.forward == 0:
        call(table.prepare, (0,))
    function = table.backward if backward else table.forward
    status = _UNCOMPILED if function == 0 else _called(function, (frame_at, table_at))
    if status == _OK:
        return 0
    message = table.layout if status == _LAYOUT else table.uncompiled if status == _UNCOMPILED else table.failed
    return _error(frame_at, message)


_KEPT: list[Any] = []
"""What compiled code has the addresses of."""
_preparing = threading.RLock()


def prepare(kind: str | None = None) -> None:
    """Compile the passes, and with a type of input the kernel for it, or load them from disk."""
    if TABLE[0]["forward"] and (kind is None or TABLE[0][f"backward_{kind}"]):
        return
    with _preparing:
        if not TABLE[0]["forward"]:
            TABLE["starters"], TABLE["limit"] = threads.starters(), threads.limit()
            signature = types.int64(types.int64, types.int64)
            passes = {
                name: c_function(signature, body, SOURCES) for name, body in (("forward", _forward), ("backward", _backward))
            }
            _KEPT.append(passes)
            for name, compiled in passes.items():
                TABLE[name] = compiled.address
        if kind is not None:
            bodies = kernel_for(KINDS[kind])
            _KEPT.append(bodies)
            TABLE[f"forward_{kind}"], TABLE[f"backward_{kind}"] = bodies.forward.address, bodies.backward.address


@ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
def _prepare(kind: int) -> int:
    """``prepare``, called by compiled code with XLA's number of the type, or 0."""
    prepare(_XLA.get(kind))
    return 0


def _registered() -> None:
    """Let XLA know the handlers."""
    TABLE["prepare"] = ctypes.cast(_prepare, ctypes.c_void_p).value
    if sys.platform == "linux":
        TABLE["madvise"] = ctypes.cast(ctypes.CDLL(None).madvise, ctypes.c_void_p).value
    for name, text in _MESSAGES.items():
        message = ctypes.create_string_buffer(text.encode())
        _KEPT.append(message)
        TABLE[name] = ctypes.addressof(message)
    place = _TABLE_AT

    @cfunc(types.int64(types.int64))
    def forward(frame_at: int) -> Any:
        return _handle(frame_at, place, False)

    @cfunc(types.int64(types.int64))
    def backward(frame_at: int) -> Any:
        return _handle(frame_at, place, True)

    for target, handler in ((FORWARD, forward), (BACKWARD, backward)):
        _KEPT.append(handler)
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(ctypes.c_void_p(handler.address)), platform="cpu", api_version=1)


_registered()
