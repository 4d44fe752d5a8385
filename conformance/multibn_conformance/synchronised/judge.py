"""Compare the ranks' answers with what is right, and say what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from multibn.backend import Precision
from multibn.layer.types import Array

from .case import SyncCase
from .oracle import Expected, expected
from .perform import Answer

ULPS = 4
"""Of the largest value of a channel: what formulas in another order may round. Statistics must be right to the last bit."""

WORKING_ULPS = 256
"""Of the largest value of all channels, where arithmetic is in the type of the input; of statistics too, but for SY-02. A few
roundings, times 100: with two values per channel dx is a difference of terms that are so much larger."""


def wrong(case: SyncCase, answers: Sequence[Sequence[Answer]], precision: Precision = "exact") -> str:
    """What is wrong with the answers of the ranks of the group, "" for nothing.

    Args:
        answers: for each rank, to each step.
        precision: what the arithmetic promises.
    """
    working = precision == "working" and case.clause != "SY-02"
    wanted = expected(case)
    for number, (step, its) in enumerate(zip(case.steps, wanted, strict=True), 1):
        for rank, want in enumerate(its):
            if step.faults.get(rank) == "absent":
                continue
            problem = _compare(answers[rank][number - 1], want, case, working)
            if problem:
                return f"step {number} of {len(case.steps)}, rank {rank} of {len(case.members)}: {problem}"
    return _differing_bits(case, answers)


def _compare(answer: Answer, want: Expected, case: SyncCase, working: bool) -> str:
    if answer.moving is None:
        return "no moving statistics"
    if want.y is None and not answer.error:
        return "expected an error on every rank, got an output"
    if want.y is not None and answer.error:
        return f"expected an output, got {answer.kind}: {answer.error}"
    if case.clause == "SY-10" and want.dx is None and answer.sums:
        return f"expected no exchange in inference, got {answer.sums}"
    for name, got, right in zip(("moving_mean", "moving_var"), answer.moving, want.moving, strict=True):
        if _far(name, got, right, WORKING_ULPS) if working else not np.array_equal(got, right):
            return f"expected {name} {_some(right)} on every rank, got {_some(got)}"
    if want.y is None:
        return (
            ""
            if case.clause != "SY-09" or "rank 1" in answer.error
            else f"expected an error that names rank 1, got {answer.error}"
        )
    for name in ("y", "dx", "dgamma", "dbeta"):
        problem = _far(name, getattr(answer, name), getattr(want, name), WORKING_ULPS if working else ULPS)
        if problem:
            return problem
    return ""


def _far(name: str, got: Array | None, want: Array | None, ulps: int) -> str:
    if want is None:
        return ""
    if got is None or got.shape != want.shape or got.dtype != want.dtype:
        shape = None if got is None else (got.shape, got.dtype)
        return f"expected {name} of shape {want.shape} and type {want.dtype}, got {shape}"
    if want.size == 0:
        return ""
    axes = tuple(i for i in range(want.ndim) if i != 1) if want.ndim > 1 and ulps == ULPS else ()
    scale = (
        np.abs(np.nan_to_num(want, nan=0.0)).max(axis=axes, keepdims=True) if axes else np.abs(np.nan_to_num(want, nan=0.0)).max()
    )
    with np.errstate(invalid="ignore"):
        fine = np.abs(got.astype(np.float64) - want) <= ulps * np.finfo(want.dtype).eps * np.maximum(scale, np.abs(want))
    fine |= np.isnan(got) & np.isnan(want)
    if fine.all():
        return ""
    place = tuple(int(i) for i in np.argwhere(~fine)[0])
    count = int((~fine).sum())
    return f"expected {name}{list(place)} = {want[place]!r}, got {got[place]!r}; {count} of {fine.size} values are wrong"


def _differing_bits(case: SyncCase, answers: Sequence[Sequence[Answer]]) -> str:
    """SY-02: the same sample has the same bits wherever it is."""
    if case.clause != "SY-02":
        return ""
    for name in ("y", "dx"):
        wholes = []
        for number, step in enumerate(case.steps):
            whole = np.empty_like(step.x)
            for rank, part in enumerate(step.split):
                whole[list(part)] = getattr(answers[rank][number], name)
            wholes.append(whole)
        for number, whole in enumerate(wholes[1:], 2):
            if whole.tobytes() != wholes[0].tobytes():
                count = int((whole != wholes[0]).sum())
                return (
                    f"{count} of {whole.size} values of {name} have other bits in step {number} than in step 1, of the same batch"
                )
    return ""


def _some(values: Array) -> str:
    return np.array2string(values[:3], precision=17, separator=", ")
