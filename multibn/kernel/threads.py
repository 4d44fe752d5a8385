"""Threads for the kernel's compiled code: how many a call may use, and the C functions that start them.

Where a framework has loaded GNU OpenMP, the kernel uses its threads: OpenMP's idle threads spin for a while, so additional
threads would compete with them for processors. Otherwise, and in a forked child, where OpenMP hangs, the kernel creates system
threads for each call. Numba's threading layers are not usable: they load a second OpenMP runtime, crash in a forked child, or do
not allow concurrent callers. Python's threads would wait for the GIL before they begin.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import numpy as np

OPENMP, SYSTEM = ("GOMP_parallel", "omp_get_thread_num"), ("pthread_create", "pthread_join")
STARTERS = (*OPENMP, *SYSTEM)
"""The C functions whose addresses ``starters`` holds: those of GNU OpenMP, then the system's."""


def limit() -> int:
    """Maximum number of threads per call: the minimum of the available processors, OMP_NUM_THREADS and NUMBA_NUM_THREADS."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _at_most("OMP_NUM_THREADS", within(present))


def within(asked: int) -> int:
    """``asked`` threads, but no more than NUMBA_NUM_THREADS."""
    return _at_most("NUMBA_NUM_THREADS", asked)


def _at_most(variable: str, count: int) -> int:
    asked = _asked(variable)
    return count if asked is None else min(count, asked)


@cache
def _asked(variable: str) -> int | None:
    """The number in an environment variable, read once, as OpenMP and Numba do."""
    value = os.environ.get(variable, "").split(",")[0]
    return int(value) if value.isdigit() and int(value) > 0 else None


def starters() -> int:
    """Return the address of an int64 array that holds the addresses of the functions in STARTERS, 0 for a missing one; also look
    whether OpenMP has been loaded since.
    """
    global _openmp
    if _openmp is None and hasattr(os, "RTLD_NOLOAD"):
        try:
            _openmp = ctypes.CDLL("libgomp.so.1", os.RTLD_NOLOAD | os.RTLD_NOW)
            _starters[: len(OPENMP)] = [_address(_openmp, name) for name in OPENMP]
        except OSError:  # not loaded yet
            pass
    return _place


def awake() -> bool:
    """Whether an OpenMP thread pool exists; valid after a call of ``starters``."""
    return _openmp not in (None, _libc)


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 if hasattr(library, name) else 0


def _forget() -> None:
    """In a forked child, stop using OpenMP: its threads do not exist there, and it would wait for them forever."""
    global _openmp
    _openmp = _libc
    _starters[0] = 0


_libc = ctypes.CDLL(None) if os.name == "posix" else None
_openmp: ctypes.CDLL | None = None
"""GNU OpenMP; None if not loaded yet; libc (a sentinel) in a forked child, so that ``starters`` does not look again."""
_starters = np.array([0, 0, *(_address(_libc, name) if _libc else 0 for name in SYSTEM)], np.int64)
_place: int = _starters.ctypes.data

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
