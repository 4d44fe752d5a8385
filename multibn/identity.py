"""``init="identity"``: gamma and beta that make the first training batch pass a layer unchanged.

Ioffe & Szegedy, section 3: gamma and beta can undo the normalisation. gamma*(x-mean)/sqrt(var+eps) + beta is x
where beta = mean and gamma = sqrt(var+eps). The article says that gamma is the variance; its root is meant.

The distance of y from x: gamma and beta are rounded to their type, with a relative error of at most u (2^-24 for float32). So the
exact value of BN-04 for the stored gamma and beta is off by at most u*|x-mean| + u*|mean|, and y is off from that value by what
BN-16 allows. ``bound`` is the sum.
"""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

import numpy as np

from . import reference
from .layer.types import Array
from .spec.batchnorm import BatchNormSpec

Init = Literal["standard", "identity"]
"""Initial gamma and beta: 1 and 0, or the values that make the layer the identity on the first training batch."""

_MADE: Final = {"gamma": 1, "beta": 0, "moving_mean": 0, "moving_var": 1}


def check_init(init: object, spec: BatchNormSpec) -> None:
    """Raise ValueError if a layer of this spec cannot be initialised so."""
    if init not in get_args(Init):
        raise ValueError(f"init must be {' or '.join(map(repr, get_args(Init)))}, got {init!r}.")
    if init == "identity" and not (spec.scale and spec.center and spec.normalize_with == "batch"):
        raise ValueError(
            "init='identity' needs a gamma, a beta and normalize_with='batch', for it sets both from the batch that normalises, "
            f"got scale={spec.scale}, center={spec.center}, normalize_with={spec.normalize_with!r}. Use init='standard'."
        )


def untouched(gamma: Array, beta: Array, moving_mean: Array | None, moving_var: Array | None) -> bool:
    """Whether a layer has its initial state: gamma 1, beta 0, moving mean 0, moving variance 1; None for an absent one.

    Only such a layer is made the identity, so loaded, learned and hand-set values stay.
    """
    state = zip((gamma, beta, moving_mean, moving_var), _MADE.values(), strict=True)
    return all(a is None or bool((a == made).all()) for a, made in state)


def parameters(x: Array, eps: float, kind: Any, channel_axis: int = 1) -> tuple[Array, Array]:
    """Return gamma and beta, (C,) of type kind, that make training on x the identity; 1 and 0 where not finite (BN-11)."""
    mean, var = reference.statistics(reference.by_channel(x, channel_axis))
    with np.errstate(over="ignore", invalid="ignore"):
        gamma, beta = np.sqrt(var + eps).astype(kind), mean.astype(kind)
    finite = np.isfinite(gamma) & np.isfinite(beta)
    return np.where(finite, gamma, gamma.dtype.type(1)), np.where(finite, beta, beta.dtype.type(0))


def bound(x: Array, eps: float) -> Array:
    """The largest distance of y from x that an exact implementation may have, of x's shape; derived at the top of this file."""
    values = reference.by_channel(x, 1)
    mean, var = (a[:, None] for a in reference.statistics(values))
    double = x.dtype == np.float64
    u, ulps = (2.0**-53, 1.0) if double else (2.0**-24, 0.51)
    gamma = np.sqrt(var + eps)
    scale = gamma * np.maximum(1, np.abs(values - mean) / gamma) + np.abs(mean) if double else gamma
    rounded = u * (np.abs(values - mean) + np.abs(mean))
    top = (np.abs(values) + rounded).astype(x.dtype)
    allowed = ulps * np.spacing(top).astype(np.float64) + 1e-14 * np.sqrt(1 + mean**2 / (var + eps)) * scale
    bound: Array = (rounded + allowed).reshape(x.shape)
    return bound
