"""What one rank does in a case, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from multibn.backend import Subject
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec

from .case import Step, SyncCase
from .hub import HubGroup
from .oracle import parameters

MakeSynchronised = Callable[[int, BatchNormSpec, HubGroup], Subject]
"""``Backend.synchronised``."""


@dataclass
class Answer:
    """Of a rank, to a step.

    Args:
        y, dx, dgamma, dbeta: None where it raised, or where there was no backward.
        moving: mean and variance after the step.
        error: what it raised, "" for nothing; kind: its class.
        sums: exchanges of the step.
    """

    y: Array | None = None
    dx: Array | None = None
    dgamma: Array | None = None
    dbeta: Array | None = None
    moving: tuple[Array, Array] | None = None
    error: str = ""
    kind: str = ""
    sums: int = 0


def perform(make: MakeSynchronised, case: SyncCase, rank: int, group: HubGroup) -> list[Answer]:
    """The answers of a rank of the group to all steps."""
    other = any(step.faults.get(rank) == "other eps" for step in case.steps)
    subject = _subject(make, case, replace(case.spec, eps=0.5) if other else case.spec, group)
    answers = []
    for step in case.steps:
        before = group.all_sums
        answer = _answer(subject, step, rank)
        answer.moving, answer.sums = subject.moving(), group.all_sums - before
        answers.append(answer)
    return answers


def _subject(make: MakeSynchronised, case: SyncCase, spec: BatchNormSpec, group: HubGroup) -> Subject:
    subject = make(case.channels, spec, group)
    gamma, beta = parameters(case)
    kind = gamma.dtype
    subject.load(gamma, beta, np.zeros(case.channels, kind), np.ones(case.channels, kind))
    return subject


def _answer(subject: Subject, step: Step, rank: int) -> Answer:
    mine = list(step.split[rank])
    x, dy, fault = step.x[mine], step.dy[mine], step.faults.get(rank)
    if fault == "absent":
        return Answer(error="absent")
    if fault == "refuse":
        x = np.concatenate([x, x], axis=1)
    try:
        answer = Answer(y=subject.forward(x, step.training))
        if step.training:
            answer.dx, answer.dgamma, answer.dbeta = subject.backward(dy)
    except Exception as error:  # whatever a subject raises is its answer
        return Answer(error=str(error) or type(error).__name__, kind=type(error).__name__)
    return answer
