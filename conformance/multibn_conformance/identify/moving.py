"""When the moving statistics are updated, with which weights and which variance."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from multibn.layer.types import Array

from .box import LOADED_MEAN, LOADED_VAR, Box, Finding, LoadedSubject, Undetermined, short

SINGLE = 64 * 2.0**-24
"""Relative tolerance for weights: many frameworks store momentum in float32."""

FAR = 1000.0
"""A mean and a standard deviation so large that all other terms are negligible."""


def updates(box: Box) -> Finding:
    """Value: "forward", "backward", "both" or "never"."""
    subject = box.fresh()
    x = box.values(8, 50.0, 30.0)
    seen = [subject.moving()]
    subject.forward(x, True)
    seen.append(subject.moving())
    note = ""
    try:
        subject.backward(box.values(8, 0.0, 1.0, 1))
        seen.append(subject.moving())
    except Undetermined as reason:
        note = f"; {reason}"
        if np.array_equal(seen[0], seen[1]):
            raise Undetermined(f"a forward does not move the statistics, and {reason}") from reason
    moved = [not np.array_equal(old, new) for old, new in pairwise(seen)]
    value = {(1, 0): "forward", (0, 1): "backward", (1, 1): "both", (0, 0): "never"}[moved[0], any(moved[1:])]
    words = {"forward": "in forward", "backward": "in backward", "both": "in forward, and again in backward", "never": "never"}
    means = " -> ".join(f"{mean[0]:.6g}" for mean, _ in seen)
    return Finding(
        "moving statistics move", words[value] + note, f"moving mean as loaded, after forward, after backward: {means}", value
    )


def step(box: Box, subject: LoadedSubject, x: Array, moves: str) -> tuple[Array, Array]:
    """Return the moving statistics after one update: a training step, with a backward if the update needs it."""
    subject.forward(x, True)
    if moves == "backward":
        subject.backward(np.zeros_like(x))
    return subject.moving()


def momentum(box: Box, moves: Finding) -> Finding:
    """Value: the weight of the old value, or "equal weights"."""
    weights, tolerance, way = _weights(box, _moves(moves)), SINGLE, str(moves.value)
    of_old = float(step(box, box.fresh(FAR, LOADED_VAR), box.alternating(8, 1.0), way)[0][0]) / FAR
    of_new = float(step(box, box.fresh(0.0, LOADED_VAR), box.alternating(8, 1.0, FAR), way)[0][0]) / FAR
    how = f"in the first step the old moving mean weighs {of_old:.7g}, the new one {of_new:.7g}; the old one in four steps: "
    how += ", ".join(f"{weight:.7g}" for weight in weights)
    if abs(of_old + of_new - 1) > tolerance:
        raise Undetermined(f"the weights do not add up to 1: {of_old:.7g} of the old value and {of_new:.7g} of the new one")
    large = step(box, box.fresh(0.0, LOADED_VAR), box.alternating(24, 1.0, FAR), way)[0][0] / FAR
    if abs(large - of_new) > tolerance:
        raise Undetermined(
            f"it depends on the batch: the weight of the new value is {of_new:.7g} for 8 values, {large:.7g} for 24"
        )
    if all(abs(weight - n / (n + 1)) <= tolerance for n, weight in enumerate(weights)):
        return Finding(
            "momentum", "none: every batch since load has the same weight, the loaded state none", how, "equal weights"
        )
    if max(weights) - min(weights) > tolerance:
        raise Undetermined(
            f"it changes from step to step: the old value weighs {', '.join(f'{weight:.6g}' for weight in weights)}"
        )
    if way == "both":
        again = float(step(box, box.fresh(FAR, LOADED_VAR), box.alternating(8, 1.0), "backward")[0][0]) / FAR
        how += f", and {again:.7g} once backward has moved it too"
        if abs(again - of_old**2) > tolerance:
            raise Undetermined(f"forward and backward do not move the statistics alike: {how}")
    value = _decimal(of_new)
    words = f"{value:g} is the weight of the old value, {float(f'{1 - value:.12g}'):g} of the new one"
    own = _of_variance(box, way)
    if abs(own - weights[0]) > tolerance:
        raise Undetermined(f"{words}; but for the variance it is {own:.7g}")
    return Finding("momentum", words, how, value)


def estimator(box: Box, moves: Finding) -> Finding:
    """Value: "biased" or "unbiased"."""
    found = _estimator(box, _moves(moves))
    for other in box.others():
        its = _estimator(other, _moves(moves)).finding
        if its != found.finding:
            raise Undetermined(
                f"it depends on the input: {found.finding} of rank {box.rank} and {box.dtype}, "
                f"{its} of rank {other.rank} and {other.dtype}"
            )
    return found


def _estimator(box: Box, moves: str) -> Finding:
    ratios = []
    for m in (8, 24):
        x = box.alternating(m, FAR)
        weight = step(box, box.fresh(0.0, 0.0), box.alternating(m, 1.0, FAR), moves)[0][0] / FAR
        if weight <= 0:
            raise Undetermined("the batch has no weight in the moving statistics")
        ratios.append(float(step(box, box.fresh(0.0, 0.0), x, moves)[1][0] / weight / FAR**2))
    how = f"what enters, as a multiple of the biased variance: {ratios[0]:.6g} of 8 values, {ratios[1]:.6g} of 24"
    for name, wanted in (("biased", (1.0, 1.0)), ("unbiased", (8 / 7, 24 / 23))):
        if np.allclose(ratios, wanted, rtol=1e-3, atol=0):
            return Finding("moving variance", name, how, name)
    raise Undetermined(f"neither biased nor unbiased: {how}")


def initial(box: Box, training: Finding) -> Finding:
    """Value: (moving mean, moving variance, gamma, beta), each None if it is not one number."""
    subject = box.new()
    mean, var = (_one(a) for a in subject.moving())
    told = {"moving mean": mean, "moving variance": var, "gamma": None, "beta": None}
    how = "read before anything is loaded"
    try:
        if training.value != "batch":
            raise Undetermined("the batch does not normalise, or it is not known what does")
        x = np.asarray(box.alternating(8, FAR), "float32")
        y = subject.forward(x, True)
        size = x[0, 0].flat[0] / np.sqrt(np.float64(FAR) ** 2)
        told["gamma"] = float(f"{(y[0, 0].flat[0] - y[-1, 0].flat[-1]) / 2 / size:.3g}")
        told["beta"] = float(f"{np.mean(y[:, 0]):.3g}") + 0.0
        how += "; gamma and beta by a training forward"
    except Undetermined as reason:
        how += f"; gamma and beta not, for {reason}"
    words = ", ".join(f"{name} {'cannot tell' if value is None else f'{value:g}'}" for name, value in told.items())
    return Finding("initial state", words, how, tuple(told.values()))


def _one(a: Array) -> float | None:
    return float(a.flat[0]) if a.size and np.all(a == a.flat[0]) else None


def _decimal(weight: float) -> float:
    """1 - weight, rounded as far as the measurement allows; the smaller of the two weights is measured more precisely."""
    other = 1 - weight
    if abs(other) < SINGLE:
        return 0.0
    small = min(weight, other, key=abs)
    short_one = short(small, 1e-5 + 2.0**-23 / abs(small))  # many frameworks store momentum in float32
    return float(f"{short_one if small == other else 1 - short_one:.12g}")


def _moves(moves: Finding) -> str:
    if moves.value in (None, "never"):
        raise Undetermined("the moving statistics do not move" if moves.value else "it is not known when they move")
    return str(moves.value)


def _weights(box: Box, moves: str) -> list[float]:
    """Return the weight of the old mean in each of four steps, if the weights add up to 1. The batches' means change sign, so
    that none is close to the old one.
    """
    subject = box.fresh(0.0, LOADED_VAR)
    old, weights = 0.0, []
    for n in range(4):
        batch = FAR if n % 2 == 0 else -FAR
        new = float(step(box, subject, box.alternating(8, 1.0, batch), moves)[0][0])
        weights.append((new - batch) / (old - batch) + 0.0)  # no -0
        old = new
    return weights


def _of_variance(box: Box, moves: str) -> float:
    """Return the weight of the old variance, measured with a batch of almost no variance."""
    var = step(box, box.fresh(LOADED_MEAN, 1e6), box.alternating(8, 1e-3, LOADED_MEAN), moves)[1]
    return float(var[0] / 1e6)
