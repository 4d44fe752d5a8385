"""How an (N, C, S) tensor is cut: by BN-15 into chunks and blocks, and for the GPU into tiles. No bit depends on the tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

from multibn.spec.clauses import BLOCK, JOINED, LANES

FEWEST = 64
"""Lanes of BN-15 for each warp. A program that sums takes more channels until it has as many, if there are so many."""

ACROSS = 32
"""Most channels of a program that sums channels-last memory."""

FOLDED = 1024
"""Blocks that are folded in registers."""

ELEMENTS = 512
"""Values of a program that sums nothing, of two warps."""


class Cut(NamedTuple):
    """The cut of BN-15."""

    n: int
    channels: int
    s: int
    joined: int
    """Samples that are taken as one."""
    pieces: int
    """Chunks of a row."""
    width: int
    """Values of a chunk of one channel and sample; the last of a row may have fewer."""
    chunks: int
    blocks: int


class Lanes(NamedTuple):
    """The tile of a program that sums, (p, joined*width, q), all of them powers of two."""

    p: int
    joined: int
    width: int
    q: int
    groups: int
    """Such tiles for all channels."""
    warps: int
    unroll: int
    """Chunks whose loads are issued together."""


class Fold(NamedTuple):
    """The tile of a program that folds blocks."""

    blocks: int
    q: int
    many: bool
    """More blocks than fit into the tile."""
    programs: int


class Rows(NamedTuple):
    """The tiles of a pass that sums nothing."""

    rows: int
    columns: int
    across: int
    r: int
    k: int
    programs: int


class Plan(NamedTuple):
    """All of it."""

    cut: Cut
    lanes: Lanes
    fold: Fold
    rows: Rows


def cut_of(n: int, channels: int, s: int) -> Cut:
    """BN-15's cut; n, channels and s are at least 1."""
    joined = max(1, min(LANES // (channels * s), n // JOINED))
    pieces = math.ceil(s / LANES)
    chunks = math.ceil(n / joined) * pieces
    return Cut(n, channels, s, joined, pieces, math.ceil(s / pieces), chunks, math.ceil(chunks / BLOCK))


def plan_of(n: int, channels: int, s: int) -> Plan:
    """The cut, and tiles for it."""
    cut = cut_of(n, channels, s)
    joined, width = power_of_two(cut.joined), power_of_two(cut.width)
    each, many = joined * width, power_of_two(channels)  # neighbours in memory are the last axis of a tile
    p, q = (1, min(ACROSS, many)) if s == 1 else (min(max(1, FEWEST // each), many), 1)
    size = p * q * each
    lanes = Lanes(p, joined, width, q, math.ceil(channels / (p * q)), max(1, min(16, size // FEWEST)), 2 if size == LANES else 1)

    blocks = min(power_of_two(cut.blocks), FOLDED)
    few = max(1, min(32, 2048 // blocks))
    fold = Fold(blocks, few, cut.blocks > blocks, math.ceil(channels / few))

    height, columns = (n, channels) if s == 1 else (n * channels, s)
    k = min(ELEMENTS, power_of_two(columns))
    r = max(1, min(ELEMENTS // k, power_of_two(height)))
    across = math.ceil(columns / k)
    return Plan(cut, lanes, fold, Rows(height, columns, across, r, k, across * math.ceil(height / r)))


def power_of_two(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()
