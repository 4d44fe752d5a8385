"""BatchNorm written with elementary PyTorch operators, so that PyTorch can differentiate it to any order, in forward and reverse
mode, and vmap it.

PyTorch's own operator is not reliable here: in PyTorch 2.13, ``torch.nn.functional.batch_norm`` silently gives wrong third
derivatives in reverse mode and wrong second derivatives in forward mode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """Settings of one forward: those of ``BatchNormSpec``, for the current mode. ``weight_of_old=None`` averages all batches with
    equal weights.
    """

    eps: float
    weight_of_old: float | None
    unbiased: bool
    use_batch: bool
    update: bool


class Moving(NamedTuple):
    """The moving statistics, (C,) each, and the number of batches in them, (); None where the layer has none."""

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None


def forward(x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings, work: torch.dtype) -> Tensor:
    """Return y, computed in the type ``work``; update the moving statistics in place, exactly once even under nested
    transforms.
    """
    wide = x.to(work)
    mean, var = moving.mean, moving.var
    if how.update and not how.use_batch:  # the update writes to them
        assert mean is not None
        assert var is not None
        mean, var = mean.clone(), var.clone()
    if how.use_batch or (how.update and x.numel()):
        batch_mean, batch_var = statistics(wide)
        if how.update:
            m = x.numel() // x.shape[1]
            estimate = batch_var * (m / (m - 1)) if how.unbiased else batch_var
            _Update.apply(batch_mean, estimate, *moving, how.weight_of_old)  # type: ignore[no-untyped-call]
        if how.use_batch:
            mean, var = batch_mean, batch_var
    assert mean is not None
    assert var is not None
    y = (wide - _along(mean.to(work), x)) * _along((var.to(work) + how.eps).rsqrt(), x)
    y = y if gamma is None else y * _along(gamma.to(work), x)
    return (y if beta is None else y + _along(beta.to(work), x)).to(x.dtype)


def gradients(
    dy: Tensor, x: Tensor, gamma: Tensor | None, normalised_by: Any, eps: float, through: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dgamma and dbeta, in the types of x and of the parameters; compute in the type of the statistics.

    Args:
        normalised_by: mean and 1/sqrt(var+eps).
        through: whether ``normalised_by`` are batch statistics (BN-08); if so, recompute them from x so that the result is
            differentiable.
    """
    mean, invstd = normalised_by
    work = mean.dtype
    dy, wide = dy.to(work), x.to(work)
    if through:
        mean, var = statistics(wide)
        invstd = (var + eps).rsqrt()
    xhat = (wide - _along(mean, x)) * _along(invstd, x)
    axes = _reduced(x)
    dgamma, dbeta = (dy * xhat).sum(axes), dy.sum(axes)
    dx = dy
    if through:
        m = max(x.numel() // x.shape[1], 1)
        dx = dx - _along(dbeta / m, x) - xhat * _along(dgamma / m, x)
    scale = invstd if gamma is None else invstd * gamma.to(work)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (dx * _along(scale, x)).to(x.dtype), dgamma.to(kind), dbeta.to(kind)


def positive(x: Tensor, gamma: Tensor | None, beta: Tensor | None, normalised_by: Any) -> Tensor:
    """Return the gradient mask of a ReLU after the layer: True where the output is positive or NaN, else False."""
    mean, invstd = (each.detach() for each in normalised_by)
    scale = invstd if gamma is None else invstd * gamma.detach().to(mean.dtype)
    y = (x.detach().to(mean.dtype) - _along(mean, x)) * _along(scale, x)
    y = y if beta is None else y + _along(beta.detach().to(mean.dtype), x)
    return ~(y.to(x.dtype) <= 0)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel (BN-02)."""
    axes = _reduced(x)
    mean = x.mean(axes)
    return mean, (x - _along(mean, x)).square().mean(axes)


def move(moving: Moving, mean: Tensor, var: Tensor, weight_of_old: float | None) -> None:
    """Update the moving statistics in place (BN-05, BN-11). For B layers under vmap, the shapes are (B, C), (B, C) and (B,)."""
    moving_mean, moving_var, batches = moving
    assert moving_mean is not None
    assert moving_var is not None
    old: Any = weight_of_old
    if old is None:
        assert batches is not None
        count = batches.to(mean.dtype).unsqueeze(-1)
        old = count / (count + 1)
    batch = torch.stack((mean, var))  # both at once: on a GPU, each operator on a small tensor costs as much as a large one
    kept = torch.stack((moving_mean, moving_var))
    moved = batch if weight_of_old == 0 else kept.to(batch.dtype) * old + batch * (1 - old)
    if weight_of_old is None:
        moved = torch.where(old == 0, batch, moved)  # a state of weight 0 is ignored, even NaN
    moved = moved.to(kept.dtype)
    new_mean, new_var = torch.where((moved * 0 == 0).all(0), moved, kept).unbind()  # BN-11
    moving_mean.copy_(new_mean)
    moving_var.copy_(new_var)
    if batches is not None:
        batches.add_(1)


class _Update(torch.autograd.Function):
    """Apply ``move`` outside of all active transforms: ``grad`` and ``jvp`` do not differentiate it, and ``vmap`` updates each
    layer once.
    """

    @staticmethod
    def forward(
        batch_mean: Tensor, batch_var: Tensor, mean: Tensor, var: Tensor, batches: Tensor, weight_of_old: float | None
    ) -> None:
        move(Moving(mean, var, batches), batch_mean, batch_var, weight_of_old)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[None, None]:
        *tensors, weight_of_old = args
        dims = in_dims[:-1]
        if any(dim is None for dim in dims[2:]):
            raise RuntimeError(
                f"expected moving statistics for each of the {info.batch_size} batches that vmap maps over, got one "
                "running_mean, running_var and num_batches_tracked (BN-05). Give each its own (torch.func.stack_module_state "
                "and functional_call), set update_statistics=False, or use inference."
            )
        first = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, dims, strict=True)
        ]
        _Update.apply(*first, weight_of_old)  # type: ignore[no-untyped-call]
        return None, None


def _reduced(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """Reshape one value per channel to broadcast with x."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))
