"""BatchNorm by PyTorch's own operators (ATen's Normalization.cpp, cuDNN), on any device, in the arithmetic of the input's type.

PyTorch's operators always use the unbiased variance for moving statistics and do not support momentum None. Therefore the layer's
moving statistics are not passed to the operators. Instead, temporary buffers with momentum 1 receive the batch statistics, and
``_update`` updates the layer's moving statistics from these (BN-05).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multibn_torch.compat import impl_index, impl_index_backward

from . import formulas
from .eager import CHANNELS_LAST, PARAMETER, looked_through
from .formulas import Moving, Settings


def by_framework(x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings) -> Tensor:
    """Return y, differentiable to any order."""
    if x.is_cuda and x.dtype is torch.float64:  # PyTorch's operators there lose digits that float64 has
        return formulas.forward(x, gamma, beta, moving, how, x.dtype)
    if not torch.is_grad_enabled() or not x.numel():
        return by_torch_operators(x, gamma, beta, moving, how)
    y: Tensor = _Framework.apply(x, gamma, beta, moving, how)  # type: ignore[no-untyped-call]
    return y


def by_torch_operators(x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings) -> Tensor:
    """Return y by ``torch.nn.functional.batch_norm``, which compilers and exporters support."""
    batch_norm = torch.nn.functional.batch_norm
    if not (how.use_batch or how.update):
        return batch_norm(x, moving.mean, moving.var, gamma, beta, False, 0.0, how.eps)
    batch = _of_batch(x)
    if how.use_batch:
        y = batch_norm(x, *batch, gamma, beta, True, 1.0, how.eps)
    else:
        y = batch_norm(x, *_copied(moving), gamma, beta, False, 0.0, how.eps)
    _update(x, moving, batch, how)
    return y


class _Framework(torch.autograd.Function):
    """Use PyTorch's operators for the first derivative and ``formulas`` for higher ones, because PyTorch's third derivatives are
    wrong.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings) -> Tensor:
        batch, training, cudnn = _of_batch(x), how.use_batch, torch.backends.cudnn.enabled
        given = batch if training else _copied(moving)
        ctx.how, ctx.has = how, (gamma is not None, beta is not None)
        if gamma is None and beta is not None:  # on CUDA, backward fails without gamma
            gamma = torch.ones_like(beta)
        y: Tensor
        y, mean, invstd, reserved, ctx.index = impl_index(
            _in_order(x), gamma, beta, *given, training, 1.0 if training else 0.0, how.eps, cudnn
        )
        ctx.save_for_backward(x, gamma, *given, mean, invstd, reserved)
        _update(x, moving, batch, how)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma, moving_mean, moving_var, mean, invstd, reserved = ctx.saved_tensors
        eps, training = ctx.how.eps, ctx.how.use_batch
        if looked_through(dy):
            gradients = formulas.gradients(dy, x, gamma, (moving_mean, (moving_var + eps).rsqrt()), eps, training)
        else:
            wanted = [True, *ctx.has]
            gradients = impl_index_backward(
                ctx.index, _in_order(x), dy, gamma, moving_mean, moving_var, mean, invstd, training, eps, wanted, reserved
            )
        dx, dgamma, dbeta = gradients
        has_gamma, has_beta = ctx.has
        return dx, dgamma if has_gamma else None, dbeta if has_beta else None, None, None


def _in_order(x: Tensor) -> Tensor:
    """Return x; on CUDA a contiguous copy if it is neither contiguous nor channels-last, since backward takes no other."""
    if not x.is_cuda:
        return x
    last = CHANNELS_LAST.get(x.dim())
    return x if last is not None and x.is_contiguous(memory_format=last) else x.contiguous()


def _of_batch(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate mean and variance, (C,), to which PyTorch's operators write the batch statistics."""
    mean, var = torch.zeros((2, x.shape[1]), dtype=PARAMETER[x.dtype], device=x.device).unbind()  # one operator for both
    return mean, var


def _copied(moving: Moving) -> tuple[Tensor, Tensor]:
    """Copy the moving statistics used for normalising: backward needs their current values, and later updates may change them."""
    mean, var = moving.mean, moving.var
    assert mean is not None
    assert var is not None
    return mean.clone(), var.clone()


def _update(x: Tensor, moving: Moving, batch: tuple[Tensor, Tensor], how: Settings) -> None:
    if how.update:
        with torch.no_grad():
            if not how.use_batch:
                torch.nn.functional.batch_norm(x, *batch, None, None, True, 1.0, how.eps)
            mean, var = batch
            m = x.numel() // x.shape[1]
            formulas.move(moving, mean, var if how.unbiased else var * ((m - 1) / m), how.weight_of_old)
