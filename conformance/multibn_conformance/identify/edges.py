"""Edge cases in training: one value, an empty batch, NaN and infinity, and the accepted types."""

from __future__ import annotations

import numpy as np

from multibn.layer.types import Array

from .affine import BETA
from .box import FEATURES, LOADED_MEAN, LOADED_VAR, Box, Finding, LoadedSubject, Refused, Undetermined, near

TYPES = ("float16", "float32", "float64", "int32", "bool")


def one_value(box: Box, moves: Finding) -> Finding:
    """Value: "refused"; "NaN" if the output or a moving statistic is; else of the output: "beta", "input" or "other"."""
    subject = box.fresh(beta=BETA)
    x = box.values(1, 3.0, 1.0)
    how = f"training forward of shape {x.shape}"
    try:
        y = subject.forward(x, True)
    except Refused as refused:
        return Finding("one value per channel", f"refused: {_why(refused)}", how, "refused")
    flat = y.reshape(FEATURES)
    known = {"y is beta": BETA, "y is 0": np.zeros(FEATURES), "y is x": x.reshape(FEATURES).astype(np.float64)}
    words = next((text for text, a in known.items() if near(flat, a, 1e-3)), f"y is {flat[0]:.4g}")
    state = _state_words(subject, x, moves)
    value = {"y is beta": "beta", "y is 0": "beta", "y is x": "input"}.get(words, "other")
    return Finding("one value per channel", f"{words}; {state}", how, "NaN" if "NaN" in state or "nan" in words else value)


def empty(box: Box, moves: Finding) -> Finding:
    """Value: "refused", "kept", "NaN" or "changed" (of the moving statistics)."""
    subject = box.fresh()
    x = box.values(8, 0.0, 1.0)[:0]
    how = f"training forward of shape {x.shape}"
    try:
        y = subject.forward(x, True)
    except Refused as refused:
        return Finding("empty batch", f"refused: {_why(refused)}", how, "refused")
    words = _state_words(subject, x, moves)
    value = "kept" if words.endswith("stay") else "NaN" if "NaN" in words else "changed"
    return Finding("empty batch", f"the output is empty; {words}" if y.size == 0 else words, how, value)


def poisoned(box: Box, moves: Finding, what: str) -> Finding:
    """Value: "kept" or "poisoned" (its moving statistics), or "spread" where other channels suffer. what: "nan" or "inf"."""
    subject = box.fresh()
    x = box.values(8, 0.0, 1.0)
    x[(0, 1, *[0] * (x.ndim - 2))] = float(what)
    name, how = {"nan": "NaN", "inf": "infinity"}[what], f"training forward of shape {x.shape} with one {what} in channel 1"
    try:
        y = subject.forward(x, True)
    except Refused as refused:
        return Finding(f"{name} in the input", f"refused: {_why(refused)}", how, "refused")
    mean, var = _after(subject, x, moves)
    others = [0, 2]
    if not (np.all(np.isfinite(y[:, others])) and np.all(np.isfinite(mean[others])) and np.all(np.isfinite(var[others]))):
        return Finding(f"{name} in the input", "spreads to other channels", how, "spread")
    kept = mean[1] == LOADED_MEAN and var[1] == LOADED_VAR
    value = "kept" if kept else "poisoned" if not (np.isfinite(mean[1]) and np.isfinite(var[1])) else "other"
    state = "stay" if kept else f"become {mean[1]:g} and {var[1]:g}"
    return Finding(f"{name} in the input", f"stays in its channel, whose moving statistics {state}", how, value)


def types(box: Box) -> Finding:
    """Value: input type -> (output type, type of the moving statistics), or None where it is refused."""
    told: dict[str, tuple[str, str] | None] = {}
    words = []
    for dtype in TYPES:
        x = box.values(8, 3.0, 2.0).astype(dtype)
        try:
            subject = box.fresh(dtype=dtype)
            y = subject.raw_forward(x, True)
            if not isinstance(y, np.ndarray):
                raise Undetermined(f"forward returned {type(y).__name__}")
            mean, _ = subject.raw_moving()
            told[dtype] = y.dtype.name, mean.dtype.name
            words.append(f"{dtype} gives {y.dtype}, statistics {mean.dtype}")
        except Refused as refused:
            told[dtype] = None
            words.append(f"{dtype} is refused ({str(refused).split(': ')[0].rsplit(' ', 1)[-1]})")
    how = "training forwards, the state loaded as float64 for float64 and float32 for others; NumPy has no bfloat16 to try"
    return Finding("types", "; ".join(words), how, told)


def _why(refused: Refused) -> str:
    """Return an exception's class and message; of a long message, the first line that is not part of a traceback."""
    kind, _, message = str(refused).removeprefix("forward raised ").partition(": ")
    told = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith(("Traceback", " "))]
    return f"{kind}: {told[0] if told else 'without a message'}"[:200]


def _after(subject: LoadedSubject, x: Array, moves: Finding) -> tuple[Array, Array]:
    """Return the moving statistics, after a backward if the update needs it."""
    if moves.value in ("backward", "both"):
        subject.backward(np.zeros_like(x))
    return subject.moving()


def _state_words(subject: LoadedSubject, x: Array, moves: Finding) -> str:
    try:
        mean, var = _after(subject, x, moves)
    except Undetermined as reason:
        return f"of the moving statistics nothing can be told, for {reason}"
    if np.all(mean == LOADED_MEAN) and np.all(var == LOADED_VAR):
        return "the moving statistics stay"
    return f"moving mean {_times(mean, LOADED_MEAN)}, moving variance {_times(var, LOADED_VAR)}"


def _times(a: Array, loaded: float) -> str:
    return "becomes NaN" if np.any(np.isnan(a)) else "stays" if np.all(a == loaded) else f"goes from {loaded:g} to {a[0]:.6g}"
