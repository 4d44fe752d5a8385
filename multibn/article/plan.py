"""What is trained: the studies of the four claims, on scikit-learn's handwritten digits. No framework is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

import numpy as np

from multibn.layer.types import Array

TEST: Final = 360
"""Test digits, of 1797."""
RECORDS: Final = 40
"""Number of times that a recorded run looks at its distributions."""


@dataclass(frozen=True)
class Run:
    """One training of a multilayer perceptron by plain gradient descent.

    Args:
        norm: whether BatchNorm stands between each hidden layer and its activation.
        seed: of the initial weights and the order of the digits; the same in all frameworks, with and without BatchNorm.
        rate: the learning rate.
        scale: what the usual initial weights (variance 2/n for ReLU, 1/n else) are multiplied by.
        activation: "relu", "sigmoid" or "tanh".
        depth: hidden layers, of 64 units each.
        batch, steps: digits in a step, and steps.
        digits: number of training digits.
    """

    norm: bool
    seed: int
    rate: float = 0.1
    scale: float = 1.0
    activation: str = "relu"
    depth: int = 3
    batch: int = 60
    steps: int = 240
    digits: int = 1437


@dataclass(frozen=True)
class Plan:
    """Which trainings are run."""

    seeds: int
    rates: tuple[float, ...]
    scales: tuple[float, ...]
    activations: tuple[tuple[str, float], ...]
    batches: tuple[int, ...]
    steps: int

    def rate(self, norm: bool, seed: int, rate: float) -> Run:
        """Claim 1: larger learning rates."""
        return Run(norm, seed, rate=rate, steps=self.steps)

    def start(self, norm: bool, seed: int, scale: float) -> Run:
        """Claim 2: other initial weights."""
        return Run(norm, seed, scale=scale, steps=self.steps)

    def saturating(self, norm: bool, seed: int, activation: tuple[str, float]) -> Run:
        """Claim 3: activations that saturate, five layers deep; the second number is the scale of the weights."""
        return Run(norm, seed, rate=0.3, activation=activation[0], scale=activation[1], depth=5, steps=3 * self.steps // 2)

    def few(self, norm: bool, seed: int, batch: int) -> Run:
        """Claim 4: a hundred digits, so that all nets fit them and differ in how they generalise."""
        return Run(norm, seed, batch=batch, digits=100, steps=self.steps)

    def runs(self) -> list[Run]:
        """Return all runs, each once."""
        found: list[Run] = []
        for seed in range(self.seeds):
            for norm in (False, True):
                found += [self.rate(norm, seed, rate) for rate in self.rates]
                found += [self.start(norm, seed, scale) for scale in self.scales]
                found += [self.saturating(norm, seed, activation) for activation in self.activations]
                found += [self.few(norm, seed, batch) for batch in self.batches]
        return list(dict.fromkeys(found))


_ACTIVATIONS: Final = (("sigmoid", 1.0), ("sigmoid", 4.0), ("tanh", 1.0))
FULL: Final = Plan(5, (0.01, 0.1, 0.3, 1, 3, 10), (0.1, 0.3, 1, 3, 10), _ACTIVATIONS, (10, 25, 100), 240)
QUICK: Final = Plan(2, (0.1, 1, 3), (0.1, 1), _ACTIVATIONS, (10, 100), 120)


@lru_cache(maxsize=1)
def digits() -> tuple[Array, Array]:
    """1797 images of 8x8 pixels in a fixed order, (1797, 64) float32 from 0 to 1, and what they show."""
    from sklearn.datasets import load_digits

    its = load_digits()
    order = np.random.default_rng(1502).permutation(len(its.target))
    return (its.data[order] / 16).astype(np.float32), its.target[order]


def weights(run: Run) -> list[Array]:
    """The initial weights, (out, in) each; biases are 0."""
    draw = np.random.default_rng(run.seed)
    sizes = [64, *[64] * run.depth, 10]
    gain = 2 if run.activation == "relu" else 1
    return [
        (run.scale * draw.normal(0, np.sqrt(gain / before), (after, before))).astype(np.float32)
        for before, after in pairwise(sizes)
    ]


def batches(run: Run) -> Iterator[tuple[Array, Array]]:
    """The training batches, one a step."""
    draw = np.random.default_rng((run.seed, 1))
    images, labels = (a[TEST : TEST + run.digits] for a in digits())
    order = np.concatenate([draw.permutation(run.digits) for _ in range(run.steps * run.batch // run.digits + 1)])
    for step in range(run.steps):
        chosen = order[step * run.batch : (step + 1) * run.batch]
        yield images[chosen], labels[chosen]
