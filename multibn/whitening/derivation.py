"""The article's whitening of a batch, computed directly: ``whiten``."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from multibn.layer.types import PARAMETER_TYPE, Array
from multibn.spec.parameters import one_of, real_number


class Whitened(NamedTuple):
    """The results of the article's derivation, step by step, in float64.

    Args:
        output: (n, d), the whitened samples.
        mean, std: (d,), used to standardise; std is 1 without ``standardise``.
        covariance: (d, d), of the standardised samples.
        eigenvalues: (d,), in descending order.
        rotation: U, (d, d), an eigenvector in each row.
        matrix: W, (d, d): ``output = standardised @ matrix.T``.
    """

    output: Array
    mean: Array
    std: Array
    covariance: Array
    eigenvalues: Array
    rotation: Array
    matrix: Array


def whiten(
    x: Array, kind: Literal["pca", "zca"] = "pca", *, eps: float = 1e-12, standardise: bool = True, unbiased: bool = False
) -> Whitened:
    """Whiten samples as the article derives it (WH-02, WH-03).

    Standardise each feature; take the covariance; decompose it; rotate, X_PCA = U X; divide each row by the root of its
    eigenvalue. ZCA rotates back, by U^T. The covariance of the result is the identity.

    Args:
        x: (n, d), a sample in each row, as in scikit-learn; floating point.
        kind: "pca" or "zca".
        eps: added to the eigenvalues, so that the variance of a direction with a tiny eigenvalue l becomes l/(l+eps), about 0.
            With eps=0 an eigenvalue of 0 is an error.
        standardise: divide by the standard deviation first, as the article does; a constant feature becomes 0. Otherwise
            only subtract the mean, as scikit-learn's PCA does.
        unbiased: divide the covariance by n-1 in place of n, as scikit-learn does.

    Raises:
        TypeError: x is not floating point.
        ValueError: x is not (n, d) with n >= 2 and d >= 1, has a NaN or Inf; kind or eps is not allowed; or eps=0 and there is a
            direction without variance.

    >>> x = np.array([[0.0, 0.0], [2.0, 2.0], [0.0, 2.0], [2.0, 0.0], [4.0, 4.0], [-2.0, -2.0]])
    >>> done = whiten(x, eps=0)
    >>> bool(np.allclose(done.output.T @ done.output / len(x), np.eye(2)))
    True
    """
    from .matrix import eigenvectors, negligible

    one_of("kind", kind, ("pca", "zca"), "WH-03")
    eps = real_number("eps", eps, "a finite number >= 0")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number >= 0, got {eps!r} (WH-03). The article's is 1e-12.")
    if x.dtype.name not in PARAMETER_TYPE:
        raise TypeError(f"expected samples of a floating type, got {x.dtype} (WH-09). Convert them to float64 first.")
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
        raise ValueError(
            f"expected samples of shape (n, d) with n >= 2 and d >= 1, got {x.shape} (WH-01). One sample is its own mean, so its "
            "covariance is 0."
        )
    values = x.T.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("expected finite samples, got NaN or Inf (WH-08). Leave those samples or features out.")
    d, n = values.shape
    mean = values.mean(axis=1)
    values -= mean[:, None]
    std = np.ones(d)
    degrees = n - 1 if unbiased else n
    if standardise:
        std = np.sqrt((values**2).sum(axis=1) / degrees)
        constant = std <= np.abs(mean) * np.finfo(np.float64).eps * math.sqrt(n)  # only the rounding of the mean
        std[constant], values[constant] = 1.0, 0.0
        values /= std[:, None]
    covariance = values @ values.T / degrees
    eigenvalues, columns = eigenvectors(covariance[None])
    eigenvalues, rotation = eigenvalues[0], columns[0].T
    rank = int((eigenvalues > negligible(eigenvalues)).sum())
    if eps == 0 and rank < d:
        raise ValueError(
            f"eps=0 needs variance in every direction, got {rank} of {d} with {n} samples (WH-08). Give an eps > 0, such as "
            "1e-12, or leave out features that are constant or depend on others."
        )
    eigenvalues[rank:] = 0.0
    matrix = rotation / np.sqrt(eigenvalues + eps)[:, None]
    matrix[rank:] = 0.0  # only rounding is left in these directions; do not amplify it
    if kind == "zca":
        matrix = rotation.T @ matrix
    return Whitened((matrix @ values).T, mean, std, covariance, eigenvalues, rotation, matrix)
