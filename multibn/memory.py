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

from .layer import Array

HUGE = 32 << 20
"""Outputs from this many bytes on are worth huge pages: below, the allocator hands out memory that was touched before."""

LENT = 1 << 20
"""Outputs from this many bytes on are worth taking from here."""

ALIGNED = 64
"""Bytes of a cache line, at which what is lent begins, as PyTorch's own memory does: convolutions take much longer on other."""

KEPT = 1 << 30
"""So many bytes are kept at most."""

_kept: OrderedDict[int, list[Array]] = OrderedDict()
_keeping = threading.RLock()  # a block may come back, by garbage collection, while another is being kept


def advise(address: int, nbytes: int) -> None:
    """Ask for huge pages for a large fresh output before it is first written; faults then cost a fifth. On Linux only."""
    if nbytes >= HUGE:
        _madvise(address, nbytes, "MADV_HUGEPAGE")


def take(nbytes: int) -> Array:
    """Memory of so many bytes, uint8; it comes back by itself when nobody refers to the array any more (views do)."""
    with _keeping:
        blocks = _kept.get(nbytes)
        block = blocks.pop() if blocks else None
    block = _fresh(nbytes) if block is None else block
    lent = np.frombuffer(block.data, np.uint8)
    weakref.finalize(lent, _keep, block).atexit = False
    return lent


def release() -> None:
    """Give everything that is kept back to the system."""
    with _keeping:
        _kept.clear()


def _fresh(nbytes: int) -> Array:
    room = np.empty(nbytes + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    block = room[start : start + nbytes]
    advise(block.ctypes.data, nbytes)
    return block


def _keep(block: Array) -> None:
    if block.nbytes >= HUGE:  # for less, asking costs more than it may give back
        _madvise(block.ctypes.data, block.nbytes, "MADV_FREE")
    with _keeping:
        _kept.setdefault(block.nbytes, []).append(block)
        _kept.move_to_end(block.nbytes)
        while sum(size * len(blocks) for size, blocks in _kept.items()) > KEPT:
            size = next(iter(_kept))  # the one that was lent least lately
            _kept[size] = _kept[size][1:]
            if not _kept[size]:
                del _kept[size]


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
