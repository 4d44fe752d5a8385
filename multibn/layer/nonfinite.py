"""The warning when a batch contains NaN or Inf (BN-11)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass
from .types import Array


class PoisonedBatch(RuntimeWarning):
    """A batch contains NaN or Inf; the moving statistics of those channels are not updated (BN-11)."""


def poisoned(layer: str, channels: Sequence[int]) -> str:
    """Return the text of the warning.

    Args:
        layer: the layer's name and kind.
        channels: the channels whose statistics are not finite.
    """
    some = ", ".join(map(str, channels[:5])) + (", ..." if len(channels) > 5 else "")
    return (
        f"{layer}: the batch statistics of {len(channels)} channel{'s'[: len(channels) > 1]} are not finite ({some}), since the "
        "input holds NaN or Inf there. The output is NaN there; the moving statistics stay as they were (BN-11). Look for the "
        "cause in the layers before this one. Shown once per layer."
    )


def poisoned_channels(x: Array, channel_axis: int = 1) -> list[int]:
    """Return the channels of a batch whose mean or variance is not finite."""
    values = np.moveaxis(x, channel_axis, 0).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        poisoned = ~np.isfinite(values.var(axis=tuple(range(1, x.ndim))))
    return [int(channel) for channel in np.flatnonzero(poisoned)]
