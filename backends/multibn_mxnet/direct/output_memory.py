"""Reuse memory for large outputs: ``multibn.memory`` for NDArrays, because MXNet allocates fresh memory for each output.

An NDArray over our memory, which MXNet takes over by DLPack, calls a deleter when its last user has released the NDArray: from
any thread, and possibly while Python shuts down. The deleter is compiled, needs no Python, and only marks the memory. The next
call of ``empty`` returns marked memory to ``multibn.memory``. Until then the memory stays allocated, even without this module.
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
    """DLPack's DLManagedTensor; ``lent`` is its ``manager_ctx``, 0 once the memory is returned. The shape follows in memory."""

    _fields_ = (("tensor", DLTensor), ("lent", ctypes.c_int64), ("give_back", ctypes.c_void_p))


_out: list[tuple[int, Array]] = []
"""Lent memory: the address of the _Tensor, and the memory."""
_lending = threading.Lock()


def empty(shape: tuple[int, ...], context: Any, dtype: Any) -> Any:
    """``mx.nd.empty`` on a CPU, uninitialized; large NDArrays reuse memory."""
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    if nbytes < LENT or kind.name not in _TYPES or context.device_id != 0:  # DLPack places all CPU arrays on cpu(0)
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
    """Return marked memory to ``multibn.memory``."""
    _out[:] = [each for each in _out if not _returned(*each)]


def _returned(at: int, memory: Array) -> bool:
    if _Tensor.from_address(at).lent:
        return False
    _C.free(at)
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(memory))
    return True


_give_back = cache(compile_give_back)


def _forget() -> None:
    """Replace the lock in a forked child, where no thread is left to release a held lock."""
    global _lending
    _lending = threading.Lock()


os.register_at_fork(after_in_child=_forget)
