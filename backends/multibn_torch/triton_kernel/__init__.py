"""The kernel on a GPU: ``multibn.kernel``'s forward and backward on CUDA tensors, in BN-15's order, by Triton.

Triton comes with PyTorch's CUDA builds; nothing else is needed. Nothing here waits for the device, and all memory comes from
PyTorch's allocator on the current stream, so that a CUDA graph can capture it. With ``TRITON_INTERPRET=1``, set before Triton is
imported, the same code runs on CPU tensors in Triton's interpreter, slowly: that is how it is tested without a GPU.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from multibn.layer.types import PARAMETER_TYPE

from . import passes
from .launching import launch
from .plan import Plan, plan_of

COMPILED = isinstance(passes.describe, JITFunction)
"""Whether kernels are compiled for a GPU; else Triton's interpreter runs them on CPU tensors."""

_PARAMETER = {getattr(torch, x): getattr(torch, parameter) for x, parameter in PARAMETER_TYPE.items()}

_plan = lru_cache(maxsize=1024)(plan_of)


def run_forward(
    x: Tensor, y: Tensor, gamma: Tensor | None, beta: Tensor | None, moving_mean: Tensor | None, moving_var: Tensor | None,
    saved: Tensor, eps: float, old: float | None, unbiased: bool, use_batch: bool, update: bool, *,
    batches: Tensor | None = None, rectify: bool = False,
) -> None:  # fmt: skip
    """Normalise x into y; fill saved; update the moving statistics in place, with the bits of ``multibn.kernel.run_forward``.

    How many channels' moving statistics were left as they were (BN-11) is not returned: to ask a GPU is to wait for it.

    Args:
        x, y: (N, C, S), contiguous, float16, bfloat16, float32 or float64. Channels-last memory is (N*S, C, 1).
        gamma, beta: (C,) float32, for float64 x float64; None for 1 and 0.
        moving_mean, moving_var: of gamma's type; None where the batch statistics normalise and nothing is updated.
        saved: (2, C) float64; gets the mean that normalised and 1/sqrt(var+eps).
        old: weight of the old moving statistics; None for the equal-weight average, with ``batches`` seen before.
        use_batch: normalise with the batch statistics, else with the moving ones as they were before.
        update: update the moving statistics with those of the batch.
        batches: () int64, how many batches went into the moving statistics; an update adds 1.
        rectify: y is max(y, 0).

    Raises:
        TypeError: a tensor of another type.
        ValueError: a tensor of another shape, or not contiguous; moving statistics or batches are needed and missing.
        RuntimeError: tensors on several devices, or not on a CUDA device.
    """
    _require(x=x, y=y, saved=saved)
    channels = _check(x, y)
    kind = _PARAMETER[x.dtype]
    _check_each(x, kind, (channels,), gamma=gamma, beta=beta, moving_mean=moving_mean, moving_var=moving_var)
    _check_each(x, torch.float64, (2, channels), saved=saved)
    _check_each(x, torch.int64, (), batches=batches)
    if (update or not use_batch) and (moving_mean is None or moving_var is None):
        raise ValueError("moving_mean and moving_var are needed to normalise with or to update, got None. Give both.")
    if update and old is None and batches is None:
        raise ValueError("batches is needed where old is None, for the equal-weight average (BN-05), got None. Give the counter.")
    if x.numel() == 0:  # BN-12
        return
    plan = _plan(*x.shape)
    cut, fold = plan.cut, plan.fold
    sums = saved
    with _on(x):
        if use_batch or update:
            sums = torch.empty((4, cut.blocks, channels), dtype=torch.float64, device=x.device)
            _sum(passes.describe, plan, (_bits(x), sums), {"KIND": _name(x)})
        moving = (saved if t is None else t for t in (moving_mean, moving_var, batches))
        constants = {
            "B": fold.blocks, "Q": fold.q, "MANY": fold.many, "UNBIASED": unbiased, "USE_BATCH": use_batch, "UPDATE": update,
            "AVERAGE": old is None,
        }  # fmt: skip
        numbers = _float64_bits(eps), _float64_bits(0.0 if old is None else old)
        launch(passes.statistics, fold.programs, (sums, *moving, saved), (*numbers, *cut), constants, warps=4)
        _normalise(plan, x, y, gamma, beta, saved, rectify, batches if update else None)


def run_normalise(
    x: Tensor, y: Tensor, gamma: Tensor | None, beta: Tensor | None, saved: Tensor, *, rectify: bool = False
) -> None:
    """The last pass of ``run_forward`` alone: make y again, the same bits, of x and the statistics that it saved."""
    _require(x=x, y=y, saved=saved)
    channels = _check(x, y)
    _check_each(x, _PARAMETER[x.dtype], (channels,), gamma=gamma, beta=beta)
    _check_each(x, torch.float64, (2, channels), saved=saved)
    if x.numel():
        with _on(x):
            _normalise(_plan(*x.shape), x, y, gamma, beta, saved, rectify, None)


def run_backward(
    x: Tensor, dy: Tensor, dx: Tensor, gamma: Tensor | None, saved: Tensor, dgamma: Tensor, dbeta: Tensor, through: bool, *,
    beta: Tensor | None = None, rectify: bool = False,
) -> None:  # fmt: skip
    """Fill dx, dgamma and dbeta. The bits are those of ``multibn.kernel.run_backward``.

    Args:
        x, dy, dx: (N, C, S), as for ``run_forward``.
        gamma, dgamma, dbeta: (C,), as gamma there.
        saved: as filled by ``run_forward``.
        through: whether the statistics that normalised were the batch's, so that gradients flow through them (BN-08).
        beta, rectify: for the backward of ``run_forward`` with rectify.

    Raises:
        TypeError, ValueError, RuntimeError: as ``run_forward``.
    """
    _require(x=x, dy=dy, dx=dx, saved=saved, dgamma=dgamma, dbeta=dbeta)
    channels = _check(x, dy, dx)
    _check_each(x, _PARAMETER[x.dtype], (channels,), gamma=gamma, beta=beta, dgamma=dgamma, dbeta=dbeta)
    _check_each(x, torch.float64, (2, channels), saved=saved)
    if x.numel() == 0:
        dgamma.zero_()
        dbeta.zero_()
        return
    plan = _plan(*x.shape)
    cut, fold = plan.cut, plan.fold
    xs, dys, affine = _bits(x), _bits(dy), _affine(gamma, beta, saved)
    flags = _flags(x, gamma, beta, rectify)
    with _on(x):
        sums = torch.empty((2, cut.blocks, channels), dtype=torch.float64, device=x.device)
        means = torch.empty((2, channels), dtype=torch.float64, device=x.device)
        _sum(passes.correlate, plan, (xs, dys, *affine, sums), flags)
        folded = sums, saved, means, dgamma, dbeta
        sizes = cut.n, channels, cut.s, cut.blocks
        launch(passes.gradients, fold.programs, folded, sizes, {"B": fold.blocks, "Q": fold.q}, warps=4)
        _by_rows(passes.propagate, plan, (xs, dys, _bits(dx), *affine, means), flags | {"THROUGH": through})


def _sum(kernel: Any, plan: Plan, tensors: tuple[Tensor, ...], flags: dict[str, Any]) -> None:
    cut, lanes = plan.cut, plan.lanes
    tile = {"P": lanes.p, "AJ": lanes.joined, "AW": lanes.width, "Q": lanes.q, "UNROLL": lanes.unroll}
    launch(kernel, lanes.groups * cut.blocks, tensors, (*cut, lanes.groups), flags | tile, lanes.warps)


def _by_rows(kernel: Any, plan: Plan, tensors: tuple[Tensor, ...], flags: dict[str, Any]) -> None:
    cut, rows = plan.cut, plan.rows
    tile = {"R": rows.r, "K": rows.k, "COLUMN_IS_CHANNEL": cut.s == 1}
    launch(kernel, rows.programs, tensors, (*rows[:3], cut.channels), flags | tile, warps=2)


def _normalise(
    plan: Plan, x: Tensor, y: Tensor, gamma: Tensor | None, beta: Tensor | None, saved: Tensor, rectify: bool,
    batches: Tensor | None,
) -> None:  # fmt: skip
    tensors = _bits(x), _bits(y), *_affine(gamma, beta, saved), saved if batches is None else batches
    _by_rows(passes.normalise, plan, tensors, _flags(x, gamma, beta, rectify) | {"COUNT": batches is not None})


def _flags(x: Tensor, gamma: Tensor | None, beta: Tensor | None, rectify: bool) -> dict[str, Any]:
    return {"GAMMA": gamma is not None, "BETA": beta is not None, "RELU": rectify, "KIND": _name(x)}


def _affine(gamma: Tensor | None, beta: Tensor | None, saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pointers for a kernel, which does not read those that stand in for None."""
    return saved if gamma is None else gamma, saved if beta is None else beta, saved


def _bits(x: Tensor) -> Tensor:
    """bfloat16 as int16: the kernels decode it by themselves."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _float64_bits(value: float) -> int:
    """Triton passes Python floats on as float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _require(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(t).__name__}. Give one.")


def _check(x: Tensor, *like: Tensor) -> int:
    """Check x and tensors of its shape; return C."""
    if x.dtype not in _PARAMETER:
        raise TypeError(
            f"expected x of type {', '.join(map(str, _PARAMETER))}, got {x.dtype} (BN-10). Convert it to float32 first."
        )
    if x.dim() != 3 or not x.is_contiguous():
        raise ValueError(
            f"expected x of shape (N, C, S), contiguous, got shape {tuple(x.shape)}, strides {x.stride()}. "
            "Reshape it; channels-last memory is (N*S, C, 1)."
        )
    if x.is_cuda is not COMPILED or not (x.is_cuda or x.is_cpu):
        wanted = "a CUDA device" if COMPILED else "cpu, since TRITON_INTERPRET=1 is set"
        raise RuntimeError(f"the Triton kernel takes tensors on {wanted}, got x on {x.device}. Move the tensors.")
    for t in like:
        _check_each(x, x.dtype, tuple(x.shape), **{"y, dy or dx": t})
    return x.shape[1]


def _check_each(x: Tensor, kind: torch.dtype, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype != kind:
            raise TypeError(f"expected {name} of type {kind}, got {t.dtype} (BN-10). Convert it.")
        if t.shape != shape or not t.is_contiguous():
            raise ValueError(
                f"expected {name} of shape {shape}, contiguous, got shape {tuple(t.shape)}, strides {t.stride()} (BN-01)."
            )
        if t.device != x.device:
            raise RuntimeError(f"expected {name} on {x.device}, where x is, got it on {t.device}. Move one of them.")
