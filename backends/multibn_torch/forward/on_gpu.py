"""``kernel_forward``, ``kernel_again`` and ``kernel_backward`` for CUDA tensors of any layout, computed by ``triton_kernel``.

No function here synchronises with the device, so channels with NaN or Inf (BN-11) are not counted, and there is no warning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multibn_torch import triton_kernel

from .eager import PARAMETER, Statistics, laid_out, laid_out_as, whole
from .formulas import Moving, Settings
from .gate import NotPlainError, check_apart, place


def kernel_forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings, refused: list[Tensor] | None = None,
    rectify: bool = False,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """``eager.kernel_forward`` for CUDA tensors; ``refused`` stays empty."""
    eps, old, unbiased, use_batch, update = how
    mean, var, batches = moving
    x, _, shape = laid_out(x)
    gamma, beta, whole_mean, whole_var = whole(gamma, beta, mean, var)
    gamma_at, beta_at, mean_at, var_at = _examine(x, gamma, beta, whole_mean, whole_var)
    if update:
        check_apart(mean, var, (gamma_at, beta_at, mean_at, var_at), 0 if whole_mean is None else whole_mean.nbytes)
        if batches is not None:
            place(batches, "num_batches_tracked")
    y, statistics = torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float64)
    triton_kernel.run_forward(
        _as(x, shape), _as(y, shape), gamma, beta, whole_mean, whole_var, statistics, eps, old, unbiased, use_batch, update,
        batches=batches, rectify=rectify,
    )  # fmt: skip
    if update:
        for given, its in ((mean, whole_mean), (var, whole_var)):
            if given is not its:
                given.copy_(its)  # type: ignore[union-attr, arg-type]
    return y, statistics


def kernel_again(x: Tensor, gamma: Tensor | None, beta: Tensor | None, *, statistics: Statistics, rectify: bool) -> Tensor:
    """``eager.kernel_again`` for CUDA tensors."""
    assert isinstance(statistics, Tensor)
    x, _, shape = laid_out(x)
    gamma, beta = whole(gamma, beta)
    _examine(x, gamma, beta)
    y = torch.empty_like(x)
    triton_kernel.run_normalise(_as(x, shape), _as(y, shape), gamma, beta, statistics, rectify=rectify)
    return y


def kernel_backward(
    dy: Tensor, x: Tensor, gamma: Tensor | None, statistics: Statistics, through: bool, beta: Tensor | None = None,
    rectify: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``eager.kernel_backward`` for CUDA tensors."""
    assert isinstance(statistics, Tensor)
    x, _, shape = laid_out(x)
    gamma, beta = whole(gamma, beta)
    _examine(x, gamma, beta)
    place(statistics, "the statistics")
    if dy.stride() != x.stride() or dy.shape != x.shape or dy.dtype is not x.dtype:
        dy = laid_out_as(x, dy)
    try:
        place(dy, "the gradient of the output")
    except NotPlainError:
        dy = laid_out_as(x, dy)
    dx, dgamma = torch.empty_like(x), x.new_empty(x.shape[1], dtype=PARAMETER[x.dtype])
    dbeta = torch.empty_like(dgamma)
    triton_kernel.run_backward(
        _as(x, shape), _as(dy, shape), _as(dx, shape), gamma, statistics, dgamma, dbeta, through, beta=beta, rectify=rectify
    )
    return dx, dgamma, dbeta


def _examine(x: Tensor, *others: Tensor | None) -> list[int]:
    """Check x, gamma, beta and, in forward, the moving mean and variance; return the addresses of all but x, 0 for None."""
    place(x, "the input")
    names = "weight", "bias", "running_mean", "running_var"
    return [0 if t is None else place(t, name) for name, t in zip(names, others, strict=False)]


def _as(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """View x as (N, C, S) without a copy."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).view(shape)
