"""Moving statistics that are those of the whole data."""

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
    """Make the moving statistics of every BatchNorm those of the whole data, in place; return the blocks' names, in order of use.

    Each block gets exact mean and variance (biased or not, as its spec says; biased for Gluon's own) of all values that reach
    it in inference, the blocks before it having theirs already. So the data goes through the net once for each BatchNorm, and
    how it is cut into batches, in which order, is no part of the meaning.

    Bits: statistics are rounded once, from exact sums. So where the same bits reach a block, it gets the same bits. The net's
    own operators, such as a matrix product, may round otherwise in a batch of another size; with ``one_by_one`` each sample
    goes alone, which is slower, and the result has the same bits whatever the batches were.

    A block that is used several times gets the statistics of all its inputs, its own being as they were meanwhile. Blocks
    that nothing reaches are left alone, as is all else. A hybridized net runs imperatively meanwhile, and keeps its graphs.
    Where this raises, nothing has changed.

    Args:
        net: initialized; called with each batch.
        batches: a list or data loader; each batch an array, or a tuple or list that begins with it.
        one_by_one: send the samples, along axis 0, through the net one at a time.
        group: the ranks over which the data is spread; each calls this with its own batches, perhaps none, and all get the same
            statistics.

    Raises:
        TypeError: batches can be gone through only once.
        ValueError: a block gets fewer than 2 values per channel in all (BN-12).
        multibn.sync.SyncError: another rank raised, or has another net.
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
