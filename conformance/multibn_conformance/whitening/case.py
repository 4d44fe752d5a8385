"""What a case of whitening is: a sentence of a clause as data, with the bug that it catches; and recipes of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from multibn.layer.types import PARAMETER_TYPE, Array
from multibn.whitening.spec import WhiteningSpec

Observed = Literal["y", "dx", "dgamma", "dbeta", "moving_mean", "moving_covariance", "unchanged"]
Action = Literal["train", "infer", "backward", "refuse", "refuse backward"]
Planted = Literal["nothing", "nan", "inf", "constant channel", "dependent channels", "unit vectors"]

ALL_GRADIENTS: tuple[Observed, ...] = ("dx", "dgamma", "dbeta")
MOVING: tuple[Literal["moving_mean", "moving_covariance"], ...] = ("moving_mean", "moving_covariance")


@dataclass(frozen=True)
class Data:
    """An array to be made, (N, C, ...).

    Args:
        shape, dtype: of the array.
        seed: another seed, other values.
        mean: of every channel, about.
        spectrum: eigenvalues of the covariance of its channels, to the rounding of the type; repeated as often as there are
            channels for them. None: independent normal values of deviation 2, for a dy.
        planted: what is put there: a NaN or an Inf in channel 0; channel 1 constant; channel 1 twice channel 0; or, in place of
            all else, the unit vectors and their negatives, whose covariance has equal eigenvalues exactly.
    """

    shape: tuple[int, ...]
    seed: int = 0
    dtype: str = "float32"
    mean: float = 0.5
    spectrum: tuple[float, ...] | None = (4.0, 2.0, 1.0, 0.5)
    planted: Planted = "nothing"

    def array(self) -> Array:
        """The array, a new one each time."""
        n, c, *rest = self.shape
        m = n * int(np.prod(rest))
        draw = np.random.default_rng([1904, 3441, self.seed])
        values = draw.standard_normal((c, m))
        if self.spectrum is None:
            values *= 2
        elif m > c:
            values -= values.mean(axis=1, keepdims=True)
            rows = np.linalg.qr(values.T)[0].T * np.sqrt(m)  # covariance I
            turn = np.linalg.qr(draw.standard_normal((c, c)))[0]
            values = turn @ (np.sqrt(np.resize(self.spectrum, c))[:, None] * rows)
        if self.planted == "constant channel":
            values[1] = 0.0
        if self.planted == "dependent channels":
            values[1] = 2 * values[0]
        values = values if self.spectrum is None else values + self.mean
        if self.planted == "unit vectors":
            values = np.concatenate([np.eye(c), -np.eye(c)], axis=1)
        if self.planted in ("nan", "inf"):
            values[0, 0] = float(self.planted)
        return np.ascontiguousarray(np.moveaxis(values.reshape(c, n, *rest), 0, 1).astype(self.dtype))


@dataclass(frozen=True)
class Step:
    """One call. ``unchanged`` observes that the moving statistics have the very bits that they had before it."""

    do: Action
    data: Data
    observe: tuple[Observed, ...] = ()


@dataclass(frozen=True)
class WhiteningCase:
    """One thing that a whitening layer must do.

    Args:
        id: clause and name.
        clause: the clause that a subject breaks if it fails.
        comment: what the case does.
        catches: the bug that it catches, to follow "a whitening that".
        steps: the calls, in order, on a subject that was loaded with ``state``.
        features: channels.
        spec: of the subject.
        dtype: of the input, which tells the type of the state.
    """

    id: str
    clause: str
    comment: str
    catches: str
    steps: tuple[Step, ...]
    features: int
    spec: WhiteningSpec
    dtype: str = "float32"


def state(case: WhiteningCase) -> tuple[Array | None, Array | None, Array, Array]:
    """gamma, beta, moving mean and moving covariance to load. No value is special, every other gamma is negative."""
    draw = np.random.default_rng([2019, case.features])
    kind = PARAMETER_TYPE[case.dtype]
    gamma, beta, mean = (draw.normal(centre, 0.5, case.features) for centre in (1.5, 0.3, 0.2))
    gamma[1::2] *= -1
    d = case.features // case.spec.groups
    root = draw.standard_normal((case.spec.groups, d, d))
    covariance = (root @ np.swapaxes(root, 1, 2) / d + np.eye(d) * np.arange(1, d + 1)).astype(kind)
    covariance = (covariance + np.swapaxes(covariance, 1, 2)) / 2
    spec = case.spec
    return (
        gamma.astype(kind) if spec.scale else None,
        beta.astype(kind) if spec.center else None,
        mean.astype(kind),
        covariance.astype(kind),
    )
