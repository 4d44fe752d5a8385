"""Warn when a batch contains NaN or Inf; the moving statistics of those channels are not updated (BN-11).

The kernel counts the channels that it does not update, so detection costs nothing. With PyTorch's operators on a CPU, one output
value per channel is checked. The affected channels are searched for only after a detection. There is no check on accelerators and
in compiled, traced or transformed programs, where it would synchronise with the device or break the graph.
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
    """The attributes of a layer that these functions use."""

    name: str
    num_features: int
    fused_in: tuple[str, ...]
    before_function: bool
    _examined: Any

    def __hash__(self) -> int: ...


def tell(layer: Named, x: Tensor) -> None:
    """Warn with ``PoisonedBatch``, once per layer, if a channel of x has a mean or variance that is not finite."""
    if layer in _told:
        return
    with torch.no_grad():
        channels = _poisoned_channels(x)
    if channels:  # none: the input is finite, but a moving statistic overflowed its type
        _told.add(layer)
        text = f"{type(layer).__name__}({layer.num_features})"
        warnings.warn(poisoned(f"{layer.name}, {text}" if layer.name else text, channels), PoisonedBatch, stacklevel=2)


def watch(layer: Named, x: Tensor, y: Tensor | None) -> None:
    """Call ``tell`` if one value per channel of y, or any value of x if y is None, is not finite.

    Pass y only if the batch statistics normalised it: then NaN or Inf in a channel of x makes that whole channel NaN.
    """
    if not x.is_cpu or x.numel() == 0 or layer in _told:
        return
    with torch.no_grad():
        seen = x if y is None else y.detach().as_strided((y.shape[1],), (y.stride(1),))  # one value per channel
        if math.isfinite(float(seen.sum(dtype=torch.float64))):
            return
    tell(layer, x)


def _poisoned_channels(x: Tensor) -> list[int]:
    """Return the channels whose mean or variance is not finite."""
    var, mean = torch.var_mean(x.movedim(1, -1).flatten(0, -2).to(torch.float64), 0, correction=0)
    return (~(mean.isfinite() & var.isfinite())).nonzero().flatten().tolist()
