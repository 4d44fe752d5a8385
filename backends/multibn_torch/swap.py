"""Put our layers in place of PyTorch's in a model."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .forward.dispatch import rectified
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer, check, keep_single

_OURS: dict[type[torch.nn.Module], type[Layer]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}


def swap(model: torch.nn.Module, fuse_relu: bool = False) -> list[str]:
    """Make every BatchNorm1d/2d/3d of the model ours, in place, and return the names of those that were not.

    Each layer stays the same object with the very same parameters, statistics, hooks and mode; only its class changes, so
    whatever refers to it (a shared layer, an optimizer, a name in the checkpoint) goes on working. Subclasses of PyTorch's
    layers, such as SyncBatchNorm, may compute something else and are left alone.

    Args:
        fuse_relu: where nothing but a ``torch.nn.ReLU`` takes a layer's output, the layer returns max(y, 0) and the ReLU hands it
            on: the same numbers, faster. What follows what is found by ``torch.fx.symbolic_trace``. A hook on such a layer sees
            max(y, 0).

    Raises:
        ValueError: a layer has parameters that the specification forbids, such as eps 0, or fuse_relu and the model cannot be
            traced; nothing is swapped then.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> swap(model, fuse_relu=True)
    ['1']
    >>> model[1].fuse_relu
    True
    """
    found = {name: module for name, module in model.named_modules() if type(module) in _OURS}
    for name, module in found.items():
        try:
            check(module)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from None
    followed = _followed_by_relu(model) if fuse_relu else {}
    for name, module in found.items():
        module.__class__ = _OURS[type(module)]
        module.name = name
        keep_single(module)
    for module, relus in followed.items():
        vars(module)["fuse_relu"] = True
        for relu in relus:
            relu.__class__ = ReLU
    return list(found)


class ReLU(torch.nn.ReLU):
    """``torch.nn.ReLU`` that hands on what a layer before it has rectified already."""

    def forward(self, input: Tensor) -> Tensor:
        """max(input, 0)."""
        if type(input) is Tensor and not torch.compiler.is_compiling() and not input.is_inference() and rectified(input):
            return input
        return super().forward(input)


def _followed_by_relu(model: torch.nn.Module) -> dict[torch.nn.Module, list[torch.nn.Module]]:
    """The layers whose output goes to a ReLU and nowhere else, whenever they are called, with those ReLUs."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:
        raise ValueError(
            f"fuse_relu=True needs a model that torch.fx can trace, got {type(model).__name__}: {error}. "
            "Leave fuse_relu out, or swap the parts of the model that can be traced one by one."
        ) from error
    modules = dict(model.named_modules())
    relus: dict[torch.nn.Module, list[torch.nn.Module]] = {}
    alone: set[torch.nn.Module] = set()
    for node in graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if module is None or type(module) not in (*_OURS, *_OURS.values()):
            continue
        after = [modules.get(user.target) if user.op == "call_module" else None for user in node.users]
        if len(after) == 1 and type(after[0]) in (torch.nn.ReLU, ReLU):
            relus.setdefault(module, []).append(after[0])  # type: ignore[arg-type]
        else:
            alone.add(module)
    return {module: its for module, its in relus.items() if module not in alone}
