"""Descriptions of arrays as small frozen data that give the same bits on every machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from multibn.layer.types import PARAMETER_TYPE, Array
from multibn.spec.batchnorm import BatchNormSpec

Kind = Literal[
    "normal",  # mean + std * N(0, 1)
    "constant",  # every value of a channel is the same
    "alternating",  # +value, -value, ... along a channel: the sum cancels
    "outlier",  # normal, and the first value of each channel is 1e6 times as large
    "nan",  # normal, and channel 1 has one NaN
    "inf",  # normal, and channel 1 has one infinity
    "digits-x",  # what the BatchNorm layer numbered by mean sees at training step seed
    "digits-dy",  # the gradient that comes back to it
]
Layout = Literal["contiguous", "transposed", "channels last", "sliced", "negative"]


@dataclass(frozen=True)
class Values:
    """An array to be made: batch, channel, then space.

    Args:
        shape: of the array.
        seed: another seed, other values.
        dtype: NumPy's name; integer types take the integer part.
        mean, std: of the normal values.
        kind: what is done to them.
        layout: how they lie in memory; the values are the same in every layout.
        planted: flat indices, modulo the size, and the values that are put there.
    """

    shape: tuple[int, ...]
    seed: int = 0
    dtype: str = "float32"
    mean: float = 0.5
    std: float = 2.0
    kind: Kind = "normal"
    layout: Layout = "contiguous"
    planted: tuple[tuple[int, float], ...] = ()

    def array(self) -> Array:
        """The array, a new one each time."""
        if self.kind.startswith("digits"):
            from multibn.digits import seen

            made = seen(layer=int(self.mean), step=self.seed, which=self.kind[-1])
        else:
            made = self._drawn()
        made = np.array(made, self.dtype)
        for index, value in self.planted:
            made.reshape(-1)[index % made.size] = value
        return _laid_out(made, self.layout)

    def _drawn(self) -> Array:
        noise = np.random.default_rng([20150211, self.seed]).standard_normal(self.shape)
        if self.kind == "constant":
            noise[:] = np.random.default_rng(self.seed).standard_normal(self.shape[1])[(None, ...) + (None,) * (noise.ndim - 2)]
        if self.kind == "alternating":
            noise = noise[:1, :, ...] * np.ones(self.shape)
            noise[1::2] *= -1
        made = self.mean + self.std * noise
        if self.kind == "outlier":
            made[0].reshape(self.shape[1], -1)[:, 0] *= 1e6
        if self.kind in ("nan", "inf"):
            made[-1, 1] = np.where(np.arange(made[-1, 1].size).reshape(made[-1, 1].shape) == 0, float(self.kind), made[-1, 1])
        return made


def _laid_out(a: Array, layout: Layout) -> Array:
    """The same values with other strides."""
    if layout == "transposed":
        return np.ascontiguousarray(a.T).T
    if layout == "channels last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)
    if layout == "sliced":
        wide = np.full((*a.shape[:-1], 2 * a.shape[-1] + 1), 77, a.dtype)
        wide[..., 1::2] = a
        return wide[..., 1::2]
    if layout == "negative":
        return np.ascontiguousarray(a[::-1, ..., ::-1])[::-1, ..., ::-1]
    return np.ascontiguousarray(a)


ZERO_GAMMA = 1000
"""The seed of a state whose last gamma is 0, as the last layer of a residual block begins."""


def state(features: int, dtype: str, seed: int, spec: BatchNormSpec) -> tuple[Array | None, Array | None, Array, Array]:
    """gamma, beta, moving mean and moving variance to load, (features,) each, of the type for input of ``dtype`` (BN-10).

    gamma and beta are None where the spec has none (BN-04). No value is special: not 0, not 1, no two alike; every other gamma
    is negative.
    """
    draw = np.random.default_rng([1502, 3167, seed])
    kind = PARAMETER_TYPE[dtype]
    gamma, beta, mean = (draw.normal(centre, 0.5, features).astype(kind) for centre in (1.5, 0.3, 0.2))
    var = draw.uniform(0.5, 2.0, features).astype(kind)
    gamma[1::2] *= -1
    if seed == ZERO_GAMMA:
        gamma[-1] = 0
    return gamma if spec.scale else None, beta if spec.center else None, mean, var
