"""A word when a batch is poisoned: NaN or Inf in it, which the moving statistics do not take in (BN-11).

The kernel counts the channels that it left as they were, so that it costs nothing to know. Where PyTorch's operators compute on a
CPU, one value of the output per channel shows it. What is wrong exactly is only then looked for. On an accelerator, and in
programs that are compiled, traced or transformed, nobody looks: that would wait for the device, or break the graph.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from multibn.layer.nonfinite import PoisonedBatch, poisoned

_told: WeakSet[Named] = WeakSet()


class Named(Protocol):
    """A layer, as far as the functions know it."""

    name: str
    num_features: int
    fused_in: tuple[str, ...]
    _examined: Any

    def __hash__(self) -> int: ...


def tell(layer: Named, x: Tensor) -> None:
    """Warn with ``PoisonedBatch``, once for each layer, if x is a poisoned batch."""
    if layer in _told:
        return
    with torch.no_grad():
        channels = _poisoned_channels(x)
    if channels:  # else a moving statistic is too large for its type
        _told.add(layer)
        text = f"{type(layer).__name__}({layer.num_features})"
        warnings.warn(poisoned(f"{layer.name}, {text}" if layer.name else text, channels), PoisonedBatch, stacklevel=2)


def watch(layer: Named, x: Tensor, y: Tensor | None) -> None:
    """``tell`` if y, or x where the batch's statistics have not normalised it, is not finite."""
    if not x.is_cpu or x.numel() == 0 or layer in _told:
        return
    with torch.no_grad():
        seen = x if y is None else y.detach().as_strided((y.shape[1],), (y.stride(1),))  # a value of each channel
        if math.isfinite(float(seen.sum(dtype=torch.float64))):
            return
    tell(layer, x)


def _poisoned_channels(x: Tensor) -> list[int]:
    """The channels whose mean or variance is not finite."""
    var, mean = torch.var_mean(x.movedim(1, -1).flatten(0, -2).to(torch.float64), 0, correction=0)
    return (~(mean.isfinite() & var.isfinite())).nonzero().flatten().tolist()
