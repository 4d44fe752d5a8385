"""Put our layers in place of PyTorch's in a model."""

from __future__ import annotations

import torch

from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer, check, keep_single

_OURS: dict[type[torch.nn.Module], type[Layer]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}


def swap(model: torch.nn.Module) -> list[str]:
    """Make every BatchNorm1d/2d/3d of the model ours, in place, and return their names in the model.

    Each layer stays the same object with the very same parameters, statistics, hooks and mode; only its class changes, so
    whatever refers to it (a shared layer, an optimizer, a name in the checkpoint) goes on working. Subclasses of PyTorch's
    layers, such as SyncBatchNorm, may compute something else and are left alone.

    Raises:
        ValueError: a layer has parameters that the specification forbids, such as eps 0; nothing is swapped then.

    >>> swap(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()))
    ['1']
    """
    found = {name: module for name, module in model.named_modules() if type(module) in _OURS}
    for name, module in found.items():
        try:
            check(module)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from None
    for name, module in found.items():
        module.__class__ = _OURS[type(module)]
        module.name = name
        keep_single(module)
    return list(found)
