"""Recompute the moving statistics from the whole data: ``recalibrate``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from multibn.layer.types import Array
from multibn.recalibration import WholeData, check_batches, inputs, layer_by_layer
from multibn.sync.group import Group

from .block import BatchNorm, Normalization
from .description import as_numpy


def recalibrate(net: Any, batches: Iterable[Any], *, one_by_one: bool = False, group: Group | None = None) -> list[str]:
    """Set the moving statistics of every BatchNorm to those of the whole data, in place; return block names in order of use.

    Each block gets the exact mean and variance (biased or unbiased, as its spec says; biased for Gluon's own) of all values that
    reach it in inference, after the blocks before it have been recalibrated. So the data passes through the net once per
    BatchNorm, and the statistics do not depend on how the data is split into batches, or on the order of the batches.

    Bits: statistics are rounded once, from exact sums, so the same input bits give a block the same statistics bits. The net's
    own operators, such as a matrix product, may round differently at another batch size; with ``one_by_one`` each sample passes
    alone, which is slower, and the result has the same bits for any batches.

    A block that is used several times gets the statistics of all its inputs, and normalises with its old statistics until then.
    Blocks that no data reaches stay unchanged, as does everything else in the net. A hybridized net runs imperatively during
    the call, and keeps its graphs. If the call raises, nothing has changed.

    Args:
        net: initialized; called with each batch.
        batches: a list or data loader; each batch is an array, or a tuple or list whose first item is the array.
        one_by_one: pass the samples, along axis 0, through the net one at a time.
        group: the ranks over which the data is spread; each rank calls this function with its own batches, possibly none, and all
            ranks get the same statistics.

    Raises:
        TypeError: batches can be iterated only once.
        ValueError: a block gets fewer than 2 values per channel in total (BN-12).
        multibn.sync.SyncError: another rank raised, or has a different net.
    """
    check_batches(batches)
    found: list[Any] = []
    net.apply(found.append)
    blocks = list({id(block): block for block in found}.values())
    layers = [block for block in blocks if isinstance(block, (Normalization, gluon.nn.BatchNorm))]
    active = [block for block in blocks if getattr(block, "_active", False)]
    before: dict[int, Any] = {}

    def send(waiting: Sequence[Any], collect: Callable[[Any, Callable[[], Array]], None]) -> None:
        def hook(block: Any, given: tuple[Any, ...]) -> None:
            collect(block, lambda: np.moveaxis(as_numpy(given[0]), _axis(block), 1))

        with ExitStack() as hooks:
            for block in waiting:
                hooks.callback(block.register_forward_pre_hook(hook).detach)
            for x in inputs(batches, one_by_one):
                net(x)

    def settle(block: Any, data: WholeData) -> None:
        statistics = block.running_mean, block.running_var
        old = [parameter.data(parameter.list_ctx()[0]).asnumpy() for parameter in statistics]
        before[id(block)] = statistics, old
        unbiased = isinstance(block, Normalization) and block.spec.moving_variance == "unbiased"
        _set(statistics, data.settle(old[0], old[1], unbiased))

    for block in active:
        block._active = False
    try:
        with autograd.pause(train_mode=False):
            settled = layer_by_layer(layers, send, settle, group)
    except BaseException:
        for statistics, old in before.values():
            _set(statistics, old)
        raise
    finally:
        for block in active:
            block._active = True
    return [block.name for block in settled]


def _set(statistics: Sequence[Any], arrays: Sequence[Array]) -> None:
    make = mx.np.array if mx.util.is_np_array() else mx.nd.array
    for parameter, array in zip(statistics, arrays, strict=True):
        parameter.set_data(make(array, dtype=array.dtype))


def _axis(block: Any) -> int:
    return 1 if isinstance(block, BatchNorm) else int(block._kwargs["axis"])
