"""The pool of memory for large outputs: a buffer has one user at a time and returns automatically, and the limit holds."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from multibn import memory


@pytest.fixture(autouse=True)
def _nothing_lent_and_nothing_kept(monkeypatch: Any) -> None:
    gc.collect()
    monkeypatch.setattr(memory, "_kept", type(memory._kept)())
    monkeypatch.setattr(memory, "_out", {})
    for name in ("_kept_bytes", "_lent_bytes", "_most_lent", "_most_lent_before", "_loans"):
        monkeypatch.setattr(memory, name, 0)


def address(a: Any) -> Any:
    return a.ctypes.data


def test_memory_comes_back_when_nobody_refers_to_it_any_more() -> None:
    first = memory.take(memory.LENT)
    where, view = address(first), first[8:16].view(np.float32)
    del first
    gc.collect()
    second = memory.take(memory.LENT)
    assert address(second) != where  # the view still refers to it
    del view
    gc.collect()
    assert address(memory.take(memory.LENT)) == where


def test_it_begins_at_a_cache_line() -> None:
    lent = [memory.take(nbytes) for nbytes in (memory.LENT, memory.LENT + 4, 3 * memory.LENT, memory.HUGE)]
    assert [address(a) % memory.ALIGNED for a in lent] == [0] * 4
    assert [a.nbytes for a in lent] == [memory.LENT, memory.LENT + 4, 3 * memory.LENT, memory.HUGE]


def test_no_two_have_the_same_memory() -> None:
    lent = [memory.take(memory.LENT) for _ in range(3)]
    assert len({address(a) for a in lent}) == 3
    assert address(memory.take(memory.LENT + 1)) not in {address(a) for a in lent}


MIB = 1 << 20


def test_an_output_of_about_that_size_gets_a_block_and_one_of_another_size_does_where_a_fresh_one_exceeds_the_bound() -> None:
    where = address(memory.take(16 * MIB))
    assert address(memory.take(15 * MIB + 4)) == where  # the same class of size
    assert address(memory.take(13 * MIB)) == where  # a fresh one would make 29 MiB where at most 16 were ever lent
    assert address(memory.take(8 * MIB)) != where  # half would be wasted
    assert memory.kept() == 8 * MIB  # and the block of 16 had to go: together they exceed 20 MiB


def test_what_is_kept_is_bounded_by_what_was_lent_lately(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "LATELY", 4)
    lent = [memory.take(MIB) for _ in range(8)]
    del lent
    assert (memory.kept(), memory.lent()) == (8 * MIB, 0)
    for _ in range(4):
        memory.take(2 * MIB)
    assert memory.kept() == 10 * MIB  # a window ago there were 8 MiB
    for _ in range(4):
        memory.take(2 * MIB)
    assert memory.kept() == 2 * MIB  # lately there were never more than 2


def test_many_shapes_keep_no_more_than_the_most_that_was_lent() -> None:
    most = 0
    for i in range(1000):
        pair = [memory.take(MIB + 4096 * (i % 97)), memory.take(2 * MIB + 8192 * (i % 89))]
        most = max(memory.lent(), most)
        del pair
        assert memory.kept() <= memory.SLACK * most


def test_a_limit_can_be_set_and_all_that_is_kept_can_be_released() -> None:
    before = memory.limit()
    assert before == 1 << 30
    try:
        lent = [memory.take(size * MIB) for size in (2, 1, 2, 1)]
        del lent
        assert memory.kept() == 6 * MIB
        memory.set_limit(3 * MIB)
        assert (memory.limit(), memory.kept()) == (3 * MIB, 2 * MIB)  # blocks of 2 MiB, which came back least lately, went first
        memory.take(3 * MIB)
        assert memory.kept() == 3 * MIB
        memory.set_limit(0)
        memory.take(MIB)
        assert memory.kept() == 0
    finally:
        memory.set_limit(before)
    memory.take(MIB)
    assert memory.kept() == MIB
    memory.release()
    assert memory.kept() == 0
    for _ in range(3):
        memory.take(MIB)
    assert memory.kept() == MIB  # the 6 MiB of before the release are forgotten


def test_a_wrong_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^nbytes must be at least 0, got -1\.$"):
        memory.set_limit(-1)
    with pytest.raises(TypeError, match=r"^nbytes must be an int, a number of bytes, got 1000000000.0\.$"):
        memory.set_limit(1e9)  # type: ignore[arg-type]
    assert memory.limit() == 1 << 30


def test_memory_that_cannot_be_had_counts_as_neither_lent_nor_kept(monkeypatch: Any) -> None:
    def fail(nbytes: int) -> Any:
        raise MemoryError

    memory.take(MIB)
    monkeypatch.setattr(memory, "_fresh", fail)
    with pytest.raises(MemoryError):
        memory.take(64 * MIB)
    assert (memory.kept(), memory.lent()) == (MIB, 0)


RSS = """
import gc
from multibn import memory
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
before = rss()
lent = [memory.take(8 << 20) for _ in range(20)]
for each in lent:
    each[:] = 1
during = rss()
del lent, each
memory.release()
print(during - before, rss() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_what_is_released_is_resident_no_longer() -> None:
    found = subprocess.run([sys.executable, "-c", RSS], check=True, capture_output=True, text=True, timeout=120).stdout
    during, after = map(int, found.split())
    assert during >= 160
    assert after < 10


def test_an_output_that_lives_until_the_end_of_the_process_ends_without_a_word() -> None:
    program = "import builtins; from multibn import memory; builtins.kept = [memory.take(memory.HUGE)]"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert found.stderr == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_writes_to_memory_of_its_own() -> None:
    lent = memory.take(MIB)
    lent[:] = 1
    pid = os.fork()
    if pid == 0:
        lent[:] = 2
        os._exit(0)
    os.waitpid(pid, 0)
    assert lent.max() == 1


@pytest.fixture
def asked(monkeypatch: Any) -> Any:
    calls = []

    class Libc:
        @staticmethod
        def madvise(start: Any, length: Any, advice: Any) -> Any:
            calls.append((start.value, length.value, advice))

    monkeypatch.setattr(memory, "_libc", Libc)
    return calls


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")
def test_large_memory_is_advised_in_whole_pages(asked: Any) -> None:
    page = mmap.PAGESIZE
    memory.advise(page, memory.HUGE - 1)
    assert asked == []
    memory.advise(page + 16, memory.HUGE)
    assert asked == [(2 * page, memory.HUGE - page, mmap.MADV_HUGEPAGE)]


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="this system cannot be told that memory is free")
def test_large_memory_that_came_back_is_free_for_the_system(asked: Any) -> None:
    memory.take(memory.HUGE)
    assert [advice for _, _, advice in asked] == [mmap.MADV_HUGEPAGE, mmap.MADV_FREE]


def test_without_a_system_to_ask_nothing_is_asked(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "_libc", None)
    memory.advise(mmap.PAGESIZE, memory.HUGE)


def test_a_forked_child_begins_with_a_new_lock(monkeypatch: Any) -> None:
    """Call what os.fork calls in the child, where a lock may be held by a thread that does not exist."""
    before = memory._keeping
    monkeypatch.setattr(memory, "_keeping", before)  # to be as it was afterwards
    memory._forget()
    assert memory._keeping is not before
