"""The kernel's sums over a batch as PyTorch custom operators; ``inductor`` writes y and dx as elementary operators.

A program that Inductor compiled calls ``fill_statistics`` and ``fill_sums`` instead, without PyTorch's dispatcher. The
convolution before each call has pushed Python's code and data out of the processor's caches, so that a call takes several times
as long as in a loop. These two check the tensors in few steps, and call the operator if anything is not as it was when the
program was compiled.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .eager import PARAMETER, kernel_of, laid_out, laid_out_as, recomputed, whole
from .gate import address, known_address

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
    kernel, team, _, ncs, _, nbytes = _launch(x.dtype, x.shape, x.stride(), torch.get_num_threads())
    x_at = address(x, x.dtype, nbytes, "the input")
    kernel.describe_at(team, ncs, x_at, rows.data_ptr(), eps, unbiased, not recomputed())
    return rows


def fill_statistics(x: Tensor, eps: float, unbiased: bool, *, out: Tensor) -> None:
    """Fill ``out``, allocated as (ROWS, C) float64, with what ``multibn::statistics`` returns."""
    kernel, team, _, ncs, _, nbytes = _launch(x.dtype, x.shape, x.stride(), torch.get_num_threads())
    x_at = known_address(x, nbytes)
    if kernel is None or not x_at:
        out.copy_(torch.ops.multibn.statistics(x, eps, unbiased))
    else:
        kernel.describe_at(team, ncs, x_at, out.data_ptr(), eps, unbiased, not recomputed())


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
    kernel, _, team, ncs, kind, nbytes = _launch(x.dtype, x.shape, x.stride(), torch.get_num_threads())
    gamma, beta = whole(gamma, beta)
    statistics, parameter = statistics.contiguous(), kind.parameter.dtype
    gamma_at = kind.one if gamma is None else address(gamma, parameter, kind.nbytes, "weight")
    beta_at = kind.zero if beta is None else address(beta, parameter, kind.nbytes, "bias")
    x_at, dy_at = (address(t, x.dtype, nbytes, name) for t, name in ((x, "the input"), (dy, "the gradient of the output")))
    rows_given = max([2, *statistics.shape[:1]])  # the kernel reads two, and may be given more
    statistics_at = address(statistics, torch.float64, rows_given * ncs[1] * 8, "the statistics")
    kernel.correlate_at(team, ncs, x_at, dy_at, gamma_at, beta_at, statistics_at, rows.data_ptr(), rectify)
    return rows


def fill_sums(dy: Tensor, x: Tensor, statistics: Tensor, *parameters: Tensor, scaled: bool, rectify: bool, out: Tensor) -> None:
    """Fill ``out``, allocated as (ROWS, C) float64, with what ``multibn::sums`` returns.

    Args:
        parameters: gamma if ``scaled``, then beta if ``rectify``.
    """
    dtype, shape, stride = x.dtype, x.shape, x.stride()
    kernel, _, team, ncs, kind, nbytes = _launch(dtype, shape, stride, torch.get_num_threads())
    gamma_at = known_address(parameters[0], kind.nbytes) if scaled else kind.one
    beta_at = known_address(parameters[-1], kind.nbytes) if rectify else kind.zero
    places = known_address(x, nbytes), known_address(dy, nbytes), gamma_at, beta_at, known_address(statistics, 2 * 8 * ncs[1])
    as_compiled = dy.dtype is dtype and dy.shape == shape and dy.stride() == stride and statistics.dtype is torch.float64
    for t in parameters:
        as_compiled = as_compiled and t.dtype is kind.parameter.dtype and t.nbytes == kind.nbytes and t.is_contiguous()
    if kernel is None or not as_compiled or not all(places):
        given = parameters[0] if scaled else None, parameters[-1] if rectify else None
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
def _launch(dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], threads: int) -> tuple[Any, Any, Any, Any, Any, int]:
    """Return the kernel, how it starts forward and backward, (N, C, S), the kind and the bytes of an input. The kernel is None if
    the input has gaps between its values.
    """
    x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    dense, size, ncs = laid_out(x)
    kind = kernel_of(dtype, shape[1])
    teams = [kind.kernel.team(body, size, threads) for body in (kind.forward, kind.backward)]
    return kind.kernel if dense is x else None, *teams, ncs, kind, x.nbytes


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_launch.cache_clear)  # a child has other threads
