"""The pool: every piece is done, errors reach the caller, several callers and forked children are served, limits are kept to."""

from __future__ import annotations

import ctypes
import os
import threading
import time

import pytest

from multibn import threads


@pytest.fixture(params=["our own", "OpenMP's"], autouse=True)
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on each kind of threads."""
    if request.param == "our own":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.importorskip("torch", reason="nothing here brings GNU OpenMP")
        if threads._openmp() is None:
            pytest.skip("PyTorch has not loaded GNU OpenMP")


def test_every_piece_is_done_once_by_no_more_threads_than_allowed() -> None:
    done: list[tuple[int, int, int]] = []

    def work(first: int, last: int) -> None:
        time.sleep(0.001)
        done.append((first, last, threading.get_ident()))

    pieces = threads.split(100, 16)
    for count in (1, 2, 3):
        done.clear()
        threads.run(work, pieces, count)
        assert sorted((first, last) for first, last, _ in done) == pieces
        assert len({who for _, _, who in done}) == count


def test_caller_waits_for_pieces_that_others_hold() -> None:
    done = []

    def work(seconds: float) -> None:
        time.sleep(seconds)
        done.append(seconds)

    threads.run(work, [(0.0,), (0.1,), (0.0,)], 2)
    assert sorted(done) == [0.0, 0.0, 0.1]


@pytest.mark.parametrize(("count", "parts", "expected"), [
    (0, 4, [(0, 0)]),
    (1, 4, [(0, 1)]),
    (7, 3, [(0, 2), (2, 4), (4, 7)]),
    (8, 2, [(0, 4), (4, 8)]),
])  # fmt: skip
def test_split(count: int, parts: int, expected: list[tuple[int, int]]) -> None:
    assert threads.split(count, parts) == expected


@pytest.mark.parametrize("error", [ValueError("no good"), SystemExit(3)])
@pytest.mark.parametrize("count", [1, 2])
def test_an_error_is_raised_to_the_caller_and_the_pool_goes_on(error: BaseException, count: int) -> None:
    done = []

    def work(piece: int) -> None:
        if piece == 1:
            raise error
        done.append(piece)

    with pytest.raises(type(error)) as caught:
        threads.run(work, [(0,), (1,), (2,), (3,)], count)
    assert caught.value is error
    assert sorted(done) == [0, 2, 3]
    threads.run(done.append, [(5,), (6,)], count)
    assert sorted(done) == [0, 2, 3, 5, 6]


def test_several_callers_at_once() -> None:
    results: dict[int, list[int]] = {i: [] for i in range(6)}

    def call(i: int) -> None:
        for _ in range(20):
            threads.run(results[i].append, [(j,) for j in range(10)], 3)

    callers = [threading.Thread(target=call, args=(i,)) for i in results]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(sorted(found) == sorted([*range(10)] * 20) for found in results.values())


def test_a_piece_may_share_out_pieces_of_its_own() -> None:
    done: list[int] = []
    threads.run(lambda i: threads.run(done.append, [(i,), (i + 10,)], 2), [(0,), (1,), (2,)], 2)
    assert sorted(done) == [0, 1, 2, 10, 11, 12]


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, 8),
    ({"OMP_NUM_THREADS": "3"}, 3),
    ({"OMP_NUM_THREADS": "4,2"}, 4),
    ({"NUMBA_NUM_THREADS": "2"}, 2),
    ({"OMP_NUM_THREADS": "3", "NUMBA_NUM_THREADS": "5"}, 3),
    ({"OMP_NUM_THREADS": "100"}, 8),
    ({"OMP_NUM_THREADS": "0", "NUMBA_NUM_THREADS": "many"}, 8),
])  # fmt: skip
@pytest.mark.parametrize("affinity", [True, False])
def test_limit(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: int, affinity: bool) -> None:
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert threads.limit() == expected


def test_a_forked_child_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What os.fork calls in the child, called here: the threads of before are not counted on. test_kernel_process.py forks."""
    for name in ("_queue", "_growing", "_parallel", "_forked"):
        monkeypatch.setattr(threads, name, getattr(threads, name))  # to be as they were afterwards
    threads.run(lambda piece: None, [(0,), (1,)], 2)
    before = list(threads._workers)
    threads._forget()
    assert threads._workers == []
    done: list[int] = []
    threads.run(done.append, [(0,), (1,), (2,)], 3)
    assert sorted(done) == [0, 1, 2]
    assert len(threads._workers) == 2, "a forked child has threads of its own, not OpenMP's"
    assert not set(before) & set(threads._workers)
    threads._workers.clear()  # they wait on this test's queue


@pytest.mark.parametrize("team", ["our own"], indirect=True)
def test_without_openmp_the_threads_are_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(threads, "_parallel", None)

    def missing(*arguments: object) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert threads._openmp() is None
