"""What ranks send each other: a header, then for each channel ``bad`` and a window of the limbs of its sums (SY-02).

The window holds the limbs that are not 0, known to all ranks from what they added last: about a quarter of all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from multibn.kernel.jit import compiled
from multibn.layer.types import Array

from .limbs import carry
from .sums import Sums


class Window(NamedTuple):
    """The limbs first..last of the sums of values and of products."""

    values_first: int
    values_last: int
    products_first: int
    products_last: int

    @property
    def width(self) -> int:
        """Numbers that a channel takes in a message."""
        return 1 + self.values_last - self.values_first + self.products_last - self.products_first

    def holds(self, other: Window) -> bool:
        """Whether it holds all limbs of another."""
        return (
            self.values_first <= other.values_first
            and self.values_last >= other.values_last
            and self.products_first <= other.products_first
            and self.products_last >= other.products_last
        )


def window_of(sums: Sums) -> Window:
    """The least window that holds the sums; an empty one lies within every other."""
    return Window(*_extent(sums.values), *_extent(sums.products))


def whole_window(sums: Sums) -> Window:
    """All limbs."""
    return Window(0, sums.values.shape[1], 0, sums.products.shape[1])


def window_around(sums: Sums) -> Window:
    """The window for the next sums like these: a limb more on each side."""
    its, whole = window_of(sums), whole_window(sums)
    pairs = []
    for first, last, length in zip(its[::2], its[1::2], whole[1::2], strict=True):
        pairs += [max(first - 1, 0), min(last + 1, length)] if first < last else [0, 0]
    return Window(*pairs)


def pack(sums: Sums, window: Window, out: Array) -> None:
    """Write the sums' limbs within a window to a message, (C * width,) int64."""
    _pack(out, *sums, window)


def unpack(message: Array, window: Window, sums: Sums) -> None:
    """Read the sums of all ranks from what their messages add up to; carried."""
    _unpack(message, *sums, window)
    carry(sums.values)
    carry(sums.products)


@compiled
def _extent(sums: Any) -> tuple[int, int]:
    """From the first to behind the last limb that is not 0 in any channel; for none the length and 0."""
    first, last = sums.shape[1], 0
    for c in range(sums.shape[0]):
        for i in range(sums.shape[1]):
            if sums[c, i] != 0:
                first, last = min(first, i), max(last, i + 1)
    return first, last


@compiled
def _pack(out: Any, values: Any, products: Any, bad: Any, window: Any) -> None:
    place = 0
    for c in range(bad.shape[0]):
        out[place] = bad[c]
        place += 1
        for i in range(window[0], window[1]):
            out[place] = values[c, i]
            place += 1
        for i in range(window[2], window[3]):
            out[place] = products[c, i]
            place += 1


@compiled
def _unpack(message: Any, values: Any, products: Any, bad: Any, window: Any) -> None:
    values[:] = 0
    products[:] = 0
    place = 0
    for c in range(bad.shape[0]):
        bad[c] = message[place]
        place += 1
        for i in range(window[0], window[1]):
            values[c, i] = message[place]
            place += 1
        for i in range(window[2], window[3]):
            products[c, i] = message[place]
            place += 1


SLOT = 64
"""int64 words that a rank has for its words in a round of words."""


def write_words(words: str, rank: int, size: int) -> Array:
    """A message in which a rank's words stand in its own place, cut to SLOT * 8 bytes."""
    message = np.zeros(size * SLOT, np.int64)
    text = words.encode()[: SLOT * 8]
    message[rank * SLOT : (rank + 1) * SLOT] = np.frombuffer(text.ljust(SLOT * 8, b"\0"), np.int64)
    return message


def read_words(message: Array) -> list[str]:
    """The words of each rank."""
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in message.reshape(-1, SLOT)]
