"""Measure what the gate costs: ``python -m multibn_torch.studies.gate_cost [TURNS]``.

Forward and backward of a small batch, (8, 16, 4, 4) float32 in eager mode on one thread, with the gate and without it, by turns
in one process; without it, the kernel gets the addresses of the same tensors unexamined. Prints medians, one line per layer.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from multibn_torch.forward import eager
from multibn_torch.layers import BatchNorm2d
from multibn_torch.whitening import function, module

SHAPE, STEPS = (8, 16, 4, 4), 20


def _forward_again(gamma: Any, beta: Any, mean: Any, var: Any, batches: Any, update: bool) -> Any:
    if gamma.is_contiguous() and beta.is_contiguous() and mean.is_contiguous() and var.is_contiguous():  # which the kernel needs
        return gamma.data_ptr(), beta.data_ptr(), mean.data_ptr(), var.data_ptr(), batches.data_ptr()
    return None


def _backward_again(x: Any, x_at: int, gamma: Any, gamma_at: int, dtype: Any, nbytes: int) -> bool:
    return bool(x.data_ptr() and gamma.is_contiguous() and gamma.data_ptr())


def _nothing(*_: Any) -> bool:
    return True


UNEXAMINED: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "BatchNorm2d": [
        (eager, "known_address", lambda t, nbytes: t.data_ptr()),
        (eager, "forward_again", _forward_again),
        (eager, "backward_again", _backward_again),
    ],
    "Whitening": [
        (module.Whitening, "_check", _nothing),
        (function, "_check_apart", _nothing),
        (function, "_check_saved", _nothing),
    ],
}
"""Layer -> the parts of the gate that it passes, and what replaces them."""


def measure(name: str, turns: int) -> tuple[float, float, float]:
    """Return the medians of a step with and without the gate, in microseconds, and the median of their ratio."""
    layer = BatchNorm2d(16) if name == "BatchNorm2d" else module.Whitening(16, 4, "zca", groups=4)
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    ways = {
        "with": [(where, part, getattr(where, part)) for where, part, _ in UNEXAMINED[name]],
        "without": UNEXAMINED[name],
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for turn in range(-2, turns):
            for way in random.sample(list(ways), len(ways)):
                for place in ways[way]:
                    setattr(*place)
                began = perf_counter()
                for _ in range(STEPS):
                    layer(x).backward(dy)
                    x.grad = None
                if turn >= 0:
                    times[way].append((perf_counter() - began) / STEPS * 1e6)
    finally:
        for place in ways["with"]:
            setattr(*place)
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    return statistics.median(times["with"]), statistics.median(times["without"]), statistics.median(ratios)


def main(turns: int = 2000) -> None:
    """Print the costs."""
    torch.set_num_threads(1)
    for name in UNEXAMINED:
        examined, unexamined, ratio = measure(name, turns)
        print(f"{name}: {examined:.1f} us with the gate, {unexamined:.1f} us without, {100 * (ratio - 1):.1f} % more")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
