"""Masked batches, such as sequences padded to one length.

A mask is boolean, of x's shape without the channel axis, and True at valid positions. Output, gradients and moving statistics are
those of a batch that contains only the valid values, in the order of their positions. At other positions y is 0 for any x, so dx
is 0 there and dy is ignored. A mask of all False is an empty batch; a mask with a single True gives one value per channel
(BN-12).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from multibn_torch import compat


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Check that a mask fits x.

    Raises:
        TypeError: the mask is not a boolean tensor.
        ValueError: the mask's shape is not that of x without the channel axis.
        RuntimeError: the mask is on another device.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = f"one of type {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"expected a mask of type torch.bool, True at valid positions, got {came}. Convert it: mask != 0.")
    wanted = (x.shape[0], *x.shape[2:])
    if mask.shape != wanted:
        raise ValueError(
            f"expected a mask of shape {tuple(wanted)}, that of the input without its channel axis, got {tuple(mask.shape)}. "
            "The mask applies to all channels of a position: remove its channel axis, or expand the other axes."
        )
    if mask.device != x.device:
        raise RuntimeError(
            f"expected a mask on {x.device}, where the input is, got one on {mask.device}. Move it: mask.to(x.device)."
        )


def check_one_for_all(mask: Tensor) -> None:
    """Raise RuntimeError if ``torch.func.vmap`` maps over the mask."""
    if compat.is_batched(mask):
        raise RuntimeError(
            "expected one mask for all that vmap maps over, got one for each: how many values count would differ among them. "
            "Call the layer for each in turn, or use inference."
        )


def check_count(values: Tensor) -> None:
    """Raise ValueError if there is only one packed value per channel; batch statistics need more (BN-12)."""
    if values.shape[0] == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got a mask that is True once (BN-12). One value is its own "
            "mean, so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference."
        )


def pack(x: Tensor, mask: Tensor) -> Tensor:
    """Return the valid values of x, (m, C)."""
    return x.movedim(1, -1)[mask]


def unpack(values: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """Scatter packed values to their positions in a tensor of x's shape and layout, with zeros elsewhere."""
    return torch.zeros_like(x).movedim(1, -1).index_put((mask,), values).movedim(-1, 1)


def each_alone(x: Tensor, mask: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an elementwise function to the valid values without packing, so that no shape depends on the mask; 0 elsewhere."""
    counts, nothing = mask.unsqueeze(1), x.new_zeros(())
    return torch.where(counts, function(torch.where(counts, x, nothing)), nothing)
