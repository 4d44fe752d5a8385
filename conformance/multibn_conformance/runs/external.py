"""Judge any BatchNorm in a process of its own: ``multibn conform --subject package.module:make``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from multibn.backend import Backend, Precision, Subject
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError
from multibn_conformance.cases.case import Case
from multibn_conformance.cases.fit import fitted
from multibn_conformance.judging.judge import Judgement
from multibn_conformance.subjects.backends import Absent, Candidate
from multibn_conformance.subjects.outside import started
from multibn_conformance.usage import spec_from


class Judged(NamedTuple):
    """A subject, the cases that judge it, the cases left out with the reasons, and the command that judges it again."""

    candidate: Candidate
    cases: list[Case]
    absent: list[Absent]
    command: str

    def reproducible(self, judgements: Sequence[Judgement]) -> list[Judgement]:
        """The judgements, with a command that runs their case again."""
        return [replace(each, snippet=f"{self.command} --case {each.case}") if each.snippet else each for each in judgements]


def judged(
    name: str | None,
    cases: Sequence[Case],
    spec: str | None = None,
    pythons: Sequence[str] = (),
    timeout: float | None = None,
    precision: str | None = None,
    backends: Sequence[str] = (),
    devices: Sequence[str] = (),
) -> Judged | None:
    """Start the subject ``package.module:make`` and choose the cases that judge it; None without a name.

    Args:
        cases: those that were chosen.
        spec: its fixed parameters, a dialect's name or JSON; None: it takes any spec, and every case has its own.
        pythons: the one interpreter that runs it, or none for this one; without a name they are the backends'.
        precision: what it promises: "working" (arithmetic of the input's type, in any order) if None, or "exact" (BN-15, BN-16).

    Raises:
        UsageError: one of these is wrong, or the subject cannot be imported.
    """
    options = {"--subject": name, "--spec": spec, "--precision": precision}
    if name is None:
        for option, value in {**options, "--timeout": timeout}.items():
            if value is not None:
                raise UsageError(f"{option} needs a --subject: --subject package.module:make")
        return None
    python = options["--python"] = single(pythons)
    if precision not in (None, "working", "exact"):
        raise UsageError(f"--precision must be working or exact, got {precision!r}.")
    if backends or len(devices) > 1:
        raise UsageError("--subject takes one --device and no --backend.")
    device = devices[0] if devices else "cpu"
    if devices:
        options["--device"] = device
    fixed = None if spec is None else spec_from(spec)
    fit, others = (list(cases), {}) if fixed is None else fitted(cases, fixed)
    outside = started(name, python, timeout, device)

    def make(num_features: int, spec: BatchNormSpec | None, device: str, implementation: str) -> Subject:
        return outside.make(num_features, spec)

    module, _, function = name.partition(":")
    promised: Precision = "exact" if precision == "exact" else "working"
    candidate = Candidate(Backend(module, outside.versions, {function: promised}, lambda: (device,), make), function, device)
    absent = [Absent(candidate.name, f"{_some(ids)}: {reason}") for reason, ids in others.items()]
    told = [part for option, value in options.items() if value is not None for part in (option, value)]
    return Judged(candidate, fit, absent, shlex.join(["multibn", "conform", *told]))


def single(pythons: Sequence[str] | None) -> str | None:
    """The one interpreter of ``--python``, where only one has a meaning, or None.

    Raises:
        UsageError: there are several.
    """
    if pythons and len(pythons) > 1:
        raise UsageError(f"one --python runs a subject, and the frameworks' own: got {', '.join(pythons)}. Leave the others out.")
    return pythons[0] if pythons else None


def _some(ids: list[str]) -> str:
    return f"{len(ids)} of the cases, {ids[0]} and others" if len(ids) > 2 else ", ".join(ids)
