"""Whether gradients flow through the statistics, in training and in inference."""

from __future__ import annotations

import numpy as np

from multibn.layer.types import Array

from .affine import GAMMA, fitted_line
from .box import LOADED_MEAN, LOADED_VAR, Box, Finding, Undetermined, axes, channels, near, statistics
from .normalising import CLOSE, normalised

MEANINGS = {
    "both": "yes, through mean and variance",
    "constants": "no: mean and variance are taken for constants",
    "mean": "through the mean only",
    "variance": "through the variance only",
}


def in_training(box: Box, training: Finding) -> Finding:
    """Value: "both", "constants", "mean" or "variance"."""
    if training.value not in ("batch", "moving"):
        raise Undetermined("the formula that is differentiated is not known")
    subject = box.fresh(gamma=GAMMA)
    x, dy = box.values(8, 50.0, 30.0, 5), box.values(8, 0.3, 1.0, 6)
    y = subject.forward(x, True)
    got = subject.backward(dy).dx
    mean, var = statistics(x) if training.value == "batch" else (np.full(3, LOADED_MEAN), np.full(3, LOADED_VAR))
    slope = fitted_line(normalised(x, mean, var), y)[0]  # the effective gamma: 1 if it is fixed
    known = _formulas(x, dy, mean, var, slope)
    return _told("gradients through the statistics", got, known, "training forward and backward; dx beside four formulas")


def in_inference(box: Box) -> Finding:
    """Value: "constants" if correct, else what flows."""
    subject = box.fresh(gamma=GAMMA)
    first, x, dy = box.values(8, -20.0, 10.0, 4), box.values(8, 50.0, 30.0, 5), box.values(8, 0.3, 1.0, 6)
    subject.forward(first, True)
    mean, var = subject.moving()
    y = subject.forward(x, False)
    got = subject.backward(dy).dx
    slope = fitted_line(normalised(x, mean, var), y)[0]
    known = _formulas(x, dy, mean, var, slope)
    of_batch = _formulas(x, dy, *statistics(x), slope)["both"]
    stale = _formulas(first, dy, *statistics(first), slope)["both"]
    known |= {"training with the batch": of_batch, "an earlier forward": stale}
    return _told("gradients in inference", got, known, "training forward, inference forward, backward; dx beside six formulas")


def _formulas(x: Array, dy: Array, mean: Array, var: Array, gamma: Array) -> dict[str, Array]:
    xhat, axis = normalised(x, mean, var), axes(x)
    dy = dy.astype(np.float64)
    through_mean = channels(dy.mean(axis=axis), x)
    through_var = xhat * channels((dy * xhat).mean(axis=axis), x)
    slope = channels(gamma / np.sqrt(var), x)
    return {
        "both": slope * (dy - through_mean - through_var),
        "constants": slope * dy,
        "mean": slope * (dy - through_mean),
        "variance": slope * (dy - through_var),
    }


def _told(name: str, got: Array, known: dict[str, Array], how: str) -> Finding:
    for value, wanted in known.items():
        if near(got, wanted, 2 * CLOSE):
            words = MEANINGS.get(value, f"the gradient of {value}")
            if name.endswith("inference") and value != "constants" and value in MEANINGS:
                words = "the training formula, evaluated at the moving statistics"
            return Finding(name, words, how, value)
    raise Undetermined(f"dx is near none of the formulas of {', '.join(known)}; its first value is {got.flat[0]:.6g}")
