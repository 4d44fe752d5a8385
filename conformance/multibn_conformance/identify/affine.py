"""gamma and beta: whether they act, stay as loaded, and get gradients."""

from __future__ import annotations

import numpy as np

from multibn.layer.types import Array

from .box import Box, Finding, LoadedSubject, Undetermined, near, statistics
from .normalising import CLOSE, normalised

GAMMA, BETA = np.array([2.0, -3.0, 0.5]), np.array([1.0, 2.0, -4.0])


def gamma(box: Box, training: Finding, inference: Finding) -> Finding:
    """Value: "acts", "acts, not learned", "fixed" (at 1), "overwritten" or "none"."""
    seen, gradient = _seen(box, training, inference, "gamma")
    how = "; ".join(f"{when}: {_list(a)}" for when, a in seen.items()) + f"; loaded {_list(GAMMA)}"
    as_loaded = [near(a, GAMMA, 2 * CLOSE) for a in seen.values()]
    ones = [near(a, np.ones(3), 2 * CLOSE) for a in seen.values()]
    if all(as_loaded):
        return _acting("gamma", how, gradient)
    if all(ones):
        none = gradient is None
        words = (
            "there is none: it counts as 1 and gets no gradient"
            if none
            else "fixed at 1 whatever is loaded, though backward gives one"
        )
        return Finding("gamma", words, how, "none" if none else "fixed")
    if as_loaded[0] and any(ones):
        when = list(seen)[ones.index(True)]
        return Finding("gamma", f"acts as loaded, then overwritten with 1 ({when})", how, "overwritten")
    raise Undetermined(f"the output's slope is neither gamma nor 1: {how}")


def beta(box: Box, training: Finding, inference: Finding) -> Finding:
    """Value: "acts", "acts, not learned", "fixed" (at 0) or "none"."""
    seen, gradient = _seen(box, training, inference, "beta")
    how = "; ".join(f"{when}: {_list(a)}" for when, a in seen.items()) + f"; loaded {_list(BETA)}"
    if all(near(a, BETA, 2 * CLOSE) for a in seen.values()):
        return _acting("beta", how, gradient)
    if all(np.all(np.abs(a) < 2 * CLOSE) for a in seen.values()):
        none = gradient is None
        return Finding(
            "beta", "there is none" if none else "fixed at 0, though backward gives a gradient", how, "none" if none else "fixed"
        )
    raise Undetermined(f"the output's offset is neither beta nor 0: {how}")


def _acting(name: str, how: str, gradient: Array | str | None) -> Finding:
    if isinstance(gradient, str):
        return Finding(name, f"acts as loaded; whether it is learned cannot be told, for {gradient}", how, "acts")
    if gradient is None:
        return Finding(name, "acts as loaded, and gets no gradient", how, "acts, not learned")
    return Finding(name, "acts as loaded, and gets a gradient", how, "acts")


def _seen(box: Box, training: Finding, inference: Finding, which: str) -> tuple[dict[str, Array], Array | str | None]:
    """Measure the slope or offset of each channel, and the gradient, or the reason that there is none."""
    if training.value is None:
        raise Undetermined("it is not known what normalises in training")
    subject = box.fresh(gamma=GAMMA, beta=BETA)
    line = 0 if which == "gamma" else 1
    seen = {}
    if inference.value is not None:
        which_infers = "moving" if inference.value in ("keeps", "moves") else str(inference.value)
        seen["inference"] = _line(box, subject, which_infers, False)[line]
    seen["training"] = _line(box, subject, str(training.value), True)[line]
    gradient: Array | str | None
    try:
        made = subject.backward(box.values(8, 0.0, 1.0, 7))
        gradient = made.dgamma if which == "gamma" else made.dbeta
    except Undetermined as reason:
        gradient = str(reason)
    seen["training, after a backward"] = _line(box, subject, str(training.value), True)[line]
    return seen, gradient


def _line(box: Box, subject: LoadedSubject, which: str, training: bool) -> tuple[Array, Array]:
    """Return slope and offset, (3,) each, of y as a function of the normalised input."""
    x = box.values(8, 50.0, 30.0, 3)
    before = subject.moving() if which == "moving" else None
    y = subject.forward(x, training)
    mean, var = before or statistics(x)
    if which == "batch unbiased":
        var = var * 8 / 7
    if which == "updated":
        mean, var = subject.moving()
    return fitted_line(normalised(x, mean, var), y)


def fitted_line(xhat: Array, y: Array) -> tuple[Array, Array]:
    """Return slope and offset of each channel, (C,) each."""
    fits = np.array([np.polyfit(xhat[:, c].ravel(), y[:, c].ravel(), 1) for c in range(y.shape[1])])
    return fits[:, 0], fits[:, 1]


def _list(a: Array) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in a) + "]"
