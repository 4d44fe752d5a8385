"""BatchNorm by the CPU kernel as a function of PyTorch tensors, for programs that run as they are written."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from multibn.layer import PARAMETER_TYPE, Array
from multibn.memory import LENT, take

from . import formulas, poison
from .formulas import How, Moving

_CPU = torch.device("cpu")  # named, since there may be another default

PARAMETER = {getattr(torch, x): getattr(torch, parameter) for x, parameter in PARAMETER_TYPE.items()}
"""Type of the input -> type of gamma, beta and the moving statistics (BN-10)."""

ALONE = 8
"""Times ``kernel.SERIAL``: inputs of fewer values are done by the caller alone. A second thread has to wait for Python's lock
first and comes too late, as measured on the 7x7 stages of a DenseNet-121."""


def by_kernel(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: How, layer: poison.Named | None = None
) -> Tensor:
    """y, on CPU tensors, without copying them; the moving statistics are updated in place (BN-05).

    Bits as BN-15 fixes them, accuracy as BN-16 says. The layer is named where the batch is poisoned.
    """
    y: Tensor
    refused: list[Tensor] = []
    if torch.is_grad_enabled():
        y = _Kernel.apply(x, gamma, beta, moving, how, refused)  # type: ignore[no-untyped-call]
    else:
        y, _ = kernel_forward(x, gamma, beta, moving, how, refused)
    if refused and layer is not None:
        poison.tell(layer, x)
    return y


def transformed() -> bool:
    """Whether forward-mode differentiation or another transform of ``torch.func`` is active."""
    return forward_ad._current_level >= 0 or bool(torch._C._are_functorch_transforms_active())


def looked_through(dy: Tensor) -> bool:
    """Whether a gradient is to be differentiated again, or mapped over (also by ``is_grads_batched``)."""
    return torch.is_grad_enabled() or transformed() or bool(torch._C._functorch.is_legacy_batchedtensor(dy))


def recomputed() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing runs it a second time (BN-05)."""
    return bool(torch._C._current_graph_task_id() != -1)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: How, refused: list[Tensor]
    ) -> Tensor:
        y, ctx.statistics = kernel_forward(x, gamma, beta, moving, how, refused)
        ctx.save_for_backward(x, gamma)
        ctx.how, ctx.has_beta = how, beta is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma = ctx.saved_tensors
        if looked_through(dy):
            gradients = formulas.gradients(dy, x, gamma, ctx.statistics, ctx.how.eps, ctx.how.use_batch)
        else:
            gradients = kernel_backward(dy, x, gamma, ctx.statistics, ctx.how.use_batch)
        dx, dgamma, dbeta = gradients
        return dx, None if gamma is None else dgamma, dbeta if ctx.has_beta else None, None, None, None


def kernel_forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: How, refused: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """y and, for ``kernel_backward``, the statistics that normalised.

    x is put into ``refused`` where the moving statistics of a channel do not take it in (BN-11).
    """
    kernel = _kernel()
    eps, old, unbiased, use_batch, update = how
    mean, var, batches = moving
    if old is None:
        n = int(batches)  # type: ignore[arg-type]
        old = n / (n + 1)
    statistics = torch.from_numpy(np.empty((2, x.shape[1])))  # half the time of torch.empty
    x = dense(x)
    y = output_like(x)
    size = x.numel()
    gamma, beta = _whole(gamma), _whole(beta)
    whole_mean, whole_var = _whole(mean), _whole(var)
    if 0 < size < ALONE * kernel.SERIAL:
        like, parameter, one, zero = _kind(x.dtype, x.shape[1])
        none = zero.data_ptr()
        left = kernel.forward_at(
            like, parameter, _shape(x), x.data_ptr(), y.data_ptr(),
            one.data_ptr() if gamma is None else gamma.data_ptr(), none if beta is None else beta.data_ptr(),
            none if whole_mean is None else whole_mean.data_ptr(), none if whole_var is None else whole_var.data_ptr(),
            statistics.data_ptr(), 0 if batches is None else batches.data_ptr(), eps, old, unbiased, use_batch, update,
        )  # fmt: skip
    else:
        parameters = _arrays(x, gamma, beta, whole_mean, whole_var)
        threads = torch.get_num_threads()
        left = kernel.run_forward(
            _rows(x), _rows(y), *parameters, statistics.numpy(), eps, old, unbiased, use_batch, update, threads
        )
        if update and size:
            batches.add_(1)  # type: ignore[union-attr]
    if update:
        for given, whole in ((mean, whole_mean), (var, whole_var)):
            if given is not whole:
                given.copy_(whole)  # type: ignore[union-attr, arg-type]
    if left and refused is not None:
        refused.append(x)
    return y, statistics


def kernel_backward(
    dy: Tensor, x: Tensor, gamma: Tensor | None, statistics: Tensor, through: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma and dbeta of ``kernel_forward``; through: whether it used batch statistics (BN-08)."""
    kernel = _kernel()
    x = dense(x)
    dx = output_like(x)
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    size, channels = x.numel(), x.shape[1]
    like, parameter, one, _ = _kind(x.dtype, channels)
    dgamma, dbeta = torch.from_numpy(np.empty(channels, parameter.dtype)), torch.from_numpy(np.empty(channels, parameter.dtype))
    gamma = _whole(gamma)
    if 0 < size < ALONE * kernel.SERIAL:
        kernel.backward_at(
            like, parameter, _shape(x), x.data_ptr(), dy.data_ptr(), dx.data_ptr(),
            one.data_ptr() if gamma is None else gamma.data_ptr(), statistics.data_ptr(),
            dgamma.data_ptr(), dbeta.data_ptr(), through,
        )  # fmt: skip
    else:
        scale, sum_dy_xhat, sum_dy = _arrays(x, gamma, dgamma, dbeta)
        rows = _rows(x), _rows(dy), _rows(dx)
        kernel.run_backward(*rows, scale, statistics.numpy(), sum_dy_xhat, sum_dy, through, torch.get_num_threads())
    return dx, dgamma, dbeta


@cache
def _kernel() -> Any:
    from multibn import kernel  # Numba is loaded when it is first needed

    return kernel


@lru_cache(maxsize=256)
def _kind(dtype: torch.dtype, channels: int) -> tuple[Array, Array, Tensor, Tensor]:
    """Arrays of the kernel's types for x and for gamma, and ones and zeros for a gamma and beta that are not there."""
    like = np.empty(0, {torch.float16: np.int16, torch.bfloat16: np.uint16}.get(dtype) or str(dtype).removeprefix("torch."))
    _kernel().prepare(like.dtype)
    one = torch.ones(channels, dtype=PARAMETER[dtype], device=_CPU)
    return like, np.empty(0, one.numpy().dtype), one, torch.zeros_like(one)


def dense(x: Tensor) -> Tensor:
    """x itself where its memory is NC... or channels-last, else a copy in NC... order."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _whole(t: Tensor | None) -> Tensor | None:
    """One value per channel, side by side in memory: t itself unless it is a slice or expanded."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def output_like(x: Tensor) -> Tensor:
    """An output of x's shape, type and layout; a large one in memory that was used before."""
    if x.nbytes < LENT:
        return torch.empty_like(x)
    storage = torch.from_numpy(take(x.nbytes)).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, x.stride())


def _shape(x: Tensor) -> tuple[int, int, int]:
    """(N, C, S) of a dense tensor; S is 1 for channels-last memory."""
    shape = x.shape
    if x.is_contiguous():
        return shape[0], shape[1], x.numel() // (shape[0] * shape[1])
    return x.numel() // shape[1], shape[1], 1


def _rows(x: Tensor) -> Array:
    """A dense tensor as the (N, C, S) array that the kernel takes; it shares the memory."""
    x = x.detach()
    if x.numel() == 0:
        return np.empty((0, x.shape[1], 1), np.float32)
    shape = _shape(x)
    x = (x if x.is_contiguous() else x.movedim(1, -1)).view(shape)
    if x.dtype in (torch.float16, torch.bfloat16):
        array: Array = x.view(torch.int16).numpy()
        return array.view(np.uint16) if x.dtype == torch.bfloat16 else array
    return x.numpy()


def _arrays(x: Tensor, gamma: Tensor | None, *others: Tensor | None) -> list[Array]:
    """Tensors of one value per channel as arrays."""
    *_, one, zero = _kind(x.dtype, x.shape[1])
    first = one if gamma is None else gamma.detach()
    return [first.numpy(), *((zero if t is None else t.detach()).numpy() for t in others)]
