"""The kernel as PyTorch custom operators, for ``torch.compile`` and other tools that record operators instead of running Python.

The operators do not modify their inputs: they return the new moving statistics, which ``by_custom_operator`` copies to the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compat, formulas
from .eager import PARAMETER, as_tensor, dense, kernel_backward, kernel_forward, looked_through, recomputed
from .formulas import Moving, Settings
from .masked import check_count, pack, unpack
from .reductions import TAGS


def by_custom_operator(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings, mask: Tensor | None = None
) -> Tensor:
    """Return the same bits as ``by_kernel``, through the custom operator; for the mask see ``masked``."""
    y, _, *news = torch.ops.multibn.forward(x, mask, gamma, beta, *moving, *how, False)
    if how.update:
        with torch.no_grad():
            for t, new in zip(moving, news, strict=True):
                t.copy_(new)  # type: ignore[union-attr]
    return y  # type: ignore[no-any-return]


@torch.library.custom_op(
    "multibn::forward",
    mutates_args=(),
    schema="(Tensor x, Tensor? mask, Tensor? gamma, Tensor? beta, Tensor? moving_mean, Tensor? moving_var, Tensor? batches, "
    "float eps, float? weight_of_old, bool unbiased, bool use_batch, bool update, bool rectify) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
def _forward(
    x: Tensor, mask: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    moving_mean: Tensor | None, moving_var: Tensor | None, batches: Tensor | None,
    eps: float, weight_of_old: float | None, unbiased: bool, use_batch: bool, update: bool, rectify: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return y, the statistics that normalised, and the new moving statistics and counter, which are empty without an update.

    If ``rectify``, y is max(y, 0); ``inductor`` sets this where a ReLU follows.
    """
    values = x
    if mask is not None:
        values = pack(x, mask)
        check_count(values)
    news = _news(x, Moving(moving_mean, moving_var, batches), update, torch.clone)
    happens = update and values.numel() > 0 and not recomputed()
    how = Settings(eps, weight_of_old, unbiased, use_batch, happens)
    current = news if update else Moving(moving_mean, moving_var, batches)
    y, statistics = kernel_forward(values, gamma, beta, current, how, None, rectify)
    return y if mask is None else unpack(y, mask, x), as_tensor(statistics), *news


@_forward.register_fake
def _(
    x: Tensor, mask: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    moving_mean: Tensor | None, moving_var: Tensor | None, batches: Tensor | None,
    eps: float, weight_of_old: float | None, unbiased: bool, use_batch: bool, update: bool, rectify: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    compat.install_passes()  # a compiler that is tracing this operator will run the passes later, on the same graph
    statistics = x.new_empty((2, x.shape[1]), dtype=torch.float64)
    return _like(x, mask), statistics, *_news(x, Moving(moving_mean, moving_var, batches), update, torch.empty_like)


def _news(x: Tensor, moving: Moving, update: bool, make: Any) -> Moving:
    return Moving(*(make(t) if update else x.new_empty(0) for t in moving))


def _like(x: Tensor, mask: Tensor | None) -> Tensor:
    """Allocate a tensor of the shape and layout of y and dx."""
    return torch.empty_like(x if mask is not None else dense(x))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mask, gamma, beta, *_, eps, _, _, use_batch, _, rectify = inputs
    ctx.save_for_backward(x, mask, gamma, beta if rectify else None, output[1])
    ctx.has_beta, ctx.eps, ctx.through, ctx.rectify = beta is not None, eps, use_batch, rectify
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, mask, gamma, beta, statistics = ctx.saved_tensors
    if not looked_through(dy):
        dx, dgamma, dbeta = torch.ops.multibn.backward(dy, x, mask, gamma, beta, statistics, ctx.through, ctx.rectify)
    else:
        values, dvalues = (x, dy) if mask is None else (pack(x, mask), pack(dy, mask))
        if ctx.rectify:
            dvalues = dvalues * formulas.positive(values, gamma, beta, statistics)
        dx, dgamma, dbeta = formulas.gradients(dvalues, values, gamma, statistics, ctx.eps, ctx.through)
        dx = dx if mask is None else unpack(dx, mask, x)
    return dx, None, None if gamma is None else dgamma, dbeta if ctx.has_beta else None, *(None,) * 9


_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.library.custom_op(
    "multibn::backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? mask, Tensor? gamma, Tensor? beta, Tensor statistics, bool through, bool rectify) -> "
    "(Tensor, Tensor, Tensor)",
    tags=TAGS,
)
def _backward(
    dy: Tensor, x: Tensor, mask: Tensor | None, gamma: Tensor | None, beta: Tensor | None, statistics: Tensor, through: bool,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dgamma and dbeta."""
    if mask is None:
        return kernel_backward(dy, x, gamma, statistics, through, beta, rectify)
    packed = pack(dy, mask), pack(x, mask)
    dx, dgamma, dbeta = kernel_backward(*packed, gamma, statistics, through, beta, rectify)
    return unpack(dx, mask, x), dgamma, dbeta


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, mask: Tensor | None, gamma: Tensor | None, beta: Tensor | None, statistics: Tensor, through: bool,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dgamma = x.new_empty(x.shape[1], dtype=PARAMETER[x.dtype])
    return _like(x, mask), dgamma, torch.empty_like(dgamma)
