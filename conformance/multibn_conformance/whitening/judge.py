"""Judge one case on one whitening layer: compare the answers with the expected ones and describe a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from multibn.backend import Precision, Subject
from multibn.layer.types import PARAMETER_TYPE, Array
from multibn.whitening.spec import CLAUSES, WhiteningSpec
from multibn_conformance.judging.compare import Deviations, Error, both_none, type_and_shape, worst_of
from multibn_conformance.judging.judge import Judgement, again
from multibn_conformance.judging.perform import Lent, Wrong, array_from, call_subject, same_bits
from multibn_conformance.oracle.bounds import ulp
from multibn_conformance.oracle.exact import Exact
from multibn_conformance.subjects.backends import Candidate

from .bounds import Bounds, for_moving
from .case import MOVING, Step, WhiteningCase, state
from .oracle import Expected, expected

Make = Callable[[int, WhiteningSpec], Subject]


def judge(candidate: Candidate, case: WhiteningCase) -> Judgement:
    """Run a case on a new layer of a candidate that whitens."""
    whitening = candidate.backend.whitening
    assert whitening is not None

    def make(num_features: int, spec: WhiteningSpec) -> Subject:
        return whitening(num_features, spec, candidate.device, candidate.implementation)

    return again(judge_maker(make, case, candidate.name, candidate.precision), candidate.again("--case", case.id))


def judge_maker(make: Make, case: WhiteningCase, name: str, precision: Precision) -> Judgement:
    """The same for any maker of layers. Whatever one does wrong, an exception of its own included, becomes the judgement."""
    error = Error()
    try:
        with np.errstate(all="ignore"):
            rights = expected(case)
            reasons = (
                its.not_promised()
                for right in rights
                if {"y", "dx", "dgamma"} & {*right.values}
                for its in _bounds(right, case, precision)
            )
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is not None:
                return Judgement(name, case.id, case.clause, "skip", message=reason, dtype=case.dtype)
            for (where, answers), right in zip(perform(case, make), rights, strict=True):
                for what, got in answers.items():
                    error = error.worst(_error_of(f"{where}, {what}", what, got, right, case, precision))
    except Wrong as wrong:
        told = f"{case.comment} It catches a whitening that {case.catches}."
        message = f"{case.id}: {wrong}\n{case.clause}: {CLAUSES[case.clause]}\n{told}"
        snippet = f"from multibn_conformance import reproduce\nprint(reproduce({name!r}, {case.id!r}))"
        return Judgement(name, case.id, case.clause, "fail", wrong.ulp, wrong.ratio, message, snippet, case.dtype)
    return Judgement(name, case.id, case.clause, "pass", error.ulp, error.ratio, dtype=case.dtype)


def perform(case: WhiteningCase, make: Make) -> Iterator[tuple[str, dict[str, Array | None]]]:
    """The observed answers of a new layer, step by step.

    Raises:
        Wrong: it raises where it must not, or not where it must; changes its input; or does not keep its state.
    """
    subject = call_subject("creating the subject", make, case.features, case.spec)
    arrays = state(case)
    lent = Lent()
    call_subject("load", subject.load, *lent.copies("load", arrays))
    lent.check("load")
    moving = arrays[2:]
    for number, step in enumerate(case.steps, 1):
        where = f"step {number} of {len(case.steps)} ({step.do})"
        given = lent.add(where, step.data.array())
        answers = _answers(where, step, subject, given)
        lent.check(where)
        read = [array_from(f"{where}, {name}", a) for name, a in zip(MOVING, call_subject(where, subject.moving), strict=True)]
        if "unchanged" in step.observe or step.do.startswith("refuse"):
            for name, now, old in zip(MOVING, read, moving, strict=True):
                same_bits(f"{where}: {name} must stay as it was", now.reshape(-1), old.reshape(-1))
        moving = read[0], read[1]
        answers.update(zip(MOVING, read, strict=True))
        yield where, {name: answers[name] for name in step.observe if name != "unchanged"}


def _answers(where: str, step: Step, subject: Subject, given: Array) -> dict[str, Array | None]:
    if step.do.startswith("refuse"):
        _refused(
            where, (lambda: subject.backward(given)) if step.do == "refuse backward" else (lambda: subject.forward(given, True))
        )
        return {}
    if step.do == "backward":
        came = dict(zip(("dx", "dgamma", "dbeta"), call_subject(where, subject.backward, given), strict=True))
    else:
        came = {"y": call_subject(where, subject.forward, given, step.do == "train")}
    return {name: a if a is None else array_from(f"{where}, {name}", a) for name, a in came.items()}


def _refused(where: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        if not str(error).strip():
            raise Wrong(f"{where}: {type(error).__name__} without a message, should be an error that says why.") from error
        return
    raise Wrong(f"{where}: got a result, should be an error that says why.")


def _bounds(right: Expected, case: WhiteningCase, precision: Precision) -> list[Bounds]:
    """Of each group."""
    found = []
    for facts, updates in zip(right.facts, right.updates, strict=True):
        inherited = [float(np.linalg.norm(for_moving(updates, name, case.spec, case.dtype, precision))) for name in MOVING]
        found.append(Bounds(facts, case.spec, case.dtype, precision, (inherited[0], inherited[1])))
    return found


def _error_of(where: str, what: str, got: Array | None, right: Expected, case: WhiteningCase, precision: Precision) -> Error:
    exact = right.values[what]
    if exact is None or got is None:
        both_none(where, got, exact)
        return Error()
    type_and_shape(where, got, case.dtype if what in ("y", "dx") else PARAMETER_TYPE[case.dtype], exact.high.shape)
    if not got.size:
        return Error()
    bound, scale = _bound(what, exact, right, case, precision)
    came = got.astype(np.float64)
    off = np.abs((came - exact.high) - exact.low)
    off = np.where(np.isnan(came) & np.isnan(exact.high), 0.0, np.where(np.isnan(off), np.inf, off))
    one = ulp(np.fmax(np.abs(exact.high), scale), got.dtype.name)
    ulps, ratios = (np.where(off == 0, 0.0, off / unit) for unit in (one, bound))
    return worst_of(where, got, exact, Deviations(ulps, ratios, bound, bound / one), precision)


def _bound(what: str, exact: Exact, right: Expected, case: WhiteningCase, precision: Precision) -> tuple[Array, Array]:
    """The bound of each value, and the scale that an ulp is taken at: the largest of a group, for single values may cancel."""
    groups = case.spec.groups
    if what in MOVING:
        cut = exact.high.reshape(groups, -1)
        parts = [
            np.broadcast_to(
                for_moving(updates, what, case.spec, case.dtype, precision),
                exact.high.reshape(groups, *_inner(what, exact)).shape[1:],
            )
            for updates in right.updates
        ]
        bound = np.stack(parts).reshape(exact.high.shape)
        return bound, np.broadcast_to(np.abs(cut).max(axis=1)[:, None], cut.shape).reshape(exact.high.shape)
    rows = (
        np.moveaxis(exact.high, 1, 0).reshape(groups, -1, exact.high.size // case.features)
        if exact.high.ndim > 1
        else exact.high.reshape(groups, -1)
    )
    its = _bounds(right, case, precision)
    made = np.stack([getattr(bounds, what)(np.nan_to_num(row)) for bounds, row in zip(its, rows, strict=True)])
    scale = np.broadcast_to(
        np.nan_to_num(np.abs(rows)).reshape(groups, -1).max(axis=1).reshape(groups, *[1] * (rows.ndim - 1)), rows.shape
    )
    return _like(made, exact.high.shape), _like(scale, exact.high.shape)


def _inner(what: str, exact: Exact) -> tuple[int, ...]:
    return (-1,) if what == "moving_mean" else exact.high.shape[1:]


def _like(a: Array, shape: tuple[int, ...]) -> Array:
    """(groups, d, m) as (N, C, ...), or (groups, d) as (C,)."""
    return a.reshape(shape) if len(shape) == 1 else np.moveaxis(a.reshape(shape[1], shape[0], *shape[2:]), 0, 1)
