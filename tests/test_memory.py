"""Memory for large outputs: it is lent once at a time, comes back by itself, and no more of it is kept than promised."""

from __future__ import annotations

import gc
import mmap
from typing import Any

import numpy as np
import pytest

from multibn import memory
from multibn.kernel import entry as kernel


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "_kept", type(memory._kept)())
    monkeypatch.setattr(memory, "_kept_bytes", 0)


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
    assert [address(a) % 64 for a in lent] == [0] * 4
    assert [a.nbytes for a in lent] == [memory.LENT, memory.LENT + 4, 3 * memory.LENT, memory.HUGE]


def test_no_two_have_the_same_memory() -> None:
    lent = [memory.take(memory.LENT) for _ in range(3)]
    assert len({address(a) for a in lent}) == 3
    assert address(memory.take(memory.LENT + 1)) not in {address(a) for a in lent}


def test_no_more_is_kept_than_promised_and_the_oldest_goes_first(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "KEPT", 5000)
    for size in (2000, 1000, 2000, 1500):
        memory.take(size)
    assert {size: len(blocks) for size, blocks in memory._kept.items() if blocks} == {1000: 1, 2000: 1, 1500: 1}
    memory.take(4000)
    assert {size: len(blocks) for size, blocks in memory._kept.items() if blocks} == {4000: 1}
    assert memory._kept_bytes == 4000
    memory.release()
    assert not memory._kept
    assert memory._kept_bytes == 0


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


def test_a_forked_child_begins_with_new_locks(monkeypatch: Any) -> None:
    """What os.fork calls in the child, called here: a lock may be held there by a thread that is not."""
    for module, name in ((memory, "_keeping"), (kernel, "_preparing")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be as it was afterwards
        before = getattr(module, name)
        module._forget()
        assert getattr(module, name) is not before
