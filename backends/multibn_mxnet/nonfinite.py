"""A word when a batch is poisoned: NaN or Inf in it, which the moving statistics do not take in (BN-11).

The kernel counts the channels that it left as they were, so that it costs nothing to know. Where MXNet's operators compute on a
CPU, one value of the output per channel shows it, which is waited for. What is wrong exactly is only then looked for. On an
accelerator and in graphs nobody looks.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import numpy as np
from mxnet import autograd

from multibn.layer.nonfinite import PoisonedBatch, poisoned, poisoned_channels

from .description import as_numpy

_told: WeakSet[Any] = WeakSet()


def tell(block: Any, x: Any) -> None:
    """Warn with ``PoisonedBatch``, once for each block, if x is a poisoned batch."""
    if block in _told:
        return
    with autograd.pause():
        channels = poisoned_channels(as_numpy(x), block.layer.axis)
    if channels:  # else a moving statistic is too large for its type
        _told.add(block)
        text = f"{block.name}, {type(block).__name__}({x.shape[block.layer.axis]})"
        warnings.warn(poisoned(text, channels), PoisonedBatch, stacklevel=2)


def watch(block: Any, x: Any, y: Any) -> None:
    """``tell`` if y, or x where the batch's statistics have not normalised it, is not finite."""
    if block in _told or x.context.device_type != "cpu" or x.size == 0:
        return
    axis = block.layer.axis % x.ndim
    with autograd.pause():
        by_batch = block.spec.normalize_with == "batch"
        seen = y[tuple(slice(None) if i == axis else 0 for i in range(x.ndim))] if by_batch else x
        if np.isfinite(as_numpy(seen).astype(np.float64).sum()):
            return
    tell(block, x)
