"""Partition of an (N, C, S) array into chunks, blocks and groups (BN-15).

A row holds the S values of one channel of one sample. Rows are cut into equal chunks of at most LANES values; a block is BLOCK
consecutive chunks. If rows are short, several neighbouring channels share a chunk (a group); if whole samples are short, several
samples share one. So the inner loops are long and contiguous for every shape.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from multibn.spec.clauses import BLOCK, JOINED, LANES

from .jit import compiled, inner
from .simd import ROWS, RUN

EVEN = 4
"""Groups come in multiples of this number where there are few, so that two or four threads get equal shares.

The result does not depend on this number, since each channel is summed separately."""


class Plan(NamedTuple):
    """How an (N, C, S) array is cut (BN-15)."""

    n: int
    channels: int
    s: int
    joined: int
    """Samples per chunk; 1 if two samples do not fit in a chunk or the batch is smaller than 2*JOINED."""
    rows: int
    """Number of sets of ``joined`` samples, the last possibly smaller."""
    row: int
    """Values of ``joined`` samples, all channels."""
    together: int
    """Channels per group: neighbouring channels that share a chunk."""
    pieces: int
    """Chunks of a row of one channel."""
    width: int
    """Values of a channel in a chunk of one sample; the last chunk of a row may have fewer."""
    groups: int
    chunks: int
    """Chunks of a group."""
    blocks: int
    """Blocks of a group."""


@compiled
def plan_of(shape: tuple[int, int, int]) -> Plan:
    """The plan for an array of this shape."""
    n, channels, s = shape
    joined = max(1, min(LANES // (channels * s), n // JOINED))
    rows = math.ceil(n / joined)
    pieces = math.ceil(s / LANES)
    together = min(channels, max(1, LANES // s))
    if channels * s >= LANES and s > 1:  # not for S = 1: long rows are read faster
        together = math.ceil(channels / (EVEN * math.ceil(channels / (EVEN * together))))
    chunks = rows * pieces
    width = math.ceil(s / pieces)
    groups, blocks = math.ceil(channels / together), math.ceil(chunks / BLOCK)
    return Plan(n, channels, s, joined, rows, joined * channels * s, together, pieces, width, groups, chunks, blocks)


@inner
def channels_of(plan: Plan, group: int) -> tuple[int, int]:
    """The channels of a group."""
    return group * plan.together, min((group + 1) * plan.together, plan.channels)


@inner
def chunk_of(plan: Plan, group: int, chunk: int) -> tuple[int, int]:
    """Offset of a chunk of a group in the flat array, and its number of values."""
    channel = group * plan.together
    if plan.joined > 1:
        return chunk * plan.row, min(plan.joined, plan.n - chunk * plan.joined) * plan.channels * plan.s
    if plan.pieces == 1:
        return chunk * plan.row + channel * plan.s, min(plan.together, plan.channels - channel) * plan.s
    row, piece = chunk // plan.pieces, chunk % plan.pieces
    return row * plan.row + channel * plan.s + piece * plan.width, min(plan.width, plan.s - piece * plan.width)


@inner
def lanes_in_use(plan: Plan) -> int:
    """Number of lanes of a full chunk."""
    return plan.joined * min(plan.together, plan.channels) * plan.width


@inner
def count_of(plan: Plan, begin: int, end: int) -> int:
    """Number of values per channel in the chunks begin..end, end excluded."""
    if plan.joined > 1:
        return (min(end * plan.joined, plan.n) - begin * plan.joined) * plan.s
    whole = end // plan.pieces - begin // plan.pieces
    return whole * plan.s + (end % plan.pieces - begin % plan.pieces) * plan.width


@inner
def steps_of(plan: Plan, block: int) -> tuple[int, int]:
    """Range of steps of a block in a pass that computes no sums; a step is one chunk of each of ROWS consecutive rows."""
    steps = math.ceil(plan.rows / ROWS) * plan.pieces
    return steps * block // plan.blocks, steps * (block + 1) // plan.blocks


@inner
def run_of(plan: Plan, group: int, chunk: int, end: int) -> tuple[int, int, int, int]:
    """A run: the chunks from this one on, before ``end`` and at most RUN, that have equal widths and distances.

    Returns the offset of the first, the number of values of each, their distance, and their number.
    """
    start, width = chunk_of(plan, group, chunk)
    if plan.joined > 1:
        alike, distance = plan.n // plan.joined - chunk, plan.row
    elif plan.pieces == 1:
        alike, distance = end - chunk, plan.row
    else:
        alike, distance = plan.s // plan.width - chunk % plan.pieces, plan.width
    return start, width, distance, max(1, min(alike, end - chunk, RUN))


@inner
def tasks(plan: Plan, stage: int, first: int, last: int, i: int) -> tuple[int, int, int, int]:
    """Task range and channel range of round i of a stage: stage 0 has one round per group, the other stages have a single
    round.
    """
    if stage == 0:
        begin, end = channels_of(plan, first + i)
        return (first + i) * plan.blocks, (first + i + 1) * plan.blocks, begin, end
    return first, last, first, last
