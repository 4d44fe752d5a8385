"""Threads for the kernel's compiled code: how many a call may use, and the C functions that start them.

Where a framework has loaded GNU OpenMP, its threads are used: they are awake, and threads of our own would fight with them for
the processors while they wait for the framework's next operator. Otherwise, and in a forked child, whose OpenMP is dead, the
system's threads are started for each call. Numba's own layers do neither: they bring an OpenMP of their own and die in a forked
child, or are not safe for two callers at once. Python's would wait for each other's lock before they begin.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import numpy as np

STARTERS = ("GOMP_parallel", "pthread_create", "pthread_join")
"""What ``starters`` has the addresses of."""


def limit() -> int:
    """Threads that a call may use: the least of this process's processors, OMP_NUM_THREADS and NUMBA_NUM_THREADS."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _at_most("OMP_NUM_THREADS", within(present))


def within(asked: int) -> int:
    """As many as asked for, but no more than NUMBA_NUM_THREADS."""
    return _at_most("NUMBA_NUM_THREADS", asked)


def _at_most(variable: str, count: int) -> int:
    asked = _asked(variable)
    return count if asked is None else min(count, asked)


@cache
def _asked(variable: str) -> int | None:
    """What a variable of the environment says; what is changed later counts no more than it does for OpenMP and Numba."""
    value = os.environ.get(variable, "").split(",")[0]
    return int(value) if value.isdigit() and int(value) > 0 else None


def starters() -> int:
    """Where the addresses of STARTERS stand for compiled code to read, each an int64, 0 for what there is not."""
    global _openmp
    if _openmp is None and hasattr(os, "RTLD_NOLOAD"):
        try:
            _openmp = ctypes.CDLL("libgomp.so.1", os.RTLD_NOLOAD | os.RTLD_NOW)
            _starters[0] = _address(_openmp, STARTERS[0])
        except OSError:  # not loaded yet
            pass
    return _place


def awake() -> bool:
    """Whether there are threads that need not be created first; ``starters`` has looked."""
    return _openmp not in (None, _libc)


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 if hasattr(library, name) else 0


def _forget() -> None:
    """In a forked child OpenMP's threads are gone, and it waits for them for ever."""
    global _openmp
    _openmp = _libc
    _starters[0] = 0


_libc = ctypes.CDLL(None) if os.name == "posix" else None
_openmp: ctypes.CDLL | None = None
"""GNU OpenMP; in a forked child a library that is not it, so that it is not looked for again."""
_starters = np.array([0, *(_address(_libc, name) if _libc else 0 for name in STARTERS[1:])], np.int64)
_place: int = _starters.ctypes.data

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
