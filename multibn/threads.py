"""Threads for the kernel. Compiled code releases the GIL, so that any threads run it in parallel.

Where a framework has loaded GNU OpenMP, its threads are used: they are awake, and threads of our own would fight with them for
the processors while they wait for the framework's next operator. Otherwise, and in a forked child, whose OpenMP is dead, it is a
pool of Python threads. Numba's own layers do neither: they bring an OpenMP of their own and die in a forked child, or are not
safe for two callers at once.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

_Task = Callable[[], None]
_queue: SimpleQueue[_Task] = SimpleQueue()
_workers: list[threading.Thread] = []
_growing = threading.Lock()
_parallel: Any = None
_forked = False


def limit() -> int:
    """Threads that a call may use: the least of this process's processors, OMP_NUM_THREADS and NUMBA_NUM_THREADS."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _at_most("OMP_NUM_THREADS", within(present))


def within(asked: int) -> int:
    """As many as asked for, but no more than NUMBA_NUM_THREADS."""
    return _at_most("NUMBA_NUM_THREADS", asked)


def _at_most(variable: str, count: int) -> int:
    value = os.environ.get(variable, "").split(",")[0]
    return min(count, int(value)) if value.isdigit() and int(value) > 0 else count


def run(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]], threads: int) -> list[Any]:
    """Call ``function(*piece)`` for every piece, on the caller's thread and up to ``threads - 1`` others.

    Returns:
        What it returned, in any order.
    """
    waiting = iter(pieces)  # next() on it is atomic under the GIL
    done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def help_out(_: object = None) -> None:
        for piece in waiting:
            try:
                done.put((function(*piece), None))
            except BaseException as error:
                done.put((None, error))

    threads = min(threads, len(pieces))
    if threads > 1 and (parallel := _openmp()) is not None:
        parallel(_OPENMP_BODY(help_out), None, threads, 0)
    elif threads > 1:
        _grow(threads - 1)
        for _ in range(threads - 1):
            _queue.put(help_out)
    help_out()  # a helper that comes too late finds nothing left, and nobody waits for it
    results = [done.get() for _ in pieces]
    for _, error in results:
        if error is not None:
            raise error
    return [result for result, _ in results]


def split(count: int, parts: int) -> list[tuple[int, int]]:
    """0..count in at most ``parts`` ranges of nearly equal length."""
    parts = max(1, min(count, parts))
    edges = [count * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


_OPENMP_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _openmp() -> Any:
    """``GOMP_parallel`` of the OpenMP library that a framework has loaded, or None."""
    global _parallel
    if _parallel is None and not _forked and hasattr(os, "RTLD_NOLOAD"):
        try:
            _parallel = ctypes.CDLL("libgomp.so.1", os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError):
            return None
        _parallel.argtypes = [_OPENMP_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        _parallel.restype = None
    return _parallel


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
    """In a forked child the threads are gone, OpenMP's too, and locks may be held by them: begin anew, with our own."""
    global _queue, _growing, _parallel, _forked
    _queue, _growing, _parallel, _forked = SimpleQueue(), threading.Lock(), None, True
    _workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
