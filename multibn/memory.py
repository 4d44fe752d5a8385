"""Memory for large outputs. Fresh memory costs more than the arithmetic: the system clears every page before it is written.

``advise`` asks for huge pages, which makes that cheaper; ``take`` lends memory that was used before, which saves it. What is not
lent is marked as free, so that the system takes it back when it needs it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np

from .layer.types import Array

HUGE = 32 << 20
"""Outputs from this many bytes on are worth huge pages: below, the allocator hands out memory that was touched before."""

LENT = 1 << 20
"""Outputs from this many bytes on are worth taking from here."""

ALIGNED = 64
"""Bytes of a cache line, at which what is lent begins, as PyTorch's own memory does: convolutions take much longer on other."""

KEPT = 1 << 30
"""So many bytes are kept at most."""

_kept: OrderedDict[int, list[memoryview]] = OrderedDict()
_kept_bytes = 0
_keeping = threading.RLock()  # a block may come back, by garbage collection, while another is being kept


class _Loan(weakref.ref[Array]):
    """Calls ``_keep`` when nobody refers to an array any more; like ``weakref.finalize``, in a fraction of the time."""

    __slots__ = ("block",)
    block: memoryview


_out: dict[int, _Loan] = {}
"""What is lent, by the id of the loan."""


def advise(address: int, nbytes: int) -> None:
    """Ask for huge pages for a large fresh output before it is first written; faults then cost a fifth. On Linux only."""
    if nbytes >= HUGE:
        _madvise(address, nbytes, "MADV_HUGEPAGE")


def take(nbytes: int) -> Array:
    """Memory of so many bytes, uint8; it comes back by itself when nobody refers to the array any more (views do)."""
    global _kept_bytes
    with _keeping:
        blocks = _kept.get(nbytes)
        block = blocks.pop() if blocks else None
        _kept_bytes -= 0 if block is None else nbytes
    block = _fresh(nbytes) if block is None else block
    lent = np.frombuffer(block, np.uint8)
    loan = _Loan(lent, _keep)
    loan.block = block
    _out[id(loan)] = loan
    return lent


def release() -> None:
    """Give everything that is kept back to the system."""
    global _kept_bytes
    with _keeping:
        _kept.clear()
        _kept_bytes = 0


def _fresh(nbytes: int) -> memoryview:
    room = np.empty(nbytes + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    advise(room.ctypes.data + start, nbytes)
    return room[start : start + nbytes].data


def _keep(loan: _Loan) -> None:
    global _kept_bytes
    block = _out.pop(id(loan)).block
    size = block.nbytes
    if size >= HUGE:  # for less, asking costs more than it may give back
        _madvise(np.frombuffer(block, np.uint8).ctypes.data, size, "MADV_FREE")
    with _keeping:
        _kept.setdefault(size, []).append(block)
        _kept.move_to_end(size)
        _kept_bytes += size
        while _kept_bytes > KEPT:
            least = next(iter(_kept))  # the size that was lent least lately
            if _kept[least]:
                _kept[least].pop(0)
                _kept_bytes -= least
            else:
                del _kept[least]


def _madvise(address: int, nbytes: int, advice: str) -> None:
    if _libc is not None and hasattr(mmap, advice):
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (address + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(length, 0)), getattr(mmap, advice))


def _forget() -> None:
    """In a forked child the lock may be held by a thread that is not there."""
    global _keeping
    _keeping = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

_libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
