"""Moving statistics that are those of the whole data."""

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
    """Make the moving statistics of every BatchNorm those of the whole data, in place; return the layers' names, in order of use.

    Each layer gets exact mean and variance (biased or not, as the layer has it) of all values that reach it in inference, the
    layers before it having theirs already. So the data goes through the model once for each BatchNorm, and how it is cut into
    batches, in which order, is no part of the meaning.

    Bits: statistics are rounded once, from exact sums. So where the same bits reach a layer, it gets the same bits. The
    model's own operators, such as a matrix product, may round otherwise in a batch of another size; with ``one_by_one`` each
    sample goes alone, which is slower, and the result has the same bits whatever the batches were.

    PyTorch's own layers count too. A layer that is used several times gets the statistics of all its inputs, its own being as
    they were meanwhile. Layers without moving statistics, or that nothing reaches, are left alone, as is all else:
    parameters, num_batches_tracked, the mode of each module. Where this raises, nothing has changed.

    Args:
        model: called with each batch.
        batches: a list or data loader; each batch a tensor, or a tuple or list that begins with it.
        one_by_one: send the samples, along axis 0, through the model one at a time.
        group: the ranks over which the data is spread, such as ``TorchGroup()``; each calls this with its own batches, perhaps
            none, and all get the same statistics.

    Raises:
        TypeError: batches can be gone through only once.
        ValueError: a layer gets fewer than 2 values per channel in all (BN-12).
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
    """PyTorch's own layers are unbiased."""
    unbiased = getattr(layer, "moving_variance", "unbiased") == "unbiased"
    mean, var = data.settle(layer.running_mean.cpu().numpy(), layer.running_var.cpu().numpy(), unbiased)
    layer.running_mean.copy_(torch.from_numpy(mean))
    layer.running_var.copy_(torch.from_numpy(var))
