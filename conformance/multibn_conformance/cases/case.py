"""Fixed cases: a sentence of a clause as data, with the bug that it catches.

A case observes only what its clause is about, so that a wrong BatchNorm fails under the clause that it breaks. So cases with
several updates use momentum 0.5, for which the weights of old and new are equal, unless the clause is BN-05.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from multibn.spec.batchnorm import BatchNormSpec

from .inputs import Kind, Layout, Values

Observed = Literal["y", "dx", "dgamma", "dbeta", "moving_mean", "moving_var", "unchanged"]
Action = Literal[
    "train",  # forward in training
    "infer",  # forward in inference
    "backward",  # of the last forward
    "load",  # another state, of the type for values.dtype, into the same subject
    "reload",  # the moving statistics as they are read, into a new subject
    "another",  # a second subject with a state of its own, and its forward in training; the first one stays as it was
    "refuse",  # forward in training must raise
]
Verdict = Literal["must", "must raise", "may differ"]

DEFAULT = BatchNormSpec()


@dataclass(frozen=True)
class Step:
    """One call. ``unchanged`` observes that the moving statistics have the very bits that they had before it."""

    do: Action
    values: Values | None = None
    observe: tuple[Observed, ...] = ()


@dataclass(frozen=True)
class Case:
    """One thing that a BatchNorm must do.

    Args:
        id: clause and name.
        clause: the clause that a subject breaks if it fails.
        comment: what the case does.
        catches: the bug that it catches.
        steps: the calls, in order, on a subject that was loaded with a state of the type for input of ``dtype``.
        features: channels.
        spec: of the subject.
        dtype: of the input, which tells the type of the state (BN-10).
        verdict: "must"; "must raise": a step must raise, with a message; "may differ": differences are reported, not counted.
        against: "oracle": the exact values, within a derived bound; "bits": the bits of ``multibn.reference``, twice (BN-15).
        source: who says so.
    """

    id: str
    clause: str
    comment: str
    catches: str
    steps: tuple[Step, ...]
    features: int = 3
    spec: BatchNormSpec = DEFAULT
    dtype: str = "float32"
    verdict: Verdict = "must"
    against: Literal["oracle", "bits"] = "oracle"
    source: str = "the clause"


SHAPES = {2: (12, 3), 3: (5, 3, 7), 4: (4, 3, 3, 5), 5: (3, 3, 2, 3, 2)}
"""An input shape for each rank: m is no power of two, and a mix-up of two axes changes the result."""

HALF_MOMENTUM = 0.5
"""A momentum that gives the same result if the weights of old and new are swapped."""

ALL_GRADIENTS: tuple[Observed, ...] = ("dx", "dgamma", "dbeta")
MOVING: tuple[Observed, ...] = ("moving_mean", "moving_var")


def with_dependence(steps: Sequence[Step], spec: BatchNormSpec) -> Iterator[tuple[Step, bool]]:
    """Each step, and whether its y and gradients depend on moving statistics that an earlier step updated.

    Such results follow from statistics that the subject rounded. The bounds do not count this rounding, so only the state, dbeta
    and ``unchanged`` can be observed there.
    """
    updated = depends = False
    for step in steps:
        if step.do in ("train", "infer"):
            depends = updated and (step.do == "infer" or spec.normalize_with == "moving")
        yield step, depends and step.do in ("train", "infer", "backward")
        if step.do == "load":
            updated = False
        elif step.do == "train" and spec.update_statistics:
            updated = True


def train(values: Values, *observe: Observed) -> Step:
    """A forward in training."""
    return Step("train", values, observe)


def another(values: Values, *observe: Observed) -> Step:
    """A forward in training of a second subject; what is observed is the first one's."""
    return Step("another", values, observe)


def infer(values: Values, *observe: Observed) -> Step:
    """A forward in inference."""
    return Step("infer", values, observe)


def back(values: Values, *observe: Observed) -> Step:
    """A backward of the last forward."""
    return Step("backward", values, observe)


def usual(
    rank: int = 4,
    seed: int = 0,
    dtype: str = "float32",
    mean: float = 0.5,
    std: float = 2.0,
    kind: Kind = "normal",
    layout: Layout = "contiguous",
) -> Values:
    """Values of the usual shape of a rank."""
    return Values(SHAPES[rank], seed, dtype, mean, std, kind, layout)


def case(
    clause: str,
    name: str,
    comment: str,
    catches: str,
    *steps: Step,
    features: int = 3,
    spec: BatchNormSpec = DEFAULT,
    dtype: str = "float32",
    verdict: Verdict = "must",
    against: Literal["oracle", "bits"] = "oracle",
    source: str = "the clause",
) -> Case:
    """A case, its id made of clause and name."""
    return Case(f"{clause}-{name}", clause, comment, catches, steps, features, spec, dtype, verdict, against, source)
