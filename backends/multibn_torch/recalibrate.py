"""Set the moving statistics to those of the whole dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from multibn.layer.types import Array
from multibn.recalibration import WholeData, check_batches, inputs, layer_by_layer
from multibn.sync.group import Group

from .compat import BatchNormBase


def recalibrate(
    model: torch.nn.Module, batches: Iterable[Any], *, one_by_one: bool = False, group: Group | None = None
) -> list[str]:
    """Set the moving statistics of every BatchNorm to those of the whole dataset, in place; return the names in call order.

    Each layer gets the exact mean and variance (biased or unbiased, as the layer is configured) of all values that it receives
    in inference once the layers before it have their new statistics. This takes one pass over the data per BatchNorm. The result
    does not depend on how the data is split into batches, nor on their order.

    Reproducibility: each statistic is an exact sum, rounded once, so the same input bits give the same statistics. The model's
    other operators, such as matrix products, may round differently at another batch size; with ``one_by_one`` the model gets one
    sample at a time, which is slower, and the result has the same bits for any batch size.

    PyTorch's own BatchNorm layers are included. A layer that the model calls several times gets the statistics of all its inputs,
    computed while the layer still uses its old ones. Layers without moving statistics and layers that the model does not call
    stay as they are, as do parameters, num_batches_tracked and the mode of each module. If this function raises, nothing has
    changed.

    Args:
        model: called with each batch.
        batches: a list or data loader; each batch is a tensor, or a tuple or list whose first item is one.
        one_by_one: pass the samples, along axis 0, through the model one at a time.
        group: the ranks that share the data, such as ``TorchGroup()``; each rank calls this with its own batches, possibly none,
            and all ranks get the same statistics.

    Raises:
        TypeError: batches can be iterated only once.
        ValueError: a layer gets fewer than 2 values per channel in total (BN-12).
        multibn.sync.SyncError: another rank raised, or has another model.
    """
    check_batches(batches)
    modules = dict(model.named_modules())
    layers = [m for m in modules.values() if isinstance(m, BatchNormBase) and m.running_mean is not None]
    modes = {name: module.training for name, module in modules.items()}
    before: list[Any] = [(t, t.clone()) for m in layers for t in (m.running_mean, m.running_var) if t is not None]

    def send(waiting: Sequence[Any], collect: Callable[[Any, Callable[[], Array]], None]) -> None:
        def hook(layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = given[0] if given else named["input"]
            collect(layer, lambda: (x if x.dtype == torch.float64 else x.float()).cpu().numpy())

        with ExitStack() as hooks:
            for layer in waiting:
                hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for x in inputs(batches, one_by_one):
                model(x)

    model.eval()
    try:
        with torch.no_grad():
            settled = layer_by_layer(layers, send, _settle, group)
    except BaseException:
        for statistic, old in before:
            statistic.copy_(old)
        raise
    finally:
        for name, module in modules.items():
            module.training = modes[name]
    names = {id(module): name for name, module in modules.items()}
    return [names[id(layer)] for layer in settled]


def _settle(layer: Any, data: WholeData) -> None:
    """Store the statistics in a layer; PyTorch's own layers store the unbiased variance."""
    unbiased = getattr(layer, "moving_variance", "unbiased") == "unbiased"
    mean, var = data.settle(layer.running_mean.cpu().numpy(), layer.running_var.cpu().numpy(), unbiased)
    layer.running_mean.copy_(torch.from_numpy(mean))
    layer.running_var.copy_(torch.from_numpy(var))
