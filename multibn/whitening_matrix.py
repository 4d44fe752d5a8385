"""The whitening matrix W of a covariance, and the gradient through it: small float64 matrices, (groups, d, d) at a time.

With S = Sigma + eps I = U diag(r^2) U^T, and G = dL/dW, each kind's dL/dSigma is the symmetric part of:

zca: U (F * (U^T G U)) U^T, F the divided differences of f(l) = 1/sqrt(l+eps) (Daleckii & Krein; Higham, "Functions of Matrices",
    theorem 3.11). Usually written (f(l_i)-f(l_j))/(l_i-l_j), which is 0/0 for equal eigenvalues and loses its digits for
    near ones, it is -1/(r_i r_j (r_i+r_j)): no difference is left.
pca: by du_i = sum over j of u_j (u_j^T dSigma u_i)/(l_i-l_j), which does not exist for equal eigenvalues.
newton: the steps, backwards.
"""

from __future__ import annotations

import numpy as np

from .layer import Array
from .whitening import WhiteningSpec

_U = float(np.finfo(np.float64).eps)


def decompose(covariance: Array, spec: WhiteningSpec) -> Array:
    """What W and its gradient are made of, (groups, d, d+1): the eigenvectors as columns and, last, the eigenvalues; for "newton"
    the covariance itself. NaN for a group that is not finite.
    """
    factors = np.zeros((*covariance.shape[:2], covariance.shape[2] + 1))
    finite = np.isfinite(covariance).all(axis=(1, 2))
    factors[~finite] = np.nan
    if spec.kind == "newton":
        factors[finite, :, :-1] = covariance[finite]
    else:
        eigenvalues, vectors = eigenvectors(covariance[finite])
        factors[finite, :, :-1], factors[finite, :, -1] = vectors, eigenvalues
    return factors


def eigenvectors(covariance: Array) -> tuple[Array, Array]:
    """Eigenvalues (groups, d), the largest first, none below 0; eigenvectors in the columns, with the sign of WH-03."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
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
    if spec.kind == "newton":
        _, trace, steps = _newton(factors, spec)
        return np.asarray(steps[-1] / np.sqrt(trace))
    vectors, inverse = factors[..., :-1], 1 / np.sqrt(factors[..., -1] + spec.eps)
    scaled = np.swapaxes(vectors, 1, 2) * inverse[..., None]
    return np.asarray(scaled if spec.kind == "pca" else vectors @ scaled)


def adjoint(factors: Array, owed: Array, spec: WhiteningSpec, unit: float = _U) -> Array:
    """dL/dSigma, symmetric, for ``owed`` = dL/dW (WH-07); ``unit`` is that of the type that the covariance was summed in.

    Raises:
        ValueError: kind "pca", and two eigenvalues are equal.
    """
    if spec.kind == "newton":
        result = _newton_adjoint(factors, owed, spec)
    else:
        vectors, eigenvalues = factors[..., :-1], factors[..., -1]
        rows = np.swapaxes(vectors, 1, 2)
        root = np.sqrt(eigenvalues + spec.eps)
        if spec.kind == "zca":
            a, b = root[..., :, None], root[..., None, :]
            inner = rows @ owed @ vectors / -(a * b * (a + b))
        else:
            inner = _pca_inner(eigenvalues, root, owed @ vectors, unit)
        result = vectors @ inner @ rows
    return np.asarray((result + np.swapaxes(result, 1, 2)) / 2)


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
            f"{group} are {float(eigenvalues[group, i])!r} and {float(eigenvalues[group, i + 1])!r} (WH-07). Any rotation of their "
            "eigenvectors is right, so that the slightest change of the input may turn them. Use kind='zca', whose gradient exists."
        )
    return np.asarray(eigenvalues <= limit)


def _newton(factors: Array, spec: WhiteningSpec) -> tuple[Array, Array, list[Array]]:
    """N, tr(S) as (groups, 1, 1), and P_0 to P_T."""
    d = factors.shape[1]
    s = factors[..., :-1] + spec.eps * np.eye(d)
    trace = np.trace(s, axis1=1, axis2=2)[:, None, None]
    normalised = s / trace
    steps = [np.broadcast_to(np.eye(d), s.shape)]
    for _ in range(spec.steps):
        p = steps[-1]
        steps.append((3 * p - p @ p @ p @ normalised) / 2)
    return normalised, trace, steps


def _newton_adjoint(factors: Array, owed: Array, spec: WhiteningSpec) -> Array:
    n, trace, steps = _newton(factors, spec)  # every matrix of it is symmetric
    d_trace = -(owed * steps[-1]).sum(axis=(1, 2), keepdims=True) / (2 * trace**1.5)
    owed = owed / np.sqrt(trace)
    d_n = np.zeros_like(n)
    for p in steps[-2::-1]:
        square, flowing = p @ p, owed @ n
        d_n -= square @ p @ owed / 2
        owed = (3 * owed - flowing @ square - p @ flowing @ p - square @ flowing) / 2
    d_trace = d_trace - (d_n * n).sum(axis=(1, 2), keepdims=True) / trace
    return np.asarray(d_n / trace + d_trace * np.eye(n.shape[1]))
