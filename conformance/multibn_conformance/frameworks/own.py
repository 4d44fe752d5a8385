"""The frameworks' own BatchNorms as subjects: one file for each, which needs NumPy and its framework, nothing of this project.

The files in ``layers`` run in whichever interpreter has the framework (``multibn_conformance.subjects.outside``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multibn.dialects import DIALECTS

FOLDER = Path(__file__).parent / "layers"


@dataclass(frozen=True)
class KnownDifference:
    """Cases that this BatchNorm does not pass, which is part of its dialect.

    Args:
        cases: patterns of ids; each of these that is run must differ.
        seen: what the judgement's message must match (a regular expression): another difference is not this one.
        reason: what it does, in one sentence.
    """

    cases: tuple[str, ...]
    seen: str
    reason: str


@dataclass(frozen=True)
class Own:
    """A framework's own BatchNorm.

    Args:
        name: as in ``multibn conform --own``.
        subject: file of this folder, a colon, and its function.
        environment: key of ``environments.json``.
        packages: the distributions whose version tells which BatchNorm it is; all must be there.
        dialect: key of ``multibn.dialects.DIALECTS``, None if no spec comes near.
        fixed: parameters of the spec that it does not let choose.
        single: numbers that it keeps as float32, whatever the input's type: "eps", "momentum" (of the old value),
            "1-momentum", "1-momentum in its type" (as float64 for float64).
        from_invstd: whether it recovers the variance that it stores as 1/invstd^2 - eps, which loses what is small beside eps.
        fused: ranks whose kernel takes the fixed estimator, for float64 never; others take the other one. None: all take it.
        one_pass: whether its variance is E[x^2] - E[x]^2: it is judged by what that can keep (``bounds``).
        by_difference: whether it moves by moving -= (moving - batch) * (1 - momentum), losing what is small beside moving.
        by_power: whether its gradient goes through (var+eps)^(-3/2), alone or times a sum: where the type cannot hold that power,
            what comes through the variance may be missing from dx, or NaN.
        takes: patterns of "must raise" cases whose input it takes, and computes by the formulas.
        gradient: whether it has one.
        differences: what else its dialect does otherwise than the formulas.
        average: what its moving statistics are, if no spec has them; ``fixed`` is then where they are the batch's own.
    """

    name: str
    subject: str
    environment: str
    packages: tuple[str, ...]
    dialect: str | None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    single: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    gradient: bool = True
    differences: tuple[KnownDifference, ...] = ()
    average: str = ""
    from_invstd: bool = False
    fused: tuple[int, ...] | None = None
    by_difference: bool = False
    by_power: bool = False
    one_pass: bool = False

    @property
    def updates_in_backward(self) -> bool:
        """BN-05: whether the moving statistics wait for backward."""
        return self.dialect is not None and DIALECTS[self.dialect].updates_in == "backward"


@contextmanager
def on_the_path() -> Iterator[None]:
    """Processes that are started within find the files of this folder."""
    names = {"PYTHONPATH": str(FOLDER), "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
