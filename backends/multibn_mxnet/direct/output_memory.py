"""Large outputs in memory that was used before: ``multibn.memory`` for NDArrays, which MXNet itself allocates anew each time.

An NDArray over memory of ours, as MXNet takes it from other frameworks (DLPack), calls a function when its last user has let go
of it: from any thread, and perhaps while Python ends. That function is compiled, needs no Python, and only leaves a mark. What is
marked goes back when the next output is lent. Until then it stays, whatever becomes of this module.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from functools import cache
from typing import Any

import mxnet as mx
import numpy as np

from multibn.layer.types import Array
from multibn.memory import LENT, take
from multibn_mxnet.compat import LIB, DLContext, DLDataType, DLTensor, NDArrayHandle, check_call
from multibn_mxnet.operator.native import compile_give_back

_TYPES = ("float16", "float32", "float64")
_CPU = 1  # DLPack's kDLCPU
_C = ctypes.CDLL(None)
_C.malloc.restype, _C.malloc.argtypes, _C.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


class _Tensor(ctypes.Structure):
    """DLPack's DLManagedTensor; ``lent`` is its ``manager_ctx``, 0 once it is given back. The shape comes behind it."""

    _fields_ = (("tensor", DLTensor), ("lent", ctypes.c_int64), ("give_back", ctypes.c_void_p))


_out: list[tuple[int, Array]] = []
"""What is lent: where its _Tensor is, and its memory."""
_lending = threading.Lock()


def empty(shape: tuple[int, ...], context: Any, dtype: Any) -> Any:
    """``mx.nd.empty`` on a CPU, not cleared; a large one in memory that was used before."""
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    if nbytes < LENT or kind.name not in _TYPES or context.device_id != 0:  # DLPack's arrays are all on cpu(0)
        return mx.nd.empty(shape, context, dtype)
    with _lending:
        take_back()
        memory = take(nbytes)
        at = _C.malloc(ctypes.sizeof(_Tensor) + 8 * len(shape))
        tensor = _Tensor.from_address(at)
        its = (ctypes.c_int64 * len(shape)).from_address(at + ctypes.sizeof(_Tensor))
        its[:] = list(shape)
        tensor.tensor = DLTensor(
            memory.ctypes.data, DLContext(_CPU, 0), len(shape), DLDataType(*DLDataType.TYPE_MAP[kind.name]),
            ctypes.cast(its, ctypes.POINTER(ctypes.c_int64)), None, 0,
        )  # fmt: skip
        tensor.lent, tensor.give_back = 1, _give_back().address
        handle = NDArrayHandle()
        check_call(LIB.MXNDArrayFromDLPackEx(ctypes.c_void_p(at), False, ctypes.byref(handle)))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
        _out.append((at, memory))
    return mx.nd.NDArray(handle)


def take_back() -> None:
    """Let ``multibn.memory`` have what is marked."""
    _out[:] = [each for each in _out if not _returned(*each)]


def _returned(at: int, memory: Array) -> bool:
    if _Tensor.from_address(at).lent:
        return False
    _C.free(at)
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(memory))
    return True


_give_back = cache(compile_give_back)


def _forget() -> None:
    """In a forked child the lock may be held by a thread that is not there."""
    global _lending
    _lending = threading.Lock()


os.register_at_fork(after_in_child=_forget)
