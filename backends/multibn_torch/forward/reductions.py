"""The kernel's sums over a batch as PyTorch custom operators; ``inductor`` writes y and dx as elementary operators.

They are registered without a wrapper around each call, and examine no more than the kernel reads: in a compiled program Python
runs between two convolutions, which leave nothing of it in the processor's caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .eager import PARAMETER, kernel_of, laid_out, laid_out_as, recomputed, whole
from .gate import address

TAGS = (torch.Tag.flexible_layout,) if hasattr(torch.Tag, "flexible_layout") else ()
"""Without a layout tag, Inductor passes inputs in the layout that they have in eager mode. Inductor's convolutions are
channels-last, so every input and output would be copied."""

torch.library.define("multibn::statistics", "(Tensor x, float eps, bool unbiased) -> (Tensor, Tensor)", tags=TAGS)
torch.library.define(
    "multibn::sums",
    "(Tensor dy, Tensor x, Tensor? gamma, Tensor? beta, Tensor statistics, bool rectify) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


@torch.library.impl("multibn::statistics", "CPU")
def statistics(x: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Return the batch statistics of x, (N, C, ...), in float64.

    Returns:
        The mean and 1/sqrt(var+eps), (2, C); and what the moving statistics take, (3, C): the mean, the variance, and a row of
        ones, or of zeros if they take nothing because activation checkpointing runs this forward again (BN-05).
    """
    x, size, shape, kind = _examined(x)
    saved = torch.empty((2, shape[1]), dtype=torch.float64, device=x.device)
    batch = (torch.zeros if recomputed() else torch.ones)((3, shape[1]), dtype=torch.float64, device=x.device)
    x_at, team = address(x, x.dtype, size * kind.itemsize, "the input"), kind.kernel.team
    kind.kernel.describe_at(
        team(kind.forward, size, torch.get_num_threads()), shape, x_at, saved.data_ptr(), batch.data_ptr(), eps, unbiased
    )
    return saved, batch


@torch.library.register_fake("multibn::statistics")  # type: ignore[untyped-decorator]
def _(x: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty((2, x.shape[1]), dtype=torch.float64), x.new_empty((3, x.shape[1]), dtype=torch.float64)


@torch.library.impl("multibn::sums", "CPU")
def sums(
    dy: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None, statistics: Tensor, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of a backward.

    Args:
        statistics: (2, C) float64, the mean that normalised and 1/sqrt(var+eps).
        rectify: dy is the gradient of max(y, 0).

    Returns:
        (3, C) float64, the mean of dy, the factor of x-mean in dx, and gamma/sqrt(var+eps); dgamma; dbeta.
    """
    x, size, shape, kind = _examined(x)
    if dy.stride() != x.stride():
        dy = laid_out_as(x, dy)
    means = torch.empty((3, shape[1]), dtype=torch.float64, device=x.device)
    dgamma, dbeta = torch.empty_like(kind.parameter), torch.empty_like(kind.parameter)
    parameter, nbytes = kind.parameter.dtype, size * kind.itemsize
    gamma, beta = whole(gamma, beta)
    statistics = statistics.contiguous()
    gamma_at = kind.one if gamma is None else address(gamma, parameter, kind.nbytes, "weight")
    beta_at = kind.zero if beta is None else address(beta, parameter, kind.nbytes, "bias")
    kind.kernel.correlate_at(
        kind.kernel.team(kind.backward, size, torch.get_num_threads()), shape, address(x, x.dtype, nbytes, "the input"),
        address(dy, x.dtype, nbytes, "the gradient of the output"), gamma_at, beta_at,
        address(statistics, torch.float64, means.nbytes // 3 * 2, "the statistics"), dgamma.data_ptr(), dbeta.data_ptr(),
        means.data_ptr(), rectify,
    )  # fmt: skip
    return means, dgamma, dbeta


@torch.library.register_fake("multibn::sums")  # type: ignore[untyped-decorator]
def _(
    dy: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None, statistics: Tensor, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dgamma = x.new_empty(x.shape[1], dtype=PARAMETER[x.dtype])
    return x.new_empty((3, x.shape[1]), dtype=torch.float64), dgamma, torch.empty_like(dgamma)


def _examined(x: Tensor) -> tuple[Tensor, int, tuple[int, int, int], Any]:
    """Return what ``laid_out`` does, and the kernel.

    Raises:
        RuntimeError: x has another rank or type than the kernel can take.
    """
    if x.dtype not in PARAMETER or x.dim() < 2:
        types = ", ".join(str(each) for each in PARAMETER)
        raise RuntimeError(
            f"multibn::statistics and multibn::sums take an input (N, C, ...) of {types}, got shape {tuple(x.shape)} of "
            f"{x.dtype}. Call a layer instead, which examines its input."
        )
    x, size, shape = laid_out(x)
    return x, size, shape, kernel_of(x.dtype, shape[1])
