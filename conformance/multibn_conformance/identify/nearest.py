"""The dialect nearest to the findings, and the differences from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from multibn.dialects import DIALECTS, Dialect

from .box import Finding

FIELDS = ("eps", "momentum", "moving_variance", "scale", "center", "normalize_with", "update_statistics", "learn_affine")

ONE_VALUE = {
    "gluon": "beta",
    "gluon-cudnn": "NaN",
    "mxnet-op": "beta",
    "torch": "refused",
    "keras2-fused": "beta",
    "keras3": "beta",
    "tf-fused": "beta",
    "flax": "beta",
    "onnx": "beta",
    "paddle": "input",
    "caffe": "beta",
}
"""The behaviour for one value per channel in a dialect's notes."""


class Nearest(NamedTuple):
    """The names of the nearest dialects, and the differences from the first, one sentence each."""

    names: tuple[str, ...]
    differs: tuple[str, ...]


def nearest(spec: Mapping[str, Any], findings: Mapping[str, Finding]) -> Nearest:
    """Return a distance: a different parameter or time of the update counts more than different behaviour for one value per
    channel.

    Args:
        spec: the parameters that were found.
    """
    ranked = sorted(DIALECTS.values(), key=lambda dialect: _distance(dialect, spec, findings))
    best = _distance(ranked[0], spec, findings)
    names = tuple(each.name for each in ranked if _distance(each, spec, findings) == best)
    return Nearest(names, tuple(text for _, text in _differences(ranked[0], spec, findings)))


def _distance(dialect: Dialect, spec: Mapping[str, Any], findings: Mapping[str, Finding]) -> int:
    return sum(weight for weight, _ in _differences(dialect, spec, findings))


def _differences(dialect: Dialect, spec: Mapping[str, Any], findings: Mapping[str, Finding]) -> list[tuple[int, str]]:
    name, told = dialect.name, []
    for field in FIELDS:
        its = getattr(dialect.spec, field)
        if field in spec and spec[field] != its:
            told.append((10, f"{field} is {spec[field]!r}, {name} has {its!r}"))
    moves = findings["updates"].value
    # if a function returns the new statistics, the subject stores them, in forward
    its_moves = "forward" if dialect.updates_in == "returned" else dialect.updates_in
    if moves is not None and moves != its_moves and (moves, spec.get("update_statistics")) != ("never", False):
        weight = 1 if dialect.updates_in == "after training" else 10  # not visible in any call of a subject
        told.append((weight, f"the moving statistics move in {moves}, those of {name}: {dialect.updates_in}"))
    one = findings["one_value"].value
    if one is not None and one != ONE_VALUE.get(name, one):
        told.append((1, f"one value per channel: {findings['one_value'].finding.split(':')[0].split(';')[0]}, unlike {name}"))
    for key, right, words in (
        ("through_statistics", "both", "gradients through the statistics"),
        ("inference_gradient", "constants", "gradients in inference"),
        ("inference", "keeps", "inference"),
    ):
        if findings[key].value not in (None, right) and not (
            key == "through_statistics" and spec.get("normalize_with") == "moving"
        ):
            told.append((10, f"{words}: {findings[key].finding}"))
    for key in ("gamma", "beta"):
        if findings[key].value in ("overwritten", "fixed") and not (key == "gamma" and name == "mxnet-op"):
            told.append((10, f"{key}: {findings[key].finding}"))
    return told
