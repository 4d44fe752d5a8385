"""Lanes: one float64 accumulator per position of a chunk, and their summation to channel sums.

The compiler vectorises across lanes, which reorders nothing, so the bits depend on the shape alone (BN-15).
"""

from __future__ import annotations

from typing import Any

from multibn.spec.clauses import LANES

from .addresses import unsigned
from .halves import load
from .jit import inner
from .plan import Plan, channels_of

# A thread's scratch holds six vectors of LANES values at constant offsets, so that the compiler can prove that they do not
# overlap.
_PAD = 24
"""Padding between vectors, in values: at power-of-two distances they would map to the same cache sets."""


A, B, MEAN, SCALE, BETA, _ASIDE, ALL = (i * (LANES + _PAD) for i in range(7))


SIDE_BY_SIDE = 8
"""With at least this many channels, the lanes of all channels are summed in one vectorised loop over channels."""


@inner
def spread(values: Any, plan: Plan, group: int, lanes: Any) -> None:
    """Broadcast the value of each channel of the group to all lanes of the channel."""
    first, last = channels_of(plan, group)
    if plan.width == 1:  # a plain copy, which LLVM vectorises
        for j in range(last - first):
            lanes[j] = values[first + j]
    else:
        width = unsigned(plan.width)
        for k in range(unsigned(last - first)):
            value = values[unsigned(first) + k]
            for j in range(k * width, (k + unsigned(1)) * width):
                lanes[j] = value
    sample = plan.row // plan.joined
    for j in range(sample, plan.joined * sample):
        lanes[j] = lanes[j - sample]


@inner
def _fold(lanes: Any, start: int, width: int, each: int) -> None:
    """Sum ``width`` vectors of ``each`` lanes into the first by pairwise halving: repeatedly add the second half to the first
    half.

    All indices are unsigned, here and in ``fold_lanes``.
    """
    while width > 1:
        half = (width + unsigned(1)) // unsigned(2)
        there = start + half * each
        for j in range((width - half) * each):
            lanes[start + j] += lanes[there + j]
        width = half


@inner
def fold_lanes(lanes: Any, start: int, plan: Plan, group: int, sums: Any) -> None:
    """Sum the lanes of each channel of the group, which begin at ``start``; the lanes at _ASIDE are overwritten."""
    first, last = channels_of(plan, group)
    channels, width = unsigned(last - first), unsigned(plan.width)
    if plan.joined > 1:
        _fold(lanes, start, unsigned(plan.joined), unsigned(plan.row // plan.joined))
    if width == 1:
        for k in range(channels):
            sums[unsigned(first) + k] = lanes[start + k]
    elif channels >= SIDE_BY_SIDE:
        aside = unsigned(_ASIDE)
        _lay_side_by_side(lanes, start, aside, channels, width)
        _fold(lanes, aside, (width + unsigned(1)) // unsigned(2), channels)
        for k in range(channels):
            sums[unsigned(first) + k] = lanes[aside + k]
    else:
        for k in range(channels):
            _fold(lanes, start + k * width, width, unsigned(1))
            sums[unsigned(first) + k] = lanes[start + k * width]


@inner
def _lay_side_by_side(lanes: Any, start: int, out: int, channels: int, width: int) -> None:
    """Perform the first halving of each channel's lanes; write the result to ``out`` with channels interleaved."""
    half = (width + unsigned(1)) // unsigned(2)
    for j in range(width - half):
        for k in range(channels):
            lanes[out + j * channels + k] = lanes[start + k * width + j] + lanes[start + k * width + j + half]
    for j in range(width - half, half):
        for k in range(channels):
            lanes[out + j * channels + k] = lanes[start + k * width + j]


@inner
def clear(lanes: Any, used: int) -> None:
    """Set the lanes A and B to 0."""
    for j in range(used):
        lanes[j + A] = lanes[j + B] = 0.0


@inner
def add(a: Any, lanes: Any) -> None:
    """Add a chunk to the lanes A."""
    for j in range(a.shape[0]):
        lanes[j] += load(a[j])


@inner
def fold_blocks(sums: Any, first: int, last: int) -> None:
    """Sum channels first..last over the blocks into the first block, folded like lanes."""
    width = sums.shape[0]
    while width > 1:
        half = (width + 1) // 2
        for b in range(width - half):
            add(sums[half + b, first:last], sums[b, first:last])
        width = half
