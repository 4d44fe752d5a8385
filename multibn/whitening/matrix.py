"""The whitening matrix W of a covariance, and the gradient through it: small float64 matrices, (groups, d, d) at a time.

With S = Sigma + eps I = U diag(r^2) U^T, and G = dL/dW, each kind's dL/dSigma is the symmetric part of:

zca: U (F * (U^T G U)) U^T, F the divided differences of f(l) = 1/sqrt(l+eps) (Daleckii & Krein; Higham, "Functions of Matrices",
    theorem 3.11). The usual form (f(l_i)-f(l_j))/(l_i-l_j) is 0/0 for equal eigenvalues and cancels for near ones; the
    form -1/(r_i r_j (r_i+r_j)) has no difference.
pca: from du_i = sum over j of u_j (u_j^T dSigma u_i)/(l_i-l_j), which does not exist for equal eigenvalues.
newton: as zca, with f the polynomial that the iteration computes. Its divided differences follow from the same steps by the
    product rule, (fg)[i,j] = f_i g[i,j] + f[i,j] g_j; the trace adds a multiple of I. Iterating matrices would cost more and
    round more, for the same result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from multibn.layer.types import Array

from .spec import WhiteningSpec

_U = float(np.finfo(np.float64).eps)


Solver = Callable[[Array], tuple[Array, Array]]
"""A function like ``numpy.linalg.eigh``."""


def decompose(covariance: Array, solver: Solver = np.linalg.eigh) -> Array:
    """Return the factors of W and its gradient, (groups, d, d+1): the eigenvectors as columns, then the eigenvalues. NaN for a
    group that is not finite.
    """
    factors = np.full((*covariance.shape[:2], covariance.shape[2] + 1), np.nan)
    finite = np.isfinite(covariance).all(axis=(1, 2))
    factors[finite, :, -1], factors[finite, :, :-1] = eigenvectors(covariance[finite], solver)
    return factors


def eigenvectors(covariance: Array, solver: Solver = np.linalg.eigh) -> tuple[Array, Array]:
    """Return eigenvalues (groups, d), descending and >= 0, and eigenvectors in the columns, with the signs of WH-03."""
    eigenvalues, vectors = solver(covariance)
    eigenvalues, vectors = np.maximum(eigenvalues[:, ::-1], 0.0), vectors[:, :, ::-1]
    sizes = np.abs(vectors)
    first = np.argmax(sizes >= sizes.max(axis=1, keepdims=True) / 2, axis=1)[:, None, :]
    return eigenvalues, vectors * np.where(np.take_along_axis(vectors, first, axis=1) < 0, -1.0, 1.0)


def negligible(eigenvalues: Array, unit: float = _U) -> Array:
    """Return the bound below which an eigenvalue, or a difference of two, is rounding: (..., 1) for (..., d) in descending order.
    ``unit`` is the unit roundoff of the type in which the covariance was summed.
    """
    return np.asarray(8 * eigenvalues.shape[-1] * unit * eigenvalues[..., :1])


def matrix(factors: Array, spec: WhiteningSpec) -> Array:
    """Return W, (groups, d, d) (WH-03)."""
    vectors, eigenvalues = factors[..., :-1], factors[..., -1] + spec.eps
    rows = np.swapaxes(vectors, 1, 2)
    if spec.kind == "newton":
        trace = eigenvalues.sum(axis=1)[:, None, None]
        values, _ = _newton(eigenvalues[..., None] / trace, spec.steps)
        return np.asarray(vectors @ (rows * values) / np.sqrt(trace))
    scaled = rows / np.sqrt(eigenvalues)[..., None]
    return np.asarray(scaled if spec.kind == "pca" else vectors @ scaled)


def adjoint(factors: Array, cotangent: Array, spec: WhiteningSpec, unit: float = _U) -> Array:
    """Return dL/dSigma, symmetric, for ``cotangent`` = dL/dW (WH-07); ``unit`` as for ``negligible``.

    Raises:
        ValueError: kind "pca", and two eigenvalues are equal.
    """
    vectors, eigenvalues = factors[..., :-1], factors[..., -1]
    rows = np.swapaxes(vectors, 1, 2)
    root = np.sqrt(eigenvalues + spec.eps)
    if spec.kind == "zca":
        a, b = root[..., :, None], root[..., None, :]
        inner = rows @ cotangent @ vectors / -(a * b * (a + b))
    elif spec.kind == "newton":
        inner = _newton_inner(eigenvalues + spec.eps, rows @ cotangent @ vectors, spec.steps)
    else:
        inner = _pca_inner(eigenvalues, root, cotangent @ vectors, unit)
    result = vectors @ inner @ rows
    return np.asarray((result + np.swapaxes(result, 1, 2)) / 2)


def _newton_inner(eigenvalues: Array, cotangent: Array, steps: int) -> Array:
    """Return dL/dSigma in the eigenvectors' basis; ``cotangent`` is dL/dW in that basis. W = P_T(S/t)/sqrt(t), t = tr(S)."""
    trace = eigenvalues.sum(axis=1)[:, None, None]
    values, quotients = _newton(eigenvalues[..., None] / trace, steps)
    inner = cotangent * quotients / trace**1.5
    diagonal = np.arange(eigenvalues.shape[1])
    of_w = (cotangent[:, diagonal, diagonal] * values[..., 0]).sum(axis=1) / np.sqrt(trace[:, 0, 0])
    of_s = (inner[:, diagonal, diagonal] * eigenvalues).sum(axis=1)
    inner[:, diagonal, diagonal] -= ((of_w / 2 + of_s) / trace[:, 0, 0])[:, None]
    return np.asarray(inner)


def _newton(z: Array, steps: int) -> tuple[Array, Array]:
    """Return the polynomial P_T at the eigenvalues z (groups, d, 1) of N, and its divided differences (groups, d, d)."""
    across = np.swapaxes(z, 1, 2)
    p, quotients = np.ones_like(z), np.zeros(np.broadcast_shapes(z.shape, across.shape))
    for _ in range(steps):
        q = np.swapaxes(p, 1, 2)
        quotients = (3 * quotients - p**3 - quotients * (p**2 + p * q + q**2) * across) / 2
        p = (3 * p - p**3 * z) / 2
    return p, quotients


def _pca_inner(eigenvalues: Array, root: Array, cotangent: Array, unit: float) -> Array:
    """Return dL/dSigma in the eigenvectors' basis; ``cotangent`` is dL/dW in that basis."""
    null = without_variance(eigenvalues, unit)
    gaps = eigenvalues[..., :, None] - eigenvalues[..., None, :]
    gaps[null[..., :, None] & null[..., None, :]] = np.inf  # held fixed
    diagonal = np.arange(eigenvalues.shape[-1])
    gaps[..., diagonal, diagonal] = np.inf
    inner = cotangent / (root[..., :, None] * gaps)
    inner[..., diagonal, diagonal] = cotangent[..., diagonal, diagonal] / (-2 * root**3)
    return np.asarray(inner)


def without_variance(eigenvalues: Array, unit: float = _U) -> Array:
    """Return which eigenvalues are 0 up to rounding, (groups, d): see ``negligible``.

    Raises:
        ValueError: two others are equal, where PCA has no gradient (WH-07).
    """
    limit = negligible(eigenvalues, unit)
    equal = -np.diff(eigenvalues, axis=-1) <= limit
    bad = np.argwhere(equal & (eigenvalues[..., :-1] > limit))
    if len(bad):
        group, i = (int(each) for each in bad[0])
        raise ValueError(
            f"kind='pca' has no gradient where eigenvalues of the covariance are equal: those numbered {i} and {i + 1} of group "
            f"{group} are {float(eigenvalues[group, i])!r} and {float(eigenvalues[group, i + 1])!r} (WH-07). Any "
            "rotation of their eigenvectors is right, so that the slightest change of the input may turn them. Use kind='zca', "
            "whose gradient exists."
        )
    return np.asarray(eigenvalues <= limit)
