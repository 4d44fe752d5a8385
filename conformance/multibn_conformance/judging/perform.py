"""Run the calls of a case on a subject and yield its answers. This module detects forbidden behaviour (wrong exceptions, modified
inputs); ``compare`` checks the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from multibn.backend import Subject
from multibn.layer.types import PARAMETER_TYPE, Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import MOVING, Case, Step
from multibn_conformance.cases.inputs import state
from multibn_conformance.subjects.outside import Broken
from multibn_conformance.subjects.text import LONGEST, plain

Make = Callable[[int, BatchNormSpec], Subject]


class Wrong(Exception):
    """A subject's answer is wrong. The message, cleaned of control characters, says what is wrong; ``ulp`` and ``ratio`` (error /
    bound) say by how much.

    For wrong values, ``where`` names the step and the result, ``got`` holds the values received and ``off`` their errors, both
    float64.
    """

    def __init__(
        self,
        message: str,
        ulp: float = np.inf,
        ratio: float = np.inf,
        where: str = "",
        got: Array | None = None,
        off: Array | None = None,
    ) -> None:
        super().__init__(plain(message, 2 * LONGEST))
        self.ulp, self.ratio, self.where, self.got, self.off = ulp, ratio, where, got, off


class Answer(NamedTuple):
    """Results of one step: a name of the step for messages, the observed arrays by name, and their required types."""

    where: str
    step: Step
    arrays: dict[str, Array | None]
    types: dict[str, str]


class Lent:
    """Arrays that were passed to subjects. Checks that no subject modifies them, during the call or later."""

    def __init__(self) -> None:
        self._lent: list[tuple[str, Array, bytes]] = []

    def copies(self, where: str, arrays: tuple[Array | None, ...]) -> list[Array | None]:
        """Copy the arrays that will be passed to a subject, and remember the copies; None stays None."""
        made = [a if a is None else a.copy() for a in arrays]
        for a in made:
            if a is not None:
                self.add(where, a)
        return made

    def add(self, where: str, a: Array) -> Array:
        """Remember the current content of an array that is passed to the call ``where``."""
        self._lent.append((where, a, a.tobytes()))
        return a

    def check(self, where: str) -> None:
        """Raise ``Wrong`` if an array differs after the call at ``where``."""
        for since, a, before in self._lent:
            if a.tobytes() != before:
                told = "the subject modified its input array. It must not modify its inputs."
                if since != where:
                    told = f"the subject modified an array that it received at {since}. It must copy arrays that it keeps."
                raise Wrong(f"{where}: {told}")


def perform(case: Case, make: Make) -> Iterator[Answer]:
    """Create a subject, run the steps of a case on it, and yield the answer of each step.

    Raises:
        Wrong: the subject raises unexpectedly, does not raise when it must, modifies an input array, or changes its moving
            statistics in a step with ``unchanged``.
    """
    subject = call_subject("creating the subject", make, case.features, case.spec)
    arrays = state(case.features, case.dtype, 0, case.spec)
    refusable = case.verdict == "must raise"
    lent = Lent()
    call_subject("load", subject.load, *lent.copies("load", arrays))
    lent.check("load")
    moving, kind = arrays[2:], case.dtype
    others = []
    for number, step in enumerate(case.steps, 1):
        where = f"step {number} of {len(case.steps)} ({step.do})"
        given = None if step.values is None else lent.add(where, step.values.array())
        answers: dict[str, Array | None] = {}
        if step.do == "load":
            assert step.values is not None
            kind = step.values.dtype
            arrays = state(case.features, kind, step.values.seed, case.spec)
            moving = arrays[2:]
            call_subject(where, subject.load, *lent.copies(where, arrays))
        elif step.do == "reload":
            subject = call_subject(where, make, case.features, case.spec)
            call_subject(where, subject.load, *lent.copies(where, (*arrays[:2], *moving)))
        elif step.do == "another":
            assert step.values is not None
            others.append(call_subject(where, make, case.features, case.spec))
            other = state(case.features, kind, step.values.seed, case.spec)
            call_subject(where, others[-1].load, *lent.copies(where, other))
            call_subject(where, others[-1].forward, given, True)
        elif step.do == "refuse":
            _refused(where, subject, given)
        elif step.do == "backward":
            gradients = call_subject(where, subject.backward, given)
            if not isinstance(gradients, tuple) or len(gradients) != 3:
                raise Wrong(f"{where}: backward returned {type(gradients).__name__}, should be a tuple (dx, dgamma, dbeta).")
            answers.update(zip(("dx", "dgamma", "dbeta"), gradients, strict=True))
        else:
            answers["y"] = call_subject(where, subject.forward, given, step.do == "train")
        lent.check(where)
        now = call_subject(f"{where}, reading the moving statistics", subject.moving)
        if not isinstance(now, tuple) or len(now) != 2:
            raise Wrong(f"{where}: moving returned {type(now).__name__}, should be a tuple (moving_mean, moving_var).")
        read = array_from(f"{where}, moving_mean", now[0]), array_from(f"{where}, moving_var", now[1])
        answers.update(zip(MOVING, read, strict=True))
        if "unchanged" in step.observe:
            for name, old in zip(MOVING, moving, strict=True):
                same_bits(f"{where}: {name} must stay as it was", answers[name], old)
        moving = read
        observed: dict[str, Any] = {name: answers[name] for name in step.observe if name != "unchanged"}
        arrived = {name: a if a is None else array_from(f"{where}, {name}", a) for name, a in observed.items()}
        data = kind if given is None else given.dtype.name
        yield Answer(where, step, arrived, {name: data if name in ("y", "dx") else PARAMETER_TYPE[kind] for name in arrived})
    assert refusable == any(step.do == "refuse" for step in case.steps)


def call_subject(where: str, function: Callable[..., Any], *arguments: object) -> Any:
    """Call the subject; raise ``Wrong`` if it raises or its process dies or exceeds the time limit."""
    try:
        return function(*arguments)
    except Broken as error:
        raise Wrong(f"{where}: {error}") from error
    except (Exception, SystemExit) as error:
        raise Wrong(f"{where} raised {type(error).__name__}: {error}") from error


def _refused(where: str, subject: Subject, x: Array | None) -> None:
    assert x is not None
    try:
        y = subject.forward(x, True)
    except (Broken, SystemExit) as error:
        how = str(error) if isinstance(error, Broken) else f"SystemExit: {error}, should be an error."
        raise Wrong(f"{where}: {how}") from error
    except Exception as error:
        if not str(error).strip():
            raise Wrong(f"{where}: {type(error).__name__} without a message, should be an error that says why.") from error
        return
    raise Wrong(f"{where}: got output of type {type(y).__name__}, should be an error, for input of shape {x.shape}, {x.dtype}.")


def array_from(where: str, a: object) -> Array:
    """Return a copy of an array that a subject returned; raise ``Wrong`` if it is not a NumPy array."""
    if not isinstance(a, np.ndarray):
        raise Wrong(f"{where}: got {type(a).__name__}, should be a NumPy array.")
    return np.array(a)


def same_bits(what: str, got: Array | None, old: Array) -> None:
    """Raise ``Wrong`` unless two arrays have the same bits."""
    assert got is not None
    if got.dtype != old.dtype or got.shape != old.shape:
        raise Wrong(f"{what}: got {got.dtype} of shape {got.shape}, was {old.dtype} of shape {old.shape}.")
    if got.tobytes() != old.tobytes():
        index = int(np.flatnonzero(bits_differ(got, old))[0])
        came = got.astype(np.float64)
        message = f"{what}: index [{index}] is {got[index].item()!r}, was {old[index].item()!r}."
        raise Wrong(message, where=what, got=came, off=came - old)


def bits_differ(a: Array, b: Array) -> Array:
    """Return a mask of the positions where two arrays of the same type and shape differ in bits; all NaNs count as equal."""
    return np.asarray((a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")) & ~(np.isnan(a) & np.isnan(b)))
