"""Reuse the memory of large outputs, because fresh memory costs more than the arithmetic: the system clears each page first.

``take`` lends memory; when nobody refers to it any more it is kept for the next output of about that size. What is kept is
bounded: together with what is lent it stays under ``SLACK`` times the most that was lent lately, so a program that never needs
much never keeps much, and it stays under ``limit()``. ``release()`` returns all of it to the system.

>>> set_limit(256 << 20)
>>> limit() >> 20
256
>>> release()
>>> kept()
0
"""

from __future__ import annotations

import atexit
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
"""Bytes of a cache line, at which lent memory begins, as PyTorch's own does: convolutions are much slower on unaligned memory."""

SLACK = 1.25
"""What is lent and kept together is at most so many times the most that was lent lately."""

LATELY = 2048
"""Loans in a window: "lately" is the current window and the one before it, at least one training step of a large network."""

WIDER = 4
"""Size classes, from its own upwards, in which a loan looks for a block once the bound is reached; there are 8 per doubling."""

_limit = 1 << 30
_kept: OrderedDict[int, list[Any]] = OrderedDict()
"""Size -> blocks of that size, the size that came back least lately first."""
_kept_bytes = 0
_lent_bytes = _most_lent = _most_lent_before = _loans = 0
_keeping = threading.RLock()  # a block may come back, by garbage collection, while another is being kept


class _Loan(weakref.ref[Array]):
    """Calls ``_keep`` when nobody refers to an array any more; like ``weakref.finalize``, in a fraction of the time."""

    __slots__ = ("block",)
    block: Any


_out: dict[int, _Loan] = {}
"""What is lent, by the id of the loan."""


def limit() -> int:
    """Return how many bytes are kept at most, however much is lent; 1 GiB unless ``set_limit`` changed it."""
    return _limit


def set_limit(nbytes: int) -> None:
    """Keep at most so many bytes from now on; 0 keeps nothing.

    Raises:
        TypeError: nbytes is not an integer.
        ValueError: nbytes is negative.
    """
    global _limit
    if isinstance(nbytes, bool) or not isinstance(nbytes, int):
        raise TypeError(f"nbytes must be an int, a number of bytes, got {nbytes!r}.")
    if nbytes < 0:
        raise ValueError(f"nbytes must be at least 0, got {nbytes}.")
    with _keeping:
        _limit = nbytes
        _shrink(nbytes)


def kept() -> int:
    """Return how many bytes are kept for later outputs."""
    return _kept_bytes


def lent() -> int:
    """Return how many bytes are lent: the memory of outputs that somebody still refers to."""
    return _lent_bytes


def release() -> None:
    """Return all memory that is kept to the system, and forget what was lent lately. What is lent stays valid."""
    global _most_lent, _most_lent_before
    with _keeping:
        _shrink(0)
        _most_lent = _most_lent_before = _lent_bytes


def advise(address: int, nbytes: int, least: int = HUGE) -> None:
    """Ask for huge pages for a fresh output of ``least`` bytes or more before it is first written; faults then cost a fifth.

    On Linux only.
    """
    if nbytes >= least:
        _madvise(address, nbytes, "MADV_HUGEPAGE")


def take(nbytes: int) -> Array:
    """Lend memory of so many bytes, uint8; it comes back by itself when nobody refers to the array or a view of it."""
    global _kept_bytes, _lent_bytes, _most_lent, _most_lent_before, _loans
    step = 1 << max(nbytes.bit_length() - 4, 6)
    size = -(-nbytes // step) * step
    with _keeping:
        block = _found(size, step)
        if block is not None:
            size = len(block)
            _kept_bytes -= size
        _loans += 1
        if _loans % LATELY == 0:
            _most_lent_before, _most_lent = _most_lent, _lent_bytes
        _lent_bytes += size
        _most_lent = max(_most_lent, _lent_bytes)
    try:
        block = _fresh(size) if block is None else block
        lent = np.frombuffer(block, np.uint8, nbytes)
        loan = _Loan(lent, _keep)
    except BaseException:
        with _keeping:
            _lent_bytes -= size
        raise
    loan.block = block
    _out[id(loan)] = loan
    return lent


def _found(size: int, step: int) -> Any:
    """A kept block of this size, or where a fresh one would exceed the bound, of one of the next sizes."""
    blocks = _kept.get(size)
    if blocks:
        return blocks.pop()
    if _kept_bytes and _kept_bytes + _lent_bytes + size > _bound():
        for wider in range(size + step, size + WIDER * step, step):
            blocks = _kept.get(wider)
            if blocks:
                return blocks.pop()
    return None


def _bound() -> float:
    """Bytes that may be lent and kept together."""
    return SLACK * max(_most_lent, _most_lent_before)


def _fresh(nbytes: int) -> Any:
    if hasattr(mmap, "MAP_PRIVATE"):  # unlike the allocator's, its pages return to the system at once; not shared with a fork
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if nbytes >= HUGE:
            advise(np.frombuffer(block, np.uint8).ctypes.data, nbytes)
        return block
    room = np.empty(nbytes + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + nbytes].data


def _keep(loan: _Loan) -> None:
    global _kept_bytes, _lent_bytes
    block = _out.pop(id(loan)).block
    size = len(block)
    if size >= HUGE:  # for less, asking costs more than it may give back
        _madvise(np.frombuffer(block, np.uint8).ctypes.data, size, "MADV_FREE")
    with _keeping:
        _lent_bytes -= size
        _kept.setdefault(size, []).append(block)
        _kept.move_to_end(size)
        _kept_bytes += size
        _shrink(min(_limit, _bound() - _lent_bytes))


def _shrink(nbytes: float) -> None:
    """Free blocks, of the size that came back least lately first, until no more than so many bytes are kept."""
    global _kept_bytes
    while _kept_bytes > max(nbytes, 0):
        size, blocks = next(iter(_kept.items()))
        if blocks:
            blocks.pop(0)
            _kept_bytes -= size
        else:
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

atexit.register(_out.clear)  # what is alive at exit must not come back to a module that is being taken down

_libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
