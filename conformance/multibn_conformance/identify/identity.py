"""Determine the dialect of a black box from its answers: ``multibn identify package.module:make``.

Everything is measured through make, load, forward, backward and moving. What cannot be determined is reported
with the reason; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich import box as lines
from rich.markup import escape
from rich.table import Table

from multibn.spec.batchnorm import BatchNormSpec

from . import affine, edges, gradients, moving, normalising
from .accuracy import accuracy
from .box import Box, Finding, Make, Undetermined
from .nearest import FIELDS, Nearest, nearest

TITLES = {
    "normalize_with": "normalises training with",
    "updates": "moving statistics move",
    "momentum": "momentum",
    "moving_variance": "moving variance",
    "inference": "inference",
    "eps": "eps",
    "gamma": "gamma",
    "beta": "beta",
    "through_statistics": "gradients through the statistics",
    "inference_gradient": "gradients in inference",
    "initial": "initial state",
    "one_value": "one value per channel",
    "empty": "empty batch",
    "nan": "NaN in the input",
    "inf": "infinity in the input",
    "types": "types",
    "accuracy": "accuracy",
}
"""Key in ``Identity.findings`` -> name of the property, in the order of measurement."""


@dataclass(frozen=True)
class Identity:
    """The dialect of a black box.

    Args:
        findings: key of ``TITLES`` -> finding, whose value is None if undetermined.
        spec: the parameters of BatchNormSpec that were determined.
        unknown: the other parameters, with the reason.
        nearest: the nearest dialects, and the differences.
    """

    findings: dict[str, Finding]
    spec: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    nearest: Nearest | None = None

    def code(self) -> str:
        """Return the BatchNormSpec as code; parameters that were not determined are named in a comment."""
        default = BatchNormSpec()
        shown = [f"{name}={value!r}" for name, value in self.spec.items() if _needed(name, value, getattr(default, name))]
        return "\n".join([f"BatchNormSpec({', '.join(shown)})", *(f"# {name}: {why}" for name, why in self.unknown.items())])

    def table(self, name: str) -> Table:
        """Return rows for a terminal: property, finding, how it was measured."""
        table = Table(title=f"{name}, seen from outside", box=lines.SIMPLE_HEAD, show_lines=False)
        for column in ("property", "finding", "how it was measured"):
            table.add_column(column, overflow="fold", style="dim" if column.startswith("how") else None)
        for key, each in self.findings.items():
            table.add_row(TITLES[key], escape(each.finding), escape(each.how))
        return table

    def text(self) -> str:
        """Return the text below the table: the nearest dialect, the differences from it, and the spec."""
        told = ["nearest dialect: cannot tell: too little is known"]
        if self.nearest is not None:
            first, *others = self.nearest.names
            also = f" (as near: {', '.join(others)}; nothing that was measured tells them apart)" if others else ""
            told = [f"nearest dialect: {first}{also}", *(f"  but {each}" for each in self.nearest.differs)]
        return "\n".join([*told, self.code()])


def identify(make: Make) -> Identity:
    """Determine the dialect of ``make(num_features)``, a ``multibn.backend.Subject`` with its own defaults. Raises nothing."""
    findings: dict[str, Finding] = {}

    def tell(key: str, probe: Callable[..., Finding], *arguments: Any) -> Finding:
        try:
            with np.errstate(all="ignore"):
                found = probe(box, *arguments)
        except Undetermined as reason:
            found = Finding(TITLES[key], f"cannot tell: {reason}")
        findings[key] = found
        return found

    try:
        box = Box(make)
    except Undetermined as reason:
        findings = {key: Finding(title, f"cannot tell: {reason}") for key, title in TITLES.items()}
        return Identity(findings, unknown=dict.fromkeys(FIELDS, findings["eps"].finding))
    training = tell("normalize_with", normalising.in_training)
    moves = tell("updates", moving.updates)
    tell("momentum", moving.momentum, moves)
    tell("moving_variance", moving.estimator, moves)
    inference = tell("inference", normalising.in_inference)
    eps = tell("eps", normalising.eps, training)
    tell("gamma", affine.gamma, training, inference)
    tell("beta", affine.beta, training, inference)
    tell("through_statistics", gradients.in_training, training)
    tell("inference_gradient", gradients.in_inference)
    tell("initial", moving.initial, training)
    tell("one_value", edges.one_value, moves)
    tell("empty", edges.empty, moves)
    tell("nan", edges.poisoned, moves, "nan")
    tell("inf", edges.poisoned, moves, "inf")
    tell("types", edges.types)
    tell("accuracy", accuracy, training, eps)
    spec, unknown = _spec(findings)
    return Identity(findings, spec, unknown, nearest(spec, findings) if "eps" in spec or "momentum" in spec else None)


def _needed(name: str, value: Any, default: Any) -> bool:
    return name in ("eps", "momentum", "moving_variance") or value != default


def _spec(findings: dict[str, Finding]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the parameters of BatchNormSpec that follow from the findings, and why the others do not."""
    values = {key: found.value for key, found in findings.items()}
    affine_values = values["gamma"], values["beta"]
    learned = {"acts": True, "acts, not learned": False}
    switches = {learned[each] for each in affine_values if each in learned}
    told: dict[str, Any] = {
        "eps": values["eps"] if isinstance(values["eps"], float) else None,
        "momentum": values["momentum"],
        "moving_variance": values["moving_variance"],
        "scale": None if values["gamma"] is None else values["gamma"] not in ("none", "fixed"),
        "center": None if values["beta"] is None else values["beta"] not in ("none", "fixed"),
        "normalize_with": values["normalize_with"] if values["normalize_with"] in ("batch", "moving") else None,
        "update_statistics": None if values["updates"] is None else values["updates"] != "never",
        "learn_affine": None if None in affine_values or len(switches) > 1 else switches != {False},
    }
    of = {"scale": "gamma", "center": "beta", "update_statistics": "updates", "learn_affine": "gamma"}
    spec: dict[str, Any] = {}
    unknown: dict[str, str] = {}
    for name in FIELDS:
        try:
            if told[name] is not None:
                spec[name] = None if told[name] == "equal weights" else told[name]
                BatchNormSpec(**{name: spec[name]})
                continue
            unknown[name] = findings[of.get(name, name)].finding
            if name == "learn_affine" and len(switches) > 1:
                unknown[name] = f"one is learned, the other is not: gamma {values['gamma']}; beta {values['beta']}"
        except (TypeError, ValueError) as error:
            del spec[name]
            unknown[name] = f"{told[name]!r} was measured: {error}"
    return spec, unknown
