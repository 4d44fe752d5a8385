"""One case on one subject: compare what came with what should have come, within the bound, and say which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

import numpy as np

from multibn.array import ReferenceSubject
from multibn.layer import Array
from multibn.spec import CLAUSES

from . import bounds
from .bounds import Arithmetic
from .case import Case
from .oracle import Exact, Expected, as_input, expected
from .perform import Answer, Make, Wrong, bits_differ, perform
from .subjects import Candidate

Status = Literal["pass", "fail", "skip", "differs"]

OTHER_BITS = "got other bits in a second run, should be the same."
"""The end of a message about what is not reproducible. Where that shows first may itself be another place in every run."""


@dataclass(frozen=True)
class Judgement:
    """What came of one case on one subject.

    Args:
        subject: its name, as ``torch/kernel/cpu``.
        case, clause: what was judged.
        status: "differs" for a case that may differ, and does; it does not count.
        ulp: the worst error in ulp of the output's type, at no less than the result's scale (BN-16): single values may cancel.
        ratio: the worst error as a part of its bound.
        message: what came and what should have come, or why it was skipped; empty for "pass".
        snippet: Python that runs the case again.
        dtype: of the case's input.
    """

    subject: str
    case: str
    clause: str
    status: Status
    ulp: float = 0.0
    ratio: float = 0.0
    message: str = ""
    snippet: str = ""
    dtype: str = "float32"


class Error(NamedTuple):
    """The worst error so far, in ulp and as a part of its bound."""

    ulp: float = 0.0
    ratio: float = 0.0

    def worst(self, other: Error) -> Error:
        """The worse of each."""
        return Error(max(self.ulp, other.ulp), max(self.ratio, other.ratio))


def judge(candidate: Candidate, case: Case) -> Judgement:
    """Run a case on a new subject. Whatever it does wrong, an exception of its own included, becomes the judgement."""
    return judge_maker(candidate.make, case, candidate.name, candidate.precision)


def judge_maker(make: Make, case: Case, name: str, precision: Arithmetic, hints: bool = True) -> Judgement:
    """The same for any maker of subjects; without hints, no known defect is tried to find out what a failure looks like."""
    came = tried(make, case, precision)
    if isinstance(came, str):
        return Judgement(name, case.id, case.clause, "skip", message=came, dtype=case.dtype)
    if isinstance(came, Error):
        return Judgement(name, case.id, case.clause, "pass", came.ulp, came.ratio, dtype=case.dtype)
    from .looks_like import hint

    looks_like = hint(case, came, precision) if hints else ""
    message = "\n".join(line for line in (f"{case.id}: {came}", *_told(case), looks_like) if line)
    status: Status = "differs" if case.verdict == "may differ" else "fail"
    snippet = f"from multibn_conformance import reproduce\nprint(reproduce({name!r}, {case.id!r}))"
    return Judgement(name, case.id, case.clause, status, came.ulp, came.ratio, message, snippet, case.dtype)


def tried(make: Make, case: Case, precision: Arithmetic) -> Error | Wrong | str:
    """How far a new subject is off, what is wrong with it, or why the case is not run."""
    with np.errstate(all="ignore"):
        reason = _skipped(case, precision)
        if reason is not None:
            return reason
        try:
            return _bits(case, make) if case.against == "bits" else _values(case, make, precision)
        except Wrong as wrong:
            return wrong


def _told(case: Case) -> tuple[str, str]:
    return f"{case.clause}: {CLAUSES[case.clause]}", f"{case.comment} It catches a BatchNorm that {case.catches}."


def _skipped(case: Case, precision: Arithmetic) -> str | None:
    """Why the case is not run, or None."""
    if any(step.values and step.values.kind.startswith("digits") for step in case.steps) and find_spec("sklearn") is None:
        return "needs scikit-learn, for its digits: pip install 'multibn[conformance]'"
    if case.against == "bits":
        return "equal bits are promised by exact implementations only" if precision == "working" else None
    reasons = (bounds.not_promised(answer.facts, precision) for answer in expected(case) if answer.facts is not None)
    return next((reason for reason in reasons if reason is not None), None)


def _values(case: Case, make: Make, precision: Arithmetic) -> Error:
    """Against the oracle, within the bounds."""
    error = Error()
    for _, _, its in errors(case, make, precision):
        error = error.worst(its)
    return error


def errors(case: Case, make: Make, precision: Arithmetic) -> Iterator[tuple[str, str, Error]]:
    """Name, type and error of each result.

    Raises:
        Wrong: one is beyond its bound.
    """
    for answer, right in zip(perform(case, make), expected(case), strict=True):
        for name, got in answer.arrays.items():
            exact = right.values[name]
            where = f"{answer.where}, {name}"
            if exact is None or got is None:
                _both_none(where, got, exact)
                continue
            _type_and_shape(where, got, answer.types[name], exact.high.shape)
            yield name, got.dtype.name, _within(where, got, exact, name, right, precision)


def _bits(case: Case, make: Make) -> Error:
    """Two subjects against each other, and one against the reference."""
    first, second = (tuple(perform(case, make)) for _ in range(2))
    for answer, again in zip(first, second, strict=True):
        for name, got in answer.arrays.items():
            other = again.arrays[name]
            if got is not None and other is not None and _bytes(got) != _bytes(other):
                raise Wrong(f"{answer.where}, {name}: {OTHER_BITS}")
    for answer, right in zip(first, _reference(case), strict=True):
        _same(answer, right)
    return Error()


def _bytes(a: Array) -> bytes:
    """Its bits, all NaN being alike."""
    return np.where(np.isnan(a), a.dtype.type("nan"), a).tobytes() if a.dtype.kind == "f" else a.tobytes()


@lru_cache(maxsize=32)
def _reference(case: Case) -> tuple[Answer, ...]:
    return tuple(perform(case, ReferenceSubject))


def _same(answer: Answer, right: Answer) -> None:
    for name, got in answer.arrays.items():
        wanted, where = right.arrays[name], f"{answer.where}, {name}"
        if got is None or wanted is None:
            _both_none(where, got, wanted)
            continue
        _type_and_shape(where, got, answer.types[name], wanted.shape)
        differ = bits_differ(np.ascontiguousarray(got), np.ascontiguousarray(wanted))
        if differ.any():
            index = tuple(int(i) for i in np.argwhere(differ)[0])
            off = np.abs(got.astype(np.float64) - wanted) / bounds.ulp(wanted.astype(np.float64), answer.types[name])
            raise Wrong(
                f"{where}{list(index)}: got the bits of {got[index].item()!r}, should be those of {wanted[index].item()!r}; "
                f"{int(differ.sum())} of {differ.size} differ.",
                ulp=float(np.max(off)),
                where=where,
                got=got.astype(np.float64),
                off=got.astype(np.float64) - wanted,
            )


def _both_none(where: str, got: object, wanted: object) -> None:
    """Where one of the two is None."""
    if (got is None) != (wanted is None):
        came, should_be = ("None" if a is None else "an array" for a in (got, wanted))
        raise Wrong(f"{where}: got {came}, should be {should_be}.")


def _type_and_shape(where: str, got: Array, dtype: str, shape: tuple[int, ...]) -> None:
    """Before any value: a wrong layout must not read as a numeric error."""
    if got.dtype != dtype:
        raise Wrong(f"{where}: got type {got.dtype}, should be {dtype}.")
    if got.shape != shape:
        raise Wrong(f"{where}: got shape {got.shape}, should be {shape}.")


def _bound(name: str, exact: Exact, right: Expected, precision: Arithmetic) -> tuple[Array, Array]:
    """The bound of each value, and the scale that an ulp is taken at."""
    facts, shape = right.facts, exact.high.shape
    assert facts is not None
    scale = bounds.scale(name, facts, right.updates.get(name, ()))
    if name in ("moving_mean", "moving_var"):
        return np.broadcast_to(bounds.for_moving(right.updates[name], name, precision), shape), scale
    if name in ("dgamma", "dbeta"):
        return (bounds.for_dgamma if name == "dgamma" else bounds.for_dbeta)(facts, exact.high, precision), scale
    channels = np.moveaxis(exact.high, 1, 0).reshape(facts.x.shape)
    bound = (bounds.for_y if name == "y" else bounds.for_dx)(facts, channels, precision)
    return as_input(bound, shape), as_input(np.broadcast_to(scale, facts.x.shape), shape)


def _within(where: str, got: Array, exact: Exact, name: str, right: Expected, precision: Arithmetic) -> Error:
    if not got.size:
        return Error()
    bound, scale = _bound(name, exact, right, precision)
    came = got.astype(np.float64)
    off = np.abs((came - exact.high) - exact.low)
    alike = (np.isnan(came) & np.isnan(exact.high)) | (came == exact.high)
    if name in ("dx", "dgamma"):  # inf-inf or inf*0: which of them comes is a matter of the order of the formula
        alike |= ~np.isfinite(came) & ~np.isfinite(exact.high)
    most = float(np.finfo(got.dtype).max)
    alike |= np.isinf(came) & (np.sign(came) == np.sign(exact.high)) & (np.abs(exact.high) + bound > most)  # beyond the type
    off = np.where(alike & ~np.isfinite(off), 0.0, np.where(np.isnan(off), np.inf, off))
    size = np.fmax(np.abs(exact.high), scale)
    ulps = np.where(off == 0, 0.0, off / bounds.ulp(np.where(np.isfinite(size), size, 0.0), got.dtype.name))
    ratios = np.where((off == 0) | np.isinf(bound), 0.0, off / bound)
    ratios = np.where(np.isnan(ratios), np.inf, ratios)
    at = np.unravel_index(int(np.argmax(ratios)), got.shape)
    if ratios[at] > 1:
        raise Wrong(
            f"{where}{[int(i) for i in at]}: got {float(came[at])!r}, should be {float(exact.high[at])!r}: "
            f"off by {ulps[at]:.3g} ulp of {got.dtype}, {ratios[at]:.3g} times the bound for {precision} "
            f"arithmetic ({bound[at]:.3g}); {int((ratios > 1).sum())} of {got.size} are out of bounds.",
            ulp=float(np.max(ulps)),
            ratio=float(ratios[at]),
            where=where,
            got=came,
            off=came - exact.high,
        )
    return Error(float(np.max(ulps)), float(np.max(ratios)))
