"""A word when a batch is poisoned: NaN or Inf in it, which the moving statistics do not take in (BN-11).

Where the statistics of a channel are not finite, all of its output is NaN. So one place of the output, one value per channel,
shows it: that costs a few microseconds. What is wrong exactly is only then looked for.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from multibn.layer import PoisonedBatch, poisoned

if TYPE_CHECKING:
    from .layers import Layer

_told: WeakSet[torch.nn.Module] = WeakSet()


def watch(layer: Layer, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
    """Warn with ``PoisonedBatch``, once for each layer, if the batch that gave y was poisoned.

    On CPU only, since an accelerator would have to be waited for; and where a program runs as it is written, not where it is
    compiled, traced or transformed.
    """
    if not y.is_cpu or y.numel() == 0 or layer in _told or _looked_at(y):
        return
    with torch.no_grad():
        seen = x if layer.normalize_with == "moving" else _place(y, mask)  # the batch has not touched y then
        if math.isfinite(float(seen.sum(dtype=torch.float64))):
            return
        channels = _poisoned_channels(x, mask)
    if channels:  # else gamma or beta are to blame
        _told.add(layer)
        text = f"{type(layer).__name__}({layer.num_features})"
        warnings.warn(poisoned(f"{layer.name}, {text}" if layer.name else text, channels), PoisonedBatch, stacklevel=2)


def _looked_at(y: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or type(y) is not Tensor
        or bool(torch._C._len_torch_dispatch_stack())
        or bool(torch._C._are_functorch_transforms_active())
    )


def _place(y: Tensor, mask: Tensor | None) -> Tensor:
    """The values of all channels at one place that counts."""
    if mask is None:
        return y.detach().as_strided((y.shape[1],), (y.stride(1),))
    first = mask.nonzero()[:1]
    return y.movedim(1, -1)[tuple(first.unbind(1))]


def _poisoned_channels(x: Tensor, mask: Tensor | None) -> list[int]:
    """The channels whose mean or variance is not finite."""
    values = x.movedim(1, -1)
    values = (values.flatten(0, -2) if mask is None else values[mask]).to(torch.float64)
    var, mean = torch.var_mean(values, 0, correction=0)
    return (~(mean.isfinite() & var.isfinite())).nonzero().flatten().tolist()
