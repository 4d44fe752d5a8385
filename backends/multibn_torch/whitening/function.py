"""Whitening on CPU tensors: ``multibn.whitening.kernel`` with PyTorch's matrix products and threads for the passes over the data.

NumPy's BLAS has a thread pool of its own, which would compete with PyTorch's for the processors. Mean, covariance and everything
computed from them are float64, and the matrices come from ``multibn.whitening.matrix``, as in every backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from multibn.layer.types import Array
from multibn.whitening.kernel import Saved, merged, scaled, times, update
from multibn.whitening.matrix import adjoint, decompose, matrix
from multibn.whitening.spec import WhiteningSpec
from multibn_torch.forward.eager import PARAMETER, output_like
from multibn_torch.forward.gate import check_memory, is_plain, refusal

CACHE = 1 << 20
"""Approximate number of values in a block of samples."""

NARROW = 64
"""Samples with fewer values per channel are first concatenated, since matrix products with few columns are slow."""


class Whiten(torch.autograd.Function):
    """``apply(x, gamma, beta, (moving_mean, moving_covariance), spec, training, batches)``; raises on a second derivative."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: tuple[Tensor, Tensor], spec: WhiteningSpec,
        training: bool, batches: int,
    ) -> Tensor:  # fmt: skip
        """Return y; in training, update the moving statistics in place."""
        ctx.save_for_backward(x, gamma)
        ctx.spec, ctx.has_beta, ctx.seen = spec, beta is not None, (x.dtype, x.shape)
        values, (mean, covariance) = _samples(x, spec.groups), (t.numpy() for t in moving)
        training = training and x.numel() > 0
        if training:
            _check_apart(mean, covariance, *(t.detach().numpy() for t in (gamma, beta) if t is not None))
        old = mean, covariance
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            if training:
                mean, covariance = batch = _statistics(values)
            ctx.saved = saved = Saved(mean.astype(np.float64), decompose(covariance.astype(np.float64), _eigh), training)
            w = scaled(matrix(saved.factors, spec), None if gamma is None else gamma.numpy())
            near, missed = _near(saved.mean, values)
            added = (0.0 if beta is None else beta.numpy().astype(np.float64)) - times(w, missed)
        a, shift = _like(w, near), _like(added, near).view_as(near)
        out = output_like(values)
        centred = _like_block(values, near.dtype)
        for block, target in _blocks(values, out):
            _product(a, _less(block, near, centred), target, shift)
        if training:  # when nothing can fail any more
            with np.errstate(invalid="ignore", over="ignore", under="ignore"):
                update(*old, *batch, spec.weight_of_old(batches))
        return _restored(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Return the gradients of x, gamma and beta."""
        x, gamma = ctx.saved_tensors
        spec, saved = ctx.spec, ctx.saved
        _check_saved(x, gamma, *ctx.seen)
        values, slopes = _samples(x, spec.groups), _samples(dy, spec.groups)
        groups, d = saved.factors.shape[:2]
        near, missed = _near(saved.mean, values)
        products, dbeta = torch.zeros((groups, d, d), dtype=torch.float64), torch.zeros((groups, d), dtype=torch.float64)
        centred, made = _like_block(values, near.dtype), _like_block(values, near.dtype)
        for block, slope in _blocks(values, slopes):
            slope = slope.to(near.dtype)
            dbeta += slope.sum((0, 3), dtype=torch.float64)
            products += (slope @ _less(block, near, centred).mT).sum(0, dtype=torch.float64)
        owed, sums = products.numpy(), dbeta.numpy().reshape(-1)
        scale = None if gamma is None else gamma.detach().numpy()
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            owed -= sums.reshape(groups, d, 1) * missed.reshape(groups, 1, d)
            w = matrix(saved.factors, spec)
            dgamma = (owed * w).sum(axis=2).reshape(-1)
            transposed, through, shift = np.swapaxes(scaled(w, scale), 1, 2), None, None
            if saved.through_statistics:
                m = x.numel() // len(dgamma)
                flowing = adjoint(saved.factors, scaled(owed, scale), spec) * (2 / m)
                shift = _like(-times(transposed, sums / m) - times(flowing, missed), near).view_as(near)
                through = _like(flowing, near)
        back = _like(transposed, near)
        out = output_like(values)
        for block, slope, target in _blocks(values, slopes, out):
            if through is None:
                _product(back, slope.to(near.dtype), target)
            else:
                first = _product(through, _less(block, near, centred), made[: len(block)], shift)
                _product(back, slope.to(near.dtype), target, first)
        kind = PARAMETER[x.dtype]
        its = [
            torch.from_numpy(g).to(kind) if there else None for g, there in ((dgamma, gamma is not None), (sums, ctx.has_beta))
        ]
        return _restored(out, x), *its, None, None, None, None


def _check_apart(mean: Array, covariance: Array, *read: Array) -> None:
    """Raise RuntimeError unless the moving statistics may be written to: not expanded, and sharing memory with nothing else."""
    others = {"running_mean": (covariance, *read), "running_covariance": (mean, *read)}
    for (name, its), written in zip(others.items(), (mean, covariance), strict=True):
        expanded = any(n > 1 and step == 0 for n, step in zip(written.shape, written.strides, strict=True))
        if expanded or any(np.may_share_memory(written, other) for other in its):
            raise RuntimeError(
                f"{name} must have memory of its own for each value, since it is written to, got an expanded tensor or one that "
                "shares memory. Call .clone() on it."
            )


def _check_saved(x: Tensor, gamma: Tensor | None, dtype: torch.dtype, shape: torch.Size) -> None:
    """Raise RuntimeError if x or gamma are not what forward saved."""
    kind = PARAMETER[dtype]
    for t, its, size, name in ((x, dtype, shape, "the input"), (gamma, kind, shape[1:2], "weight")):
        if t is not None:
            if not is_plain(t):
                raise refusal(t, its, name)
            check_memory(t, its, size, name, "forward saved")


def _samples(x: Tensor, groups: int) -> Tensor:
    """Return x as contiguous (N, groups, d, S); concatenate narrow samples into one."""
    x = x.detach()
    n, c = x.shape[:2]
    s = x.numel() // max(1, n * c)
    if s < NARROW and n > 1:
        return x.transpose(0, 1).reshape(1, groups, c // groups, n * s)
    return x.contiguous().view(n, groups, c // groups, s)


def _restored(values: Tensor, x: Tensor) -> Tensor:
    """Undo ``_samples``: reshape its result to x's shape."""
    if values.shape[0] != x.shape[0]:
        return values.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1).contiguous()
    return values.view(x.shape)


def _blocks(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same block of samples of each array, block by block; nothing for empty arrays."""
    samples = _samples_of(arrays[0])
    for first in range(0, arrays[0].shape[0] if arrays[0].numel() else 0, samples):
        yield tuple(a[first : first + samples] for a in arrays)


def _samples_of(values: Tensor) -> int:
    """Return the number of samples in a block."""
    n, *others = values.shape
    return min(max(1, CACHE // max(1, math.prod(others))), max(1, n))


def _like_block(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a buffer for one block of samples, to be reused: fresh memory for each block costs more than the arithmetic."""
    return torch.empty((_samples_of(values), *values.shape[1:]), dtype=dtype)


def _less(block: Tensor, near: Tensor, memory: Tensor) -> Tensor:
    return torch.sub(block, near, out=memory[: len(block)])


def _eigh(covariance: Array) -> tuple[Array, Array]:
    """Decompose by PyTorch's ``eigh``, whose threads are already running."""
    eigenvalues, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    return eigenvalues.numpy(), vectors.numpy()


def _statistics(values: Tensor) -> tuple[Array, Array]:
    """Return mean (C,) and biased covariance (groups, d, d) in float64, merged from blocks centred on their own means."""
    _, groups, d, s = values.shape
    total = torch.zeros((groups, d, d), dtype=torch.float64)
    means, counts, memory = [], [], _like_block(values, torch.float64)
    for (block,) in _blocks(values):
        block = memory[: len(block)].copy_(block)
        mean = block.mean((0, 3))
        block -= mean[..., None]
        total += (block @ block.mT).sum(0)
        means.append(mean.numpy().reshape(-1))
        counts.append(block.shape[0] * s)
    return merged(total.numpy(), means, counts)


def _near(mean: Array, values: Tensor) -> tuple[Tensor, Array]:
    """Return the mean in the type of the statistics, (groups, d, 1), and its rounding error, to be corrected in float64."""
    near = torch.from_numpy(mean).to(PARAMETER[values.dtype])
    return near.view(*values.shape[1:3], 1), mean - near.numpy()


def _like(a: Array, near: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(a)).to(near.dtype)


def _product(a: Tensor, block: Tensor, target: Tensor, shift: Tensor | None = None) -> Tensor:
    """Write ``a @ block + shift`` to the target and return it in a's type; a target of another type gets a converted copy."""
    direct = target.dtype == a.dtype
    made = torch.matmul(a, block, out=target) if direct else a @ block
    if shift is not None:
        made += shift
    if not direct:
        target.copy_(made)
    return made
