"""Estimate the time that synchronised statistics add to a step of ResNet-50, from the measured time of messages.

A message of n bytes among p ranks takes 2 (p-1) (a + n/(p b)) by a ring, as in gloo, and 2 log2(p) a + 2 (p-1)/p n/b by halving
and doubling, as MPI does for messages of this size; a is the latency of one hop, b the bandwidth. Both follow from the
messages of two ranks, for which the formulas are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from rich import box
from rich.table import Table

LAYERS: Final = {64: 7, 128: 8, 256: 16, 512: 11, 1024: 7, 2048: 4}
"""ResNet-50's BatchNorms by their channels: 53."""

RANKS: Final = (8, 16, 32, 64, 128, 256, 512, 1024)

NUMBERS: Final = 12
"""Number of int64 per channel in a message, for float32 input of usual exponents."""


def message(channels: int) -> int:
    """Return the number of bytes of a pass's message."""
    return 64 + 8 * NUMBERS * channels


def model(times: Mapping[str, float]) -> tuple[float, float]:
    """Latency of a hop in microseconds, and bytes per microsecond, from the times of messages among two ranks."""
    sizes = sorted(times, key=int)
    small, large = sizes[0], sizes[-1]
    bandwidth = (int(large) - int(small)) / max(times[large] - times[small], 1e-9)
    return times[small] / 2, bandwidth


def milliseconds(engine: str, times: Mapping[str, float], ranks: int) -> float:
    """Return the time of all messages of a step."""
    latency, bandwidth = model(times)
    total = 0.0
    for channels, count in LAYERS.items():
        size = message(channels)
        if engine == "gloo":
            each = 2 * (ranks - 1) * (latency + size / (ranks * bandwidth))
        else:
            each = 2 * math.log2(ranks) * latency + 2 * (ranks - 1) / ranks * size / bandwidth
        total += 2 * count * each
    return total / 1e3


def table(messages: Mapping[str, Mapping[str, float]]) -> Table:
    """Milliseconds per step, engine by engine."""
    out = Table(box=box.SIMPLE_HEAD, min_width=60, title="on paper: messages of a step of ResNet-50, ms", title_justify="left")
    out.add_column("ranks", justify="right")
    for engine in messages:
        out.add_column(engine, justify="right")
    for ranks in RANKS:
        out.add_row(str(ranks), *(f"{milliseconds(engine, times, ranks):.1f}" for engine, times in messages.items()))
    return out
