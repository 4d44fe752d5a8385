"""The three switches of BN-09: methods of a layer, and functions for all layers of a model.

The switches are independent of each other and of the mode: ``train()`` and ``eval()`` do not change them, and copies of a layer
keep them. With all three on, training mode computes the same as inference mode, and nothing is learned.
"""

from __future__ import annotations

from typing import Literal

import torch

_NO_STATISTICS = (
    "use_moving_statistics needs moving statistics, got a layer without: it was made with track_running_stats=False (BN-09). "
    "Make it with track_running_stats=True."
)


class Switches(torch.nn.Module):
    """Mixin with the switches, for layers with PyTorch's state."""

    normalize_with: Literal["batch", "moving"] = "batch"
    update_statistics: bool = True

    def freeze_statistics(self, on: bool = True) -> None:
        """Stop updating the moving statistics and num_batches_tracked in training; pass ``on=False`` to undo."""
        self.update_statistics = not on

    def freeze_affine(self, on: bool = True) -> None:
        """Stop learning gamma and beta, and discard their gradients; pass ``on=False`` to learn both again."""
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(not on)
            if on:
                parameter.grad = None  # else an optimizer would apply the gradient in its next step

    def use_moving_statistics(self, on: bool = True) -> None:
        """Normalise with the moving statistics in training too; pass ``on=False`` to normalise with the batch statistics again.

        Raises:
            ValueError: the layer has no moving statistics.
        """
        if on and self.running_mean is None:
            raise ValueError(_NO_STATISTICS)
        self.normalize_with = "moving" if on else "batch"

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of what training does not update: "statistics", "affine" (neither gamma nor beta requires a gradient), both or
        none.
        """
        parameters = list(self.parameters(recurse=False))
        affine = bool(parameters) and not any(p.requires_grad for p in parameters)
        return ("statistics",) * (not self.update_statistics) + ("affine",) * affine

    def frozen_text(self) -> str:
        """Return ``frozen`` as part of the layer's repr."""
        return f", frozen={'+'.join(self.frozen)}" if self.frozen else ""


def freeze_statistics(model: torch.nn.Module, on: bool = True) -> list[str]:
    """Call ``freeze_statistics`` on all multibn layers of a model; return their names.

    Raises:
        ValueError: the model has no multibn layers.

    >>> from multibn_torch import BatchNorm2d
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), BatchNorm2d(8))
    >>> freeze_statistics(model)
    ['1']
    >>> model.train()[1].frozen
    ('statistics',)
    """
    layers = _ours(model)
    for layer in layers.values():
        layer.freeze_statistics(on)
    return list(layers)


def freeze_affine(model: torch.nn.Module, on: bool = True) -> list[str]:
    """Call ``freeze_affine`` on all multibn layers of a model; return their names.

    Raises:
        ValueError: the model has no multibn layers.
    """
    layers = _ours(model)
    for layer in layers.values():
        layer.freeze_affine(on)
    return list(layers)


def use_moving_statistics(model: torch.nn.Module, on: bool = True) -> list[str]:
    """Call ``use_moving_statistics`` on all multibn layers of a model; return their names.

    Raises:
        ValueError: the model has no multibn layers, or one has no moving statistics; no layer has changed then.
    """
    layers = _ours(model)
    for name, layer in layers.items():
        if on and layer.running_mean is None:
            raise ValueError(f"{name or 'the model'}: {_NO_STATISTICS}")
    for layer in layers.values():
        layer.use_moving_statistics(on)
    return list(layers)


def _ours(model: torch.nn.Module) -> dict[str, Switches]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Switches)}
    if not layers:
        raise ValueError("expected a model with multibn_torch layers, found none. Call multibn_torch.swap(model) first.")
    return layers
