"""Types that all layers share, and m, the number of values per channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    pass


Array = NDArray[Any]


PARAMETER_TYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
"""Type of the input -> type of gamma, beta and the moving statistics (BN-10)."""


def values_per_channel(shape: Sequence[int], channel_axis: int = 1) -> int:
    """Return m of the clauses: the number of values per channel."""
    axis = channel_axis % len(shape)
    return int(np.prod([n for i, n in enumerate(shape) if i != axis], dtype=np.int64))
