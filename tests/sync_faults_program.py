"""Programs of the ranks of tests/test_sync_faults.py: rank 1 does something different, and all ranks must raise."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import Checks, over_gloo

from multibn.sync import SyncError
from multibn_torch import SyncBatchNorm

SECONDS = 4
"""Timeout of the group of which a rank does not come."""

check = Checks()


def program(rank: int, size: int, folder: Path) -> dict[str, str]:
    return over_gloo(check, rank, size, folder)


def dies(rank: int, size: int, folder: Path) -> str | None:
    """One rank is killed between a forward and its backward."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=20)
    )
    its = SyncBatchNorm(3)
    its.name = "bn"
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = its(x)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    said = raised(lambda: y.sum().backward(), SyncError)
    assert time.monotonic() - start < 10
    assert x.grad is None
    return said


def raised(function: Callable[[], Any], kind: type[Exception]) -> str:
    """The message of the error that a function must raise."""
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError("no error")


def layers(count: int = 1, seconds: float = 60, **keywords: Any) -> list[SyncBatchNorm]:
    """Make layers of a new group, and run each once."""
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    made = [SyncBatchNorm(**{"num_features": 4, **keywords}, process_group=group) for _ in range(count)]
    for i, its in enumerate(made):
        its.name = f"bn{i}"
        its(torch.randn(3, 4, 5, 5))
    return made


def state(its: Any) -> list[bytes]:
    return [t.numpy().tobytes() for t in its.buffers()]


WORDS = "forward, 4 channels, float32, eps 1e-05, batch statistics, update by unbiased variance, weight of old 0.9"


NOT_THE_SAME = (
    "the 3 ranks are not at the same pass of the same layer with the same settings, so none went on, and nothing was "
    "changed (SY-07)"
)


def refused(its: SyncBatchNorm, said: str, *, ours: str, others: str, mine: str, last: str = "no gradient for x") -> None:
    """The message where rank 1 (``ours``) differs from ranks 0 and 2 (``others``)."""
    assert said == (f"{mine}: {NOT_THE_SAME}. ranks 0, 2: {others}, {last}; rank 1: {ours}, {last}")


def disagree(
    rank: int, its: SyncBatchNorm, function: Callable[[], Any], other: str, again: Callable[[], Any] | None = None
) -> None:
    before = state(its)
    words = f"bn0, {WORDS}"
    said = raised(function, SyncError)
    refused(its, said, ours=other, others=words, mine=other if rank == 1 else words)
    assert state(its) == before
    if again is not None:
        again()


@check
def other_channels(rank: int, size: int) -> None:
    (its,) = layers()
    if rank == 1:
        wide = SyncBatchNorm(70, process_group=its.process_group)
        wide.name = "bn0"
        disagree(rank, wide, lambda: wide(torch.randn(3, 70, 5, 5)), f"bn0, {WORDS}".replace("4 channels", "70 channels"))
    else:
        disagree(rank, its, lambda: its(torch.randn(3, 4, 5, 5)), f"bn0, {WORDS}".replace("4 channels", "70 channels"))
    its(torch.randn(3, 4, 5, 5))


@check
def other_type(rank: int, size: int) -> None:
    (its,) = layers()
    x = torch.randn(3, 4, 5, 5)
    if rank == 1:
        its.double()
        x = x.double()
    disagree(rank, its, lambda: its(x), f"bn0, {WORDS}".replace("float32", "float64"))
    its.float()(x.float())


@check
def other_eps(rank: int, size: int) -> None:
    (its,) = layers()
    its.eps = 1e-3 if rank == 1 else 1e-5
    disagree(rank, its, lambda: its(torch.randn(3, 4, 5, 5)), f"bn0, {WORDS}".replace("1e-05", "0.001"))
    its.eps = 1e-5
    its(torch.randn(3, 4, 5, 5))


@check
def other_momentum(rank: int, size: int) -> None:
    (its,) = layers()
    its.momentum = 0.5 if rank == 1 else 0.1
    disagree(rank, its, lambda: its(torch.randn(3, 4, 5, 5)), f"bn0, {WORDS}".replace("0.9", "0.5"))


@check
def other_switch(rank: int, size: int) -> None:
    (its,) = layers()
    its.freeze_statistics(rank == 1)
    disagree(
        rank,
        its,
        lambda: its(torch.randn(3, 4, 5, 5)),
        "bn0, forward, 4 channels, float32, eps 1e-05, batch statistics, no update",
    )


@check
def another_layer(rank: int, size: int) -> None:
    first, second = layers(2)
    its = second if rank == 1 else first
    disagree(rank, its, lambda: its(torch.randn(3, 4, 5, 5)), f"bn1, {WORDS}")
    for each in (first, second):
        each(torch.randn(3, 4, 5, 5))


@check
def another_pass(rank: int, size: int) -> None:
    (its,) = layers()
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    y = its(x)
    before = state(its)
    said = raised((lambda: y.sum().backward()) if rank == 1 else (lambda: its(x)), SyncError)
    words = f"bn0, {WORDS}"
    backward = "bn0, backward, 4 channels, float32, eps 1e-05"
    refused(its, said, ours=backward, others=words, mine=backward if rank == 1 else words, last="a gradient for x")
    assert state(its) == before
    assert x.grad is None


@check
def a_gradient_on_one_rank(rank: int, size: int) -> None:
    (its,) = layers()
    before = state(its)
    x = torch.randn(3, 4, 5, 5, requires_grad=rank == 1)
    words = f"bn0, {WORDS}"
    assert raised(lambda: its(x), SyncError) == (
        f"{words}: {NOT_THE_SAME}. ranks 0, 2: {words}, no gradient for x; rank 1: {words}, a gradient for x"
    )
    assert state(its) == before


@check
def refused_input(rank: int, size: int) -> None:
    (its,) = layers()
    for bad, kind, name, why in (
        (
            torch.randn(3, 5, 5, 5),
            RuntimeError,
            "RuntimeError",
            "expected 4 channels on axis 1, got 5 in input of shape (3, 5, 5, 5)",
        ),
        (torch.ones(3, 4, dtype=torch.int64), NotImplementedError, "NotImplementedError", "expected input of type float16"),
        (torch.randn(4), ValueError, "ValueError", "expected input of rank >= 2, got rank 1, shape (4,)"),
    ):
        before = state(its)
        given = bad if rank == 1 else torch.randn(3, 4, 5, 5)
        said = raised(partial(its, given), kind if rank == 1 else SyncError)
        if rank == 1:
            assert said.startswith(why), said
        else:
            beginning = f"bn0, {WORDS}: rank 1 of 3 refused the input, so no rank went on, and nothing was changed (SY-08). "
            assert said.startswith(f"{beginning}rank 1: {name}: {why}"), said
        assert state(its) == before
        its(torch.randn(3, 4, 5, 5))  # the group stays usable


@check
def one_value_in_all(rank: int, size: int) -> None:
    (its,) = layers()
    before = state(its)
    assert raised(lambda: its(torch.randn(int(rank == 1), 4)), ValueError) == (
        "Expected more than 1 value per channel when training, got 1 on all ranks together (BN-12, SY-04): bn0. One value is its "
        "own mean, so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference."
    )
    assert state(its) == before
    its(torch.randn(1, 4))


@check
def never_comes(rank: int, size: int) -> None:
    (its,) = layers(seconds=SECONDS)
    before = state(its)
    start = time.monotonic()
    if rank == 1:
        time.sleep(SECONDS + 3.5)
        said = raised(lambda: its(torch.randn(3, 4, 5, 5)), SyncError)
        assert said.startswith(f"bn0, {WORDS}, call 2 of its channel: ranks 0, 2 of 3 gave up waiting before this rank came"), (
            said
        )
    else:
        said = raised(lambda: its(torch.randn(3, 4, 5, 5)), SyncError)
        assert said.startswith(f"bn0, {WORDS}, call 2 of its channel: rank 1 of 3 did not come, or ended, within 4."), said
        assert time.monotonic() - start < SECONDS + 3
    assert said.endswith(" Nothing was changed (SY-09).")
    assert state(its) == before
    assert "Start the processes again, or make a new group (SY-09)." in raised(lambda: its(torch.randn(3, 4, 5, 5)), SyncError)


@check
def other_mode(rank: int, size: int) -> None:
    """Inference exchanges nothing (SY-10), so the others wait for the rank until it comes with something else, or not at all."""
    (its, after) = layers(2)
    its.train(rank != 1)
    words = f"bn1, {WORDS}" if rank == 1 else f"bn0, {WORDS}"
    if rank == 1:
        its(torch.randn(3, 4, 5, 5))
    said = raised(lambda: (after if rank == 1 else its)(torch.randn(3, 4, 5, 5)), SyncError)
    refused(its, said, ours=f"bn1, {WORDS}", others=f"bn0, {WORDS}", mine=words)


@check
def wide_sums_after_narrow_ones(rank: int, size: int) -> None:
    """Values that leave the window, on one rank: a second round, and the same bits."""
    from multibn.sync import Alone
    from multibn_torch.sync.group import _shared

    (its,) = layers()
    alone = SyncBatchNorm(4, process_group=Alone())
    alone.load_state_dict(its.state_dict())
    r = np.random.default_rng(0)
    for turn in range(4):
        x = torch.from_numpy(r.standard_normal((9, 4, 5, 5)).astype("f"))
        if turn == 2:
            x[4, 1, 0, 0], x[4, 2, 0, 0] = 1e25, 1e-38
        before = _shared[its.process_group].rounds
        y = its(x[3 * rank : 3 * rank + 3])
        assert _shared[its.process_group].rounds - before == (2 if turn in (0, 2) else 1), turn
        assert y.detach().numpy().tobytes() == alone(x)[3 * rank : 3 * rank + 3].detach().numpy().tobytes()
        assert state(its) == state(alone)


@check
def a_layer_used_twice_and_in_turns(rank: int, size: int) -> None:
    from multibn_torch.sync.group import _shared

    first, second = layers(2)
    for turn in range(5):
        before = _shared[first.process_group].rounds
        for its in (first, second, first, first):
            its(torch.randn(2, 4, 3, 3))
        if turn > 1:
            assert _shared[first.process_group].rounds - before == 4, turn
