"""Warn when a batch contains NaN or Inf, which never enter the moving statistics (BN-11).

The kernel counts the channels whose moving statistics it did not update, so detection is free. Where MXNet's operators compute
on a CPU, ``watch`` waits for one value of the output per channel and checks that it is finite. If a check fails, ``tell``
determines the affected channels. Nothing checks on accelerators and in graphs.
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
    """Warn with ``PoisonedBatch``, once per block, if the batch statistics of x are not finite."""
    if block in _told:
        return
    with autograd.pause():
        channels = poisoned_channels(as_numpy(x), block.layer.axis)
    if channels:  # if none, a moving statistic overflows its type
        _told.add(block)
        text = f"{block.name}, {type(block).__name__}({x.shape[block.layer.axis]})"
        warnings.warn(poisoned(text, channels), PoisonedBatch, stacklevel=2)


def watch(block: Any, x: Any, y: Any) -> None:
    """Call ``tell`` if y is not finite; if the moving statistics normalise, check x instead."""
    if block in _told or x.context.device_type != "cpu" or x.size == 0:
        return
    axis = block.layer.axis % x.ndim
    with autograd.pause():
        by_batch = block.spec.normalize_with == "batch"
        seen = y[tuple(slice(None) if i == axis else 0 for i in range(x.ndim))] if by_batch else x
        if np.isfinite(as_numpy(seen).astype(np.float64).sum()):
            return
    tell(block, x)
