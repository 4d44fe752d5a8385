"""The whitening matrix W of a covariance, and the gradient through it: small float64 matrices, (groups, d, d) at a time.

With S = Sigma + eps I = U diag(r^2) U^T, and G = dL/dW, each kind's dL/dSigma is the symmetric part of:

zca: U (F * (U^T G U)) U^T, F the divided differences of f(l) = 1/sqrt(l+eps) (Daleckii & Krein; Higham, "Functions of Matrices",
    theorem 3.11). Usually written (f(l_i)-f(l_j))/(l_i-l_j), which is 0/0 for equal eigenvalues and loses its digits for
    near ones, it is -1/(r_i r_j (r_i+r_j)): no difference is left.
pca: by du_i = sum over j of u_j (u_j^T dSigma u_i)/(l_i-l_j), which does not exist for equal eigenvalues.
newton: as zca, f being the polynomial that the steps are, whose divided differences come by the same steps from the rule for
    products, (fg)[i,j] = f_i g[i,j] + f[i,j] g_j; the trace adds a multiple of I. The steps themselves would cost more, their
    roundings grow, and the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from multibn.layer.types import Array

from .spec import WhiteningSpec

_U = float(np.finfo(np.float64).eps)


Solver = Callable[[Array], tuple[Array, Array]]
"""As ``numpy.linalg.eigh``."""


def decompose(covariance: Array, solver: Solver = np.linalg.eigh) -> Array:
    """What W and its gradient are made of, (groups, d, d+1): the eigenvectors as columns and, last, the eigenvalues. NaN for a
    group that is not finite.
    """
    factors = np.full((*covariance.shape[:2], covariance.shape[2] + 1), np.nan)
    finite = np.isfinite(covariance).all(axis=(1, 2))
    factors[finite, :, -1], factors[finite, :, :-1] = eigenvectors(covariance[finite], solver)
    return factors


def eigenvectors(covariance: Array, solver: Solver = np.linalg.eigh) -> tuple[Array, Array]:
    """Eigenvalues (groups, d), the largest first, none below 0; eigenvectors in the columns, with the sign of WH-03."""
    eigenvalues, vectors = solver(covariance)
    eigenvalues, vectors = np.maximum(eigenvalues[:, ::-1], 0.0), vectors[:, :, ::-1]
    sizes = np.abs(vectors)
    first = np.argmax(sizes >= sizes.max(axis=1, keepdims=True) / 2, axis=1)[:, None, :]
    return eigenvalues, vectors * np.where(np.take_along_axis(vectors, first, axis=1) < 0, -1.0, 1.0)


def negligible(eigenvalues: Array, unit: float = _U) -> Array:
    """Up to here an eigenvalue, or the difference of two, is rounding: (..., 1) for (..., d), the largest first; ``unit`` is that
    of the type that the covariance was summed in.
    """
    return np.asarray(8 * eigenvalues.shape[-1] * unit * eigenvalues[..., :1])


def matrix(factors: Array, spec: WhiteningSpec) -> Array:
    """W, (groups, d, d) (WH-03)."""
    vectors, eigenvalues = factors[..., :-1], factors[..., -1] + spec.eps
    rows = np.swapaxes(vectors, 1, 2)
    if spec.kind == "newton":
        trace = eigenvalues.sum(axis=1)[:, None, None]
        values, _ = _newton(eigenvalues[..., None] / trace, spec.steps)
        return np.asarray(vectors @ (rows * values) / np.sqrt(trace))
    scaled = rows / np.sqrt(eigenvalues)[..., None]
    return np.asarray(scaled if spec.kind == "pca" else vectors @ scaled)


def adjoint(factors: Array, owed: Array, spec: WhiteningSpec, unit: float = _U) -> Array:
    """dL/dSigma, symmetric, for ``owed`` = dL/dW (WH-07); ``unit`` is that of the type that the covariance was summed in.

    Raises:
        ValueError: kind "pca", and two eigenvalues are equal.
    """
    vectors, eigenvalues = factors[..., :-1], factors[..., -1]
    rows = np.swapaxes(vectors, 1, 2)
    root = np.sqrt(eigenvalues + spec.eps)
    if spec.kind == "zca":
        a, b = root[..., :, None], root[..., None, :]
        inner = rows @ owed @ vectors / -(a * b * (a + b))
    elif spec.kind == "newton":
        inner = _newton_inner(eigenvalues + spec.eps, rows @ owed @ vectors, spec.steps)
    else:
        inner = _pca_inner(eigenvalues, root, owed @ vectors, unit)
    result = vectors @ inner @ rows
    return np.asarray((result + np.swapaxes(result, 1, 2)) / 2)


def _newton_inner(eigenvalues: Array, owed: Array, steps: int) -> Array:
    """dL/dSigma in the basis of the eigenvectors; ``owed`` is dL/dW in it. W = P_T(S/t)/sqrt(t), t = tr(S)."""
    trace = eigenvalues.sum(axis=1)[:, None, None]
    values, quotients = _newton(eigenvalues[..., None] / trace, steps)
    inner = owed * quotients / trace**1.5
    diagonal = np.arange(eigenvalues.shape[1])
    of_w = (owed[:, diagonal, diagonal] * values[..., 0]).sum(axis=1) / np.sqrt(trace[:, 0, 0])
    of_s = (inner[:, diagonal, diagonal] * eigenvalues).sum(axis=1)
    inner[:, diagonal, diagonal] -= ((of_w / 2 + of_s) / trace[:, 0, 0])[:, None]
    return np.asarray(inner)


def _newton(z: Array, steps: int) -> tuple[Array, Array]:
    """The polynomial P_T at the eigenvalues z (groups, d, 1) of N, and its divided differences (groups, d, d)."""
    across = np.swapaxes(z, 1, 2)
    p, quotients = np.ones_like(z), np.zeros(np.broadcast_shapes(z.shape, across.shape))
    for _ in range(steps):
        q = np.swapaxes(p, 1, 2)
        quotients = (3 * quotients - p**3 - quotients * (p**2 + p * q + q**2) * across) / 2
        p = (3 * p - p**3 * z) / 2
    return p, quotients


def _pca_inner(eigenvalues: Array, root: Array, owed: Array, unit: float) -> Array:
    """dL/dSigma in the basis of the eigenvectors; ``owed`` is dL/dW in it."""
    null = without_variance(eigenvalues, unit)
    gaps = eigenvalues[..., :, None] - eigenvalues[..., None, :]
    gaps[null[..., :, None] & null[..., None, :]] = np.inf  # held fixed
    diagonal = np.arange(eigenvalues.shape[-1])
    gaps[..., diagonal, diagonal] = np.inf
    inner = owed / (root[..., :, None] * gaps)
    inner[..., diagonal, diagonal] = owed[..., diagonal, diagonal] / (-2 * root**3)
    return np.asarray(inner)


def without_variance(eigenvalues: Array, unit: float = _U) -> Array:
    """Which eigenvalues are 0, (groups, d), to rounding: see ``negligible``.

    Raises:
        ValueError: two others are equal, so that PCA has no gradient (WH-07).
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
