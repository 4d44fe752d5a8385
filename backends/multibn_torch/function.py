"""BatchNorm as functions of PyTorch tensors: by the CPU kernel, and by PyTorch's own operators on any device.

Both take ``(x, gamma, beta, moving_mean, moving_var, how)``, return y, and update the moving statistics in place (BN-05).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from multibn.layer import PARAMETER_TYPE, Array
from multibn.memory import LENT, take

PARAMETER = {getattr(torch, x): getattr(torch, parameter) for x, parameter in PARAMETER_TYPE.items()}
"""Type of the input -> type of gamma, beta and the moving statistics (BN-10)."""

ALONE = 8
"""Times ``kernel.SERIAL``: inputs of fewer values are done by the caller alone. A second thread has to wait for Python's lock
first and comes too late, as measured on the 7x7 stages of a DenseNet-121."""


class How(NamedTuple):
    """What one forward does; the words of ``BatchNormSpec``, resolved for its mode."""

    eps: float
    weight_of_old: float
    unbiased: bool
    use_batch: bool
    update: bool


def by_kernel(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving_mean: Tensor | None, moving_var: Tensor | None, how: How
) -> Tensor:
    """On CPU tensors, without copying them. Bits as BN-15 fixes them, accuracy as BN-16 says."""
    y: Tensor = _Kernel.apply(x, gamma, beta, (moving_mean, moving_var), how)  # type: ignore[no-untyped-call]
    return y


def by_framework(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving_mean: Tensor | None, moving_var: Tensor | None, how: How
) -> Tensor:
    """By ``torch.nn.functional.batch_norm`` (ATen's Normalization.cpp, cuDNN), in the arithmetic of the input's type.

    Its own moving statistics are unbiased and its momentum has no None, so it is given none of ours: with momentum 1 it hands out
    those of the batch, from which ours are made.
    """
    batch_norm = torch.nn.functional.batch_norm
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0 or not (how.use_batch or how.update):
        if how.use_batch:
            return batch_norm(x, None, None, gamma, beta, True, 0.0, how.eps)
        return batch_norm(x, moving_mean, moving_var, gamma, beta, False, 0.0, how.eps)
    batch_mean = torch.zeros(x.shape[1], dtype=kind, device=x.device)
    batch_var = torch.zeros_like(batch_mean)
    if how.use_batch:
        y = batch_norm(x, batch_mean, batch_var, gamma, beta, True, 1.0, how.eps)
    else:  # with copies: backward needs the moving statistics as they are now
        assert moving_mean is not None
        assert moving_var is not None
        y = batch_norm(x, moving_mean.clone(), moving_var.clone(), gamma, beta, False, 0.0, how.eps)
        with torch.no_grad():
            batch_norm(x, batch_mean, batch_var, None, None, True, 1.0, how.eps)
    if how.update and moving_mean is not None and moving_var is not None:
        m = x.numel() // x.shape[1]
        with torch.no_grad():
            _update(
                moving_mean, moving_var, batch_mean, batch_var if how.unbiased else batch_var * ((m - 1) / m), how.weight_of_old
            )
    return y


def _update(moving_mean: Tensor, moving_var: Tensor, batch_mean: Tensor, batch_var: Tensor, old: float) -> None:
    mean = moving_mean * old + batch_mean * (1 - old) if old else batch_mean
    var = moving_var * old + batch_var * (1 - old) if old else batch_var
    finite = mean.isfinite() & var.isfinite()  # BN-11
    moving_mean.copy_(torch.where(finite, mean, moving_mean))
    moving_var.copy_(torch.where(finite, var, moving_var))


def composed(x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, invstd: Tensor, how: How) -> Tensor:
    """The formulas in elementary operators, so that PyTorch can differentiate them as often as it likes."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    dtype = x.dtype
    x = x.to(mean.dtype if dtype == torch.float64 else torch.float32)
    mean, invstd = mean.to(x.dtype), invstd.to(x.dtype)
    if how.use_batch:
        axes = [i for i in range(x.dim()) if i != 1]
        mean = x.mean(axes)
        var = (x - mean.view(shape)).square().mean(axes)
        invstd = (var + how.eps).rsqrt()
    y = (x - mean.view(shape)) * invstd.view(shape)
    y = y if gamma is None else y * gamma.view(shape)
    return (y if beta is None else y + beta.view(shape)).to(dtype)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: tuple[Tensor | None, Tensor | None], how: How
    ) -> Tensor:
        kernel = _kernel()
        mean, var = moving
        ctx.save_for_backward(x, gamma, beta)
        ctx.how = how
        ctx.statistics = statistics = torch.empty((2, x.shape[1]), dtype=torch.float64)
        x = _dense(x)
        y = output_like(x)
        size = x.numel()
        if 0 < size < ALONE * kernel.SERIAL:
            like, parameter, one, zero = _kind(x.dtype, x.shape[1])
            none = zero.data_ptr()
            kernel.forward_at(
                like, parameter, _shape(x), x.data_ptr(), y.data_ptr(),
                one.data_ptr() if gamma is None else gamma.data_ptr(), none if beta is None else beta.data_ptr(),
                none if mean is None else mean.data_ptr(), none if var is None else var.data_ptr(), statistics.data_ptr(), *how,
            )  # fmt: skip
        else:
            parameters = _arrays(x, gamma, beta, mean, var)
            kernel.run_forward(_rows(x), _rows(y), *parameters, statistics.numpy(), *how, torch.get_num_threads())
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma, beta = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate this again
            return (*_differentiable(x, gamma, beta, ctx.statistics, ctx.how, dy), None, None)
        kernel = _kernel()
        x = _dense(x)
        dx = output_like(x)
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        size, channels, through = x.numel(), x.shape[1], ctx.how.use_batch
        dgamma = torch.empty(channels, dtype=PARAMETER[x.dtype])
        dbeta = torch.empty_like(dgamma)
        if 0 < size < ALONE * kernel.SERIAL:
            like, parameter, one, _ = _kind(x.dtype, channels)
            kernel.backward_at(
                like, parameter, _shape(x), x.data_ptr(), dy.data_ptr(), dx.data_ptr(),
                one.data_ptr() if gamma is None else gamma.data_ptr(), ctx.statistics.data_ptr(),
                dgamma.data_ptr(), dbeta.data_ptr(), through,
            )  # fmt: skip
        else:
            scale, sum_dy_xhat, sum_dy = _arrays(x, gamma, dgamma, dbeta)
            rows = _rows(x), _rows(dy), _rows(dx)
            kernel.run_backward(*rows, scale, ctx.statistics.numpy(), sum_dy_xhat, sum_dy, through, torch.get_num_threads())
        return dx, None if gamma is None else dgamma, None if beta is None else dbeta, None, None


def _differentiable(x: Tensor, gamma: Tensor | None, beta: Tensor | None, statistics: Tensor, how: How, dy: Tensor) -> list[Any]:
    """The gradients of x, gamma and beta with a graph of their own."""
    mean, invstd = statistics.unbind()
    given = (x, gamma, beta)
    wanted = [t for t in given if t is not None and t.requires_grad]
    y = composed(x, gamma, beta, mean, invstd, how)
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in given]


@cache
def _kernel() -> Any:
    from multibn import kernel  # Numba is loaded when it is first needed

    return kernel


@lru_cache(maxsize=256)
def _kind(dtype: torch.dtype, channels: int) -> tuple[Array, Array, Tensor, Tensor]:
    """Arrays of the kernel's types for x and for gamma, and ones and zeros for a gamma and beta that are not there."""
    like = np.empty(0, {torch.float16: np.int16, torch.bfloat16: np.uint16}.get(dtype) or str(dtype).removeprefix("torch."))
    _kernel().prepare(like.dtype)
    one = torch.ones(channels, dtype=PARAMETER[dtype])
    return like, np.empty(0, one.numpy().dtype), one, torch.zeros_like(one)


def _dense(x: Tensor) -> Tensor:
    """x itself where its memory is NC... or channels-last, else a copy in NC... order."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


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
