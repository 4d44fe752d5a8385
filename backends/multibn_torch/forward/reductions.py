"""The kernel's sums over a batch as PyTorch custom operators; ``inductor`` writes y and dx as elementary operators.

A program that Inductor compiled calls ``fill_statistics`` and ``fill_sums`` in their place. Between two convolutions, which leave
nothing of it in the processor's caches, Python and PyTorch's dispatcher take four to six times as long as in a loop. So these
two look only at what may have changed since the program was compiled, and call the operator if anything has.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .eager import PARAMETER, kernel_of, laid_out, laid_out_as, recomputed, whole
from .gate import address

TAGS = (torch.Tag.flexible_layout,) if hasattr(torch.Tag, "flexible_layout") else ()
"""Without a layout tag, Inductor passes inputs in the layout that they have in eager mode. Inductor's convolutions are
channels-last, so every input and output would be copied."""

ROWS = 5
"""Each operator returns (ROWS, C) float64."""

torch.library.define("multibn::statistics", "(Tensor x, float eps, bool unbiased) -> Tensor", tags=TAGS)
torch.library.define(
    "multibn::sums", "(Tensor dy, Tensor x, Tensor? gamma, Tensor? beta, Tensor statistics, bool rectify) -> Tensor", tags=TAGS
)


@torch.library.impl("multibn::statistics", "CPU")
def _statistics(x: Tensor, eps: float, unbiased: bool) -> Tensor:
    """Return the batch statistics of x, (N, C, ...).

    Returns:
        Rows: the mean and 1/sqrt(var+eps), which normalise; the mean and the variance that the moving statistics take; and ones,
        or zeros if they take nothing because activation checkpointing runs this forward again (BN-05).
    """
    x, rows = _examined(x), _rows(x)
    kernel, team, _, shape, _ = _plan(x.dtype, x.shape, x.stride(), torch.get_num_threads())
    x_at = address(x, x.dtype, x.nbytes, "the input")
    kernel.describe_at(team, shape, x_at, rows.data_ptr(), eps, unbiased, not recomputed())
    return rows


def fill_statistics(x: Tensor, eps: float, unbiased: bool, *, out: Tensor) -> None:
    """Fill ``out``, allocated as (ROWS, C) float64, with what ``multibn::statistics`` returns."""
    kernel, team, _, shape, _ = _plan(x.dtype, x.shape, x.stride(), torch.get_num_threads())
    x_at = x.data_ptr()
    if kernel is None or not x_at:
        out.copy_(torch.ops.multibn.statistics(x, eps, unbiased))
    else:
        kernel.describe_at(team, shape, x_at, out.data_ptr(), eps, unbiased, not recomputed())


@torch.library.register_fake("multibn::statistics")  # type: ignore[untyped-decorator]
def _(x: Tensor, eps: float, unbiased: bool) -> Tensor:
    return _rows(x)


@torch.library.impl("multibn::sums", "CPU")
def _sums(dy: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None, statistics: Tensor, rectify: bool) -> Tensor:
    """Return the sums of a backward.

    Args:
        statistics: rows of float64, the first two the mean that normalised and 1/sqrt(var+eps).
        rectify: dy is the gradient of max(y, 0).

    Returns:
        Rows: the mean of dy, the factor of x-mean in dx, and gamma/sqrt(var+eps); dgamma; dbeta.
    """
    x, rows = _examined(x), _rows(x)
    if dy.stride() != x.stride():
        dy = laid_out_as(x, dy)
    kernel, _, team, shape, kind = _plan(x.dtype, x.shape, x.stride(), torch.get_num_threads())
    gamma, beta = whole(gamma, beta)
    statistics, parameter = statistics.contiguous(), kind.parameter.dtype
    gamma_at = kind.one if gamma is None else address(gamma, parameter, kind.nbytes, "weight")
    beta_at = kind.zero if beta is None else address(beta, parameter, kind.nbytes, "bias")
    x_at, dy_at = (address(t, x.dtype, x.nbytes, name) for t, name in ((x, "the input"), (dy, "the gradient of the output")))
    statistics_at = address(statistics, torch.float64, max(2, len(statistics)) * shape[1] * 8, "the statistics")
    kernel.correlate_at(team, shape, x_at, dy_at, gamma_at, beta_at, statistics_at, rows.data_ptr(), rectify)
    return rows


def fill_sums(dy: Tensor, x: Tensor, statistics: Tensor, *parameters: Tensor, affine: bool, rectify: bool, out: Tensor) -> None:
    """Fill ``out``, allocated as (ROWS, C) float64, with what ``multibn::sums`` returns.

    Args:
        parameters: gamma if ``affine``, then beta if ``rectify``.
    """
    dtype, shape, stride = x.dtype, x.shape, x.stride()
    kernel, _, team, ncs, kind = _plan(dtype, shape, stride, torch.get_num_threads())
    gamma, beta = parameters[0] if affine else kind.parameter, parameters[-1] if rectify else kind.parameter
    places = x.data_ptr(), dy.data_ptr(), gamma.data_ptr() if affine else kind.one, beta.data_ptr(), statistics.data_ptr()
    types = gamma.dtype is kind.parameter.dtype is beta.dtype and dy.dtype is dtype and statistics.dtype is torch.float64
    if kernel is None or not types or dy.shape != shape or dy.stride() != stride or not all(places):
        given = gamma if affine else None, beta if rectify else None
        out.copy_(torch.ops.multibn.sums(dy, x, *given, statistics, rectify))
    else:
        kernel.correlate_at(team, ncs, *places, out.data_ptr(), rectify)


@torch.library.register_fake("multibn::sums")  # type: ignore[untyped-decorator]
def _(dy: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None, statistics: Tensor, rectify: bool) -> Tensor:
    return _rows(x)


def _rows(x: Tensor) -> Tensor:
    return x.new_empty((ROWS, x.shape[1]), dtype=torch.float64)


def _examined(x: Tensor) -> Tensor:
    """Return x, or a copy if its values have gaps between them.

    Raises:
        RuntimeError: x has another rank or type than the kernel can take.
    """
    if x.dtype not in PARAMETER or x.dim() < 2:
        types = ", ".join(str(each) for each in PARAMETER)
        raise RuntimeError(
            f"multibn::statistics and multibn::sums take an input (N, C, ...) of {types}, got shape {tuple(x.shape)} of "
            f"{x.dtype}. Call a layer instead, which examines its input."
        )
    return laid_out(x)[0]


@lru_cache(maxsize=1024)
def _plan(dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], threads: int) -> tuple[Any, Any, Any, Any, Any]:
    """Return the kernel, how it starts forward and backward, (N, C, S) and the kind of an input. The kernel is None if the input
    has gaps between its values.
    """
    x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    dense, size, ncs = laid_out(x)
    kind = kernel_of(dtype, shape[1])
    teams = [kind.kernel.team(body, size, threads) for body in (kind.forward, kind.backward)]
    return kind.kernel if dense is x else None, *teams, ncs, kind
