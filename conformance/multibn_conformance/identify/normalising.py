"""Which statistics are used for normalising, in training and in inference; and eps, and where it is added."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from multibn.layer.types import Array

from .box import LOADED_MEAN, LOADED_VAR, Box, Finding, LoadedSubject, Undetermined, channels, near, short, statistics

CLOSE = 2e-3
"""Tolerance that separates the formulas: they differ by more, and an eps <= 0.1 changes the result by less."""


def normalised(x: Array, mean: Array | float, var: Array | float) -> Array:
    """xhat without eps."""
    return (x.astype(np.float64) - channels(mean, x)) / np.sqrt(channels(var, x))


def in_training(box: Box) -> Finding:
    """Value: "batch", "batch unbiased", "moving" or "updated"."""
    subject = box.fresh()
    seen = {_which(box, subject, seed, True) for seed in (1, 2)}
    how = f"two training forwards with mean 50, std 30 beside loaded {LOADED_MEAN:g} and {LOADED_VAR:g}"
    if len(seen) > 1:
        raise Undetermined(
            f"the first training forward normalises with the {', the second with the '.join(sorted(seen))} statistics"
        )
    return Finding("normalises training with", f"the {_words(*seen)}", how, *seen)


def in_inference(box: Box) -> Finding:
    """Value: "keeps", "moves" if anything changes, or "batch", "batch unbiased" or "updated" if that normalises."""
    subject = box.fresh()
    which = _which(box, subject, 1, False)
    mean, var = subject.moving()
    again = _which(box, subject, 1, False)
    kept = np.all(mean == LOADED_MEAN) and np.all(var == LOADED_VAR) and which == again
    how = f"two inference forwards beside loaded {LOADED_MEAN:g} and {LOADED_VAR:g}"
    changes = "nothing changes" if kept else f"the moving statistics change, to {mean[0]:.6g} and {var[0]:.6g}"
    return Finding(
        "inference",
        f"normalises with the {_words(which)}; {changes}",
        how,
        which if which != "moving" else "keeps" if kept else "moves",
    )


def _which(box: Box, subject: LoadedSubject, seed: int, training: bool) -> str:
    x = box.values(8, 50.0, 30.0, seed)
    before = subject.moving()
    y = subject.forward(x, training)
    mean, var = statistics(x)
    known = {
        "batch": normalised(x, mean, var),
        "batch unbiased": normalised(x, mean, var * 8 / 7),
        "moving": normalised(x, *before),
    }
    if not np.array_equal(subject.moving(), before):
        known["updated"] = normalised(x, *subject.moving())
    for name, wanted in known.items():
        if np.all(np.isfinite(wanted)) and near(y, wanted, CLOSE):
            return name
    raise Undetermined(
        f"{'a training' if training else 'an inference'} output is near no formula: {y.flat[0]:.6g} for {x.flat[0]:.6g}"
    )


def _words(which: str) -> str:
    return {
        "batch": "batch statistics",
        "batch unbiased": "batch's mean and its unbiased variance",
        "moving": "moving statistics",
        "updated": "moving statistics, after their update",
    }[which]


class Eps(NamedTuple):
    """A measured eps: where it is added ("inside", "outside" or "floor") and how well that fits."""

    value: float
    place: str
    misfit: float


_WHERE = {"inside": "the root", "outside": "the root", "floor": "under the variance"}

_MODELS: dict[str, tuple[Callable[[Array, float], Array], Callable[[float], float]]] = {
    "inside": (lambda std, root: np.sqrt(std**2 + root**2), lambda root: root**2),
    "outside": (lambda std, root: std + root, lambda root: root),
    "floor": (lambda std, root: np.maximum(std, root), lambda root: root**2),
}
"""Return the divisor of the deviations for a standard deviation and an eps; root is the divisor for standard deviation 0."""


def eps(box: Box, training: Finding) -> Finding:
    """Value: eps. It must be the same in inference and, with batch statistics, in training."""
    found: dict[str, Eps] = {}
    not_found: dict[str, str] = {}
    for mode in ("training", "inference") if str(training.value).startswith("batch") else ("inference",):
        try:
            found[mode] = _measured(partial(_divisor, box, mode == "training"), box, training.value == "batch unbiased")
        except Undetermined as reason:
            not_found[mode] = str(reason)
    values = {mode: short(each.value, max(10 * each.misfit, 1e-5)) for mode, each in found.items()}
    told = {mode: f"{values[mode]:g} {each.place} {_WHERE[each.place]}" for mode, each in found.items()} | not_found
    if not_found or len(set(told.values())) > 1:
        raise Undetermined("; ".join(f"in {mode}: {text}" for mode, text in told.items()))
    how = "; ".join(
        f"{mode}: {each.value:.7g}, fits to {each.misfit:.0e}, spreads from {_spans(each)}" for mode, each in found.items()
    )
    value, place = values["inference"], found["inference"].place
    words = {
        "inside": f"{value:g}, inside the root",
        "outside": f"{value:g}, outside the root: added to the standard deviation",
        "floor": f"{value:g}, as a floor: the variance is raised to it, not by it",
    }
    return Finding("eps", words[place], how, value if place == "inside" else (place, value))


def _spans(found: Eps) -> str:
    root = found.value if found.place == "outside" else found.value**0.5
    return f"{0.01 * root:.1g} to {10 * root:.1g}"


def _divisor(box: Box, training: bool, std: float) -> float:
    """Measure the divisor of deviations that all have one size."""
    x = box.alternating(8, std)
    y = box.fresh(0.0, 1.0 if training else std**2).forward(x, training)
    slope = float((y[0, 0].flat[0] - y[-1, 0].flat[-1]) / 2)
    with np.errstate(divide="ignore"):
        return float(np.float64(x[0, 0].flat[0]) / np.float64(slope))


def _measured(divisor: Callable[[float], float], box: Box, unbiased: bool) -> Eps:
    """Measure the divisor where it no longer falls with the standard deviation, because eps dominates."""
    smallest = float(np.sqrt(np.finfo(box.dtype).tiny)) * 10
    per_std = divisor(1e4) / 1e4
    if not any(abs(per_std - wanted) < CLOSE for wanted in ((1.0, np.sqrt(8 / 7)) if unbiased else (1.0,))):
        raise Undetermined(f"gamma was loaded as 1, but where the spread is wide the output's slope is {1 / per_std:.4g}")
    std = 10.0
    while std > smallest:
        root = divisor(std)
        if not np.isfinite(root):
            raise Undetermined(f"the output is not finite at a spread of {std:.0e}, and eps has no effect above it: it may be 0")
        if per_std * std < 0.003 * root:
            return _fitted(divisor, root, per_std)
        std /= 10
    raise Undetermined(f"it has no effect down to a variance of {smallest**2:.0e}: it is 0, or too small to see in {box.dtype}")


def _fitted(divisor: Callable[[float], float], rough: float, per_std: float) -> Eps:
    stds = rough / per_std * np.array([0.01, 0.1, 0.3, 1.0, 3.0, 10.0])
    got = np.array([divisor(float(std)) for std in stds])
    best = None
    for place, (model, of_root) in _MODELS.items():
        root = float(got[0]) - (0.01 * rough if place == "outside" else 0.0)
        root = float(np.sqrt(max(root**2 - (0.01 * rough) ** 2, 0))) if place == "inside" else root
        misfit = float(np.max(np.abs(model(per_std * stds, root) / got - 1)))
        if best is None or misfit < best.misfit:
            best = Eps(of_root(root), place, misfit)
    assert best is not None
    if not best.misfit < CLOSE:
        raise Undetermined(
            f"neither inside, outside nor a floor fits what a small spread is divided by, best to {best.misfit:.1g}"
        )
    return best
