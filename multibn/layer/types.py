"""Types that all layers share, and shapes: (N, C, S), and m, the number of values per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


PARAMETER_TYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
"""Type of the input -> type of gamma, beta and the moving statistics (BN-10)."""


def three_axes(shape: Sequence[int], channel_axis: int = 1) -> tuple[int, int, int]:
    """Return a shape as (N, C, S): the axes before the channel axis, the channels, the axes after it."""
    axis = channel_axis % len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def values_per_channel(shape: Sequence[int], channel_axis: int = 1) -> int:
    """Return m of the clauses: the number of values per channel."""
    n, _, s = three_axes(shape, channel_axis)
    return n * s
