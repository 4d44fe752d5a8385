"""Threads of compiled code: the requested number, from OpenMP or the system, within the limits."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import Any

import numpy as np
import pytest
from numba import njit

from multibn.kernel import entry as kernel
from multibn.kernel import schedule, threads
from multibn.layer.types import Array

GROUPS, STAGED = (2, 4096, 64), (70, 3, 37 * 39)
"""Enough groups to give each thread some, and too few."""
STAGE, NUMBER = (schedule.CALL.fields[name][1] if schedule.CALL.fields else 0 for name in ("stage", "number"))
BODY = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)


@pytest.fixture(params=["the system's", "OpenMP's"])
def starters(request: pytest.FixtureRequest) -> Array:
    """The addresses of what starts each kind of threads."""
    if request.param == "OpenMP's" and addresses()[0] == 0:
        pytest.importorskip("torch", reason="nothing here brings GNU OpenMP")
        if addresses()[0] == 0:
            pytest.skip("PyTorch has not loaded GNU OpenMP")
    here = addresses()
    if request.param == "the system's":
        here[: len(threads.OPENMP)] = 0
    return here


def addresses() -> Array:
    """A copy of what compiled code finds at the address of ``threads.starters``."""
    return np.ctypeslib.as_array((ctypes.c_int64 * len(threads.STARTERS)).from_address(threads.starters())).copy()


def forward(body: int, starters: Array, count: int, shape: tuple[int, int, int], use_batch: bool = True) -> Array:
    """Return y, saved and the moving statistics of a forward with a body and this many threads."""
    x = np.random.default_rng(0).normal(3, 2, shape).astype(np.float32)
    y, (gamma, beta, mean, var) = np.zeros_like(x), np.ones((4, shape[1]), np.float32)
    saved = np.zeros((2, shape[1]))
    places = (a.ctypes.data for a in (x, y, gamma, beta, mean, var, saved))
    schedule.forward_at(
        (body, starters.ctypes.data, count, 1 << 60), shape, *places, 0, 1e-5, 0.9, True, use_batch, use_batch, False
    )
    return np.concatenate([y.ravel(), saved.ravel(), mean, var])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "use_batch", "stages"), [(GROUPS, True, [0]), (STAGED, True, [1, 2, 3]), (STAGED, False, [2, 3])]
)
def test_every_stage_is_run_by_so_many_threads(
    starters: Array, count: int, shape: tuple[int, int, int], use_batch: bool, stages: list[int]
) -> None:
    seen: list[tuple[int, int]] = []

    def body(address: int) -> int:
        stage = ctypes.c_int64.from_address(address + STAGE).value
        seen.append((stage, threading.get_native_id()))
        time.sleep(0.02)  # so that the others begin before this one could be used again
        return 0

    wrapped = BODY(body)
    forward(ctypes.cast(wrapped, ctypes.c_void_p).value or 0, starters, count, shape, use_batch)
    expected = [0] if count == 1 else [stage for stage in stages for _ in range(1 if stage == 2 else count)]
    assert [stage for stage, _ in seen] == expected, "a stage begins when all have done the one before"
    for stage in stages if count > 1 else [0]:
        who = [thread for at, thread in seen if at == stage]
        assert len(set(who)) == len(who)


@pytest.mark.parametrize("shape", [GROUPS, STAGED])
@pytest.mark.parametrize("count", [2, 3, 16])
def test_threads_give_the_bits_of_one(starters: Array, count: int, shape: tuple[int, int, int]) -> None:
    body = kernel.prepare(np.float32).forward.address
    alone, together = forward(body, starters, 1, shape), forward(body, starters, count, shape)
    assert alone.tobytes() == together.tobytes()


claimed: Any = njit(lambda address, seat: schedule.claimed(address, seat))
seat: Any = njit(lambda address: schedule.seat_of_a_thread(address))


def described(shares: int, pieces: int, count: int, number: int = 0) -> Array:
    """Return the descriptor of a stage, and behind it the counters of the shares."""
    memory = np.zeros(schedule.CALL.itemsize // 8 + shares, np.int64)
    its = memory[: schedule.CALL.itemsize // 8].view(schedule.CALL)
    its["threads"], its["pieces"], its["count"], its["number"] = shares, pieces, count, number
    its["taken"] = memory.ctypes.data + schedule.CALL.itemsize
    return memory


def test_a_thread_takes_its_own_share_and_then_what_others_left() -> None:
    memory = described(3, 7, 14)
    taken = [claimed(memory.ctypes.data, each) for each in (1, 1, 1, 0, 1, 2, 1, 0)]
    assert taken == [(4, 6), (6, 8), (8, 10), (0, 2), (10, 12), (12, 14), (2, 4), (0, 0)]


def test_pieces_go_to_the_thread_that_has_the_same_part_of_other_tensors() -> None:
    """By OpenMP's number, of which C returns 32 bits; else as they arrive."""
    number = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: (1 << 32) + 2)
    for function, expected in ((0, [0, 1, 2]), (ctypes.cast(number, ctypes.c_void_p).value or 0, [2, 2, 2])):
        memory = described(3, 7, 14, function)
        assert [seat(memory.ctypes.data) for _ in expected] == expected


def test_only_openmps_threads_have_openmps_numbers(starters: Array) -> None:
    seen: set[tuple[int, int]] = set()

    def body(address: int) -> int:
        stage, number = (ctypes.c_int64.from_address(address + place).value for place in (STAGE, NUMBER))
        seen.add((stage, number))
        return 0

    wrapped = BODY(body)
    forward(ctypes.cast(wrapped, ctypes.c_void_p).value or 0, starters, 2, STAGED)
    assert seen == {(1, starters[1]), (2, 0), (3, starters[1])}, "stage 2 is the caller's alone"
    assert (starters[0] == 0) == (starters[1] == 0)


def test_one_does_it_all_where_no_thread_can_be_started() -> None:
    body, nobody = kernel.prepare(np.float32).forward.address, np.zeros(len(threads.STARTERS), np.int64)
    assert forward(body, nobody, 3, STAGED).tobytes() == forward(body, nobody, 1, STAGED).tobytes()


def test_all_channels_left_by_all_threads_are_counted(starters: Array) -> None:
    """BN-11, across pieces that several threads did."""
    x = np.full(GROUPS, np.nan, np.float32)
    y, (gamma, beta, mean, var) = np.empty_like(x), np.ones((4, x.shape[1]), np.float32)
    saved = np.empty((2, x.shape[1]))
    places = (a.ctypes.data for a in (x, y, gamma, beta, mean, var, saved))
    team = (kernel.prepare(np.float32).forward.address, starters.ctypes.data, 3, 1 << 60)
    assert schedule.forward_at(team, x.shape, *places, 0, 1e-5, 0.9, True, True, True, False) == x.shape[1]


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
    monkeypatch.setattr(threads, "_asked", threads._asked.__wrapped__)
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert threads.limit() == expected


def test_a_forked_child_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What os.fork calls in the child, called here: OpenMP is not counted on. test_kernel_process.py forks."""
    monkeypatch.setattr(threads, "_openmp", threads._openmp)  # to be as it was afterwards
    place = ctypes.c_int64.from_address(threads.starters())
    before = place.value
    try:
        threads._forget()
        assert threads.starters() == ctypes.addressof(place), "compiled code has this address"
        assert place.value == 0
        assert not threads.awake()
    finally:
        place.value = before


def test_without_openmp_there_is_no_address_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    before = threads._starters[0]
    monkeypatch.setattr(threads, "_openmp", None)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    try:
        threads._starters[0] = 0
        threads.starters()
        assert threads._starters[0] == 0
        assert not threads.awake()
    finally:
        threads._starters[0] = before


@pytest.mark.parametrize(("awake", "least"), [(True, kernel.SERIAL), (False, kernel.CREATING)])
def test_threads_help_from_the_size_that_pays_for_them(awake: bool, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "awake", lambda: awake)
    monkeypatch.setattr(threads, "limit", lambda: 5)
    assert [kernel.team(0, size)[2] for size in (least - 1, least)] == [1, 5]
    assert kernel.team(0, least, 3)[2] == 3


def test_a_library_without_the_function_has_no_address_of_it() -> None:
    assert threads._address(ctypes.CDLL(None), "no_such_function") == 0
