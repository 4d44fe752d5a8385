"""``kernel_forward``, ``kernel_again`` and ``kernel_backward`` for CUDA tensors of any layout, computed by ``triton_kernel``.

No function here synchronises with the device, so channels with NaN or Inf (BN-11) are not counted, and there is no warning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multibn_torch import triton_kernel

from .eager import PARAMETER, Statistics, laid_out, whole
from .formulas import Moving, Settings


def kernel_forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings, refused: list[Tensor] | None = None,
    rectify: bool = False,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """``eager.kernel_forward`` for CUDA tensors; ``refused`` stays empty."""
    eps, old, unbiased, use_batch, update = how
    mean, var, batches = moving
    x, _, shape = laid_out(x)
    y, statistics = torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float64)
    gamma, beta, whole_mean, whole_var = whole(gamma, beta, mean, var)
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
    y = torch.empty_like(x)
    gamma, beta = whole(gamma, beta)
    triton_kernel.run_normalise(_as(x, shape), _as(y, shape), gamma, beta, statistics, rectify=rectify)
    return y


def kernel_backward(
    dy: Tensor, x: Tensor, gamma: Tensor | None, statistics: Statistics, through: bool, beta: Tensor | None = None,
    rectify: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``eager.kernel_backward`` for CUDA tensors."""
    assert isinstance(statistics, Tensor)
    x, _, shape = laid_out(x)
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    dx, dgamma = torch.empty_like(x), x.new_empty(x.shape[1], dtype=PARAMETER[x.dtype])
    dbeta = torch.empty_like(dgamma)
    gamma, beta = whole(gamma, beta)
    triton_kernel.run_backward(
        _as(x, shape), _as(dy, shape), _as(dx, shape), gamma, statistics, dgamma, dbeta, through, beta=beta, rectify=rectify
    )
    return dx, dgamma, dbeta


def _as(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """View x as (N, C, S) without a copy."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).view(shape)
