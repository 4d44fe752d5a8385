"""Threads and memory for the kernel: a pool that survives fork and serves several callers, and huge pages for fresh outputs.

The pool is Python's, not Numba's: compiled code releases the GIL, so plain threads run it in parallel; Numba's own layers die in
a forked child (OpenMP) or are not safe for two callers (workqueue).
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

HUGE = 32 << 20
"""Fresh outputs from this many bytes on are worth huge pages: below, the allocator hands out memory that was touched before."""

_Task = Callable[[], None]
_queue: SimpleQueue[_Task] = SimpleQueue()
_workers: list[threading.Thread] = []
_growing = threading.Lock()


def limit() -> int:
    """Threads that a call may use: the least of this process's processors, OMP_NUM_THREADS and NUMBA_NUM_THREADS."""
    least = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0]
        if value.isdigit() and int(value) > 0:
            least = min(least, int(value))
    return least


def run(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]], threads: int) -> None:
    """Call ``function(*piece)`` for every piece, on the caller's thread and up to ``threads - 1`` others."""
    waiting = iter(pieces)  # next() on it is atomic under the GIL
    done: SimpleQueue[BaseException | None] = SimpleQueue()

    def help_out() -> None:
        for piece in waiting:
            try:
                function(*piece)
            except BaseException as error:
                done.put(error)
            else:
                done.put(None)

    helpers = min(threads, len(pieces)) - 1
    if helpers > 0:
        _grow(helpers)
    for _ in range(helpers):
        _queue.put(help_out)
    help_out()  # a helper that comes too late finds nothing left, and nobody waits for it
    errors = [error for _ in pieces if (error := done.get()) is not None]
    if errors:
        raise errors[0]


def split(count: int, parts: int) -> list[tuple[int, int]]:
    """0..count in at most ``parts`` ranges of nearly equal length."""
    parts = max(1, min(count, parts))
    edges = [count * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


def advise(address: int, nbytes: int) -> None:
    """Ask for huge pages for a large fresh output before it is first written; faults then cost a fifth. On Linux only."""
    if nbytes >= HUGE and _madvise is not None:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        _madvise(start, (address + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


def _grow(count: int) -> None:
    while len(_workers) < count:
        with _growing:
            if len(_workers) < count:
                worker = threading.Thread(target=_work, args=(_queue,), name="multibn", daemon=True)
                worker.start()
                _workers.append(worker)


def _work(queue: SimpleQueue[_Task]) -> None:
    while True:
        queue.get()()


def _forget() -> None:
    """In a forked child the threads are gone and the locks may be held by them: begin anew."""
    global _queue, _growing
    _queue, _growing = SimpleQueue(), threading.Lock()
    _workers.clear()


def _find_madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


_madvise = _find_madvise()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
