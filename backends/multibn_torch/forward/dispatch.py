"""Choose the implementation of each forward: eager, compiled, traced, exported or under a ``torch.func`` transform. All compute
the same function.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multibn_torch import fusion
from multibn_torch.compat import dispatch_modes, exporting, tracing_state

from . import formulas, masked, nonfinite
from .eager import PARAMETER, by_kernel, recomputed, transformed
from .formulas import Moving, Settings
from .framework import by_framework, by_torch_operators
from .gate import NotPlainError, check_can_be_updated, resolved
from .operators import by_custom_operator

_PLAIN = (Tensor, torch.nn.Parameter)


def normalise(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings, on_kernel: bool,
    mask: Tensor | None = None, layer: nonfinite.Named | None = None,
) -> Tensor:  # fmt: skip
    """Return y; update the moving statistics in place, but not when activation checkpointing recomputes a forward (BN-05)."""
    if mask is not None:
        return _masked(x, gamma, beta, moving, how, on_kernel, mask, layer)
    if torch.compiler.is_compiling() or tracing_state() is not None:
        return (by_custom_operator if on_kernel and not _exported() else by_torch_operators)(x, gamma, beta, moving, how)
    if how.update and recomputed():
        how = again(how)
    if transformed():
        work = torch.float64 if on_kernel else PARAMETER[x.dtype]
        return formulas.forward(x, gamma, beta, moving, how, work)
    looked_at = _looked_at(x)
    if on_kernel:
        if looked_at:
            return by_custom_operator(x, gamma, beta, moving, how)
        return _by_kernel_or_operators(x, gamma, beta, moving, how, layer, False)
    if looked_at:
        return by_torch_operators(x, gamma, beta, moving, how)
    y = by_framework(x, gamma, beta, moving, how)
    if how.update and layer is not None:
        nonfinite.watch(layer, x, y if how.use_batch else None)
    return y


def rectify(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings, on_kernel: bool,
    mask: Tensor | None = None, layer: nonfinite.Named | None = None,
) -> Tensor:  # fmt: skip
    """Return max(y, 0) with y as from ``normalise``; in eager mode the kernel computes both in one pass over the data.

    A layer that ``swap`` fused rectifies only while the module that calls the layer and its ReLU runs; otherwise this returns y,
    and the ReLU module computes the maximum.
    """
    observed = torch.compiler.is_compiling() or tracing_state() is not None or transformed() or _looked_at(x)
    keys = () if layer is None else layer.fused_in
    apart = observed or mask is not None or not on_kernel
    run = fusion.current(keys) if keys and not apart else None
    if apart or (keys and run is None):
        y = normalise(x, gamma, beta, moving, how, on_kernel, mask, layer)
        return y if keys else torch.relu(y)
    how = again(how) if how.update and recomputed() else how
    y = _by_kernel_or_operators(x, gamma, beta, moving, how, layer, True)
    if run is not None:
        fusion.mark(y, run)
        return fusion.Rectified.wrap(y) if layer is not None and layer.before_function else y
    return y


def _by_kernel_or_operators(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    moving: Moving,
    how: Settings,
    layer: nonfinite.Named | None,
    rectify: bool,
) -> Tensor:
    """Call ``by_kernel``; if the kernel cannot use one of the tensors, call PyTorch's own operators, which support the tensor or
    raise.
    """
    try:
        return by_kernel(x, gamma, beta, moving, how, layer, rectify)
    except NotPlainError:
        plain: Any = [resolved(t) for t in (x, gamma, beta)]
    if any(new is not old for new, old in zip(plain, (x, gamma, beta), strict=True)):
        x, gamma, beta = plain
        with suppress(NotPlainError):
            return by_kernel(x, gamma, beta, moving, how, layer, rectify)
    for name, t in (("weight", gamma), ("bias", beta), ("running_mean", moving.mean), ("running_var", moving.var)):
        if t is not None and t.device != x.device:
            raise RuntimeError(
                f"expected {name} on {x.device}, where the input is, got it on {t.device}. Move the layer or the input."
            )
    if how.update:
        check_can_be_updated(*moving)
    y = by_torch_operators(x, gamma, beta, moving, how)
    return torch.relu(y) if rectify else y


def _looked_at(x: Tensor) -> bool:
    return type(x) not in _PLAIN or bool(dispatch_modes()) or x.is_meta


def _masked(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings, on_kernel: bool, mask: Tensor,
    layer: nonfinite.Named | None,
) -> Tensor:  # fmt: skip
    masked.check_mask(mask, x)
    function = partial(normalise, gamma=gamma, beta=beta, moving=moving, on_kernel=on_kernel, layer=layer)
    if not (how.use_batch or how.update):
        return masked.each_alone(x, mask, partial(function, how=how))
    if torch.compiler.is_compiling() and on_kernel and not _exported():  # packing would make a shape depend on the mask's values
        return by_custom_operator(x, gamma, beta, moving, how, mask)
    masked.check_one_for_all(mask)
    values = masked.pack(x, mask)
    masked.check_count(values)
    return masked.unpack(function(values, how=how._replace(update=how.update and values.numel() > 0)), mask, x)


def _exported() -> bool:
    """Return whether the program is being traced or exported to run in another process, where multibn's custom operators may not
    be registered.
    """
    return tracing_state() is not None or exporting()


def again(how: Settings) -> Settings:
    """Return the settings for recomputing a forward under activation checkpointing: the same, but without updating the moving
    statistics.

    Raises:
        RuntimeError: the layer normalises with moving statistics, which have changed since the forward.
    """
    if not how.use_batch:
        raise RuntimeError(
            "a layer that normalises with its moving statistics and updates them cannot be run again in backward, as activation "
            "checkpointing does: they are not those of the forward any more (BN-05, BN-09). Set update_statistics=False, or "
            "leave the layer out of the checkpoint."
        )
    return how._replace(update=False)
