"""Train a framework's nets in a process of its own: a framework's ``article`` module calls ``serve``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from multibn.layer.types import Array

from .plan import RECORDS, TEST, Run, batches, digits, weights

PERCENTILES = (15, 50, 85)


class Net(Protocol):
    """A framework's perceptron."""

    def step(self, x: Array, labels: Array) -> Any:
        """One step of gradient descent; the loss before it, to be converted by float."""

    def predict(self, x: Array) -> Array:
        """The most likely digits, in inference."""

    def layers(self) -> list[dict[str, Array]]:
        """weight, and bias or gamma and beta, of each hidden layer."""


def train(run: Run, make: Callable[[Run, Sequence[Array]], Net]) -> dict[str, Any]:
    """Accuracies, the losses on the way, and the percentiles of what reaches the last hidden layer's activations."""
    net = make(run, weights(run))
    images, labels = digits()
    losses, percentiles = [], []
    every = max(1, run.steps // RECORDS)
    recorded = run.activation == "sigmoid"
    for step, (x, y) in enumerate(batches(run)):
        if recorded and step % every == 0:
            percentiles.append(np.percentile(reaching(net.layers(), run.activation, images[:TEST]), PERCENTILES, axis=0))
        loss = net.step(x, y)
        if step % every == 0:
            losses.append(float(loss))
    own = slice(TEST, TEST + run.digits)
    result: dict[str, Any] = {
        "test": float(np.mean(net.predict(images[:TEST]) == labels[:TEST])),
        "train": float(np.mean(net.predict(images[own]) == labels[own])),
        "losses": [loss if np.isfinite(loss) else None for loss in losses],
    }
    if recorded:
        path, typical = shift(np.array(percentiles))
        result |= {"shift": path, "percentiles": np.array(percentiles)[:, :, typical].round(4).tolist()}
    return result


def reaching(layers: Sequence[dict[str, Array]], activation: str, x: Array) -> Array:
    """What reaches the activations of the last hidden layer, (N, units), normalised with the statistics of x itself."""
    acts: dict[str, Callable[[Array], Array]] = {"sigmoid": lambda a: 1 / (1 + np.exp(-a)), "tanh": np.tanh}
    act = acts[activation]
    for number, layer in enumerate(layers):
        x = (act(x) if number else x) @ layer["weight"].T
        if "gamma" in layer:
            x = layer["gamma"] * (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-12) + layer["beta"]
        else:
            x = x + layer["bias"]
    return x


def shift(percentiles: Array) -> tuple[float, int]:
    """Return how far the median of a unit's input moves during training, in spreads (mean of 85th minus 15th percentile): the
    mean over units, and the unit with the median distance.

    Args:
        percentiles: (records, 3, units).
    """
    low, median, high = np.moveaxis(percentiles, 1, 0)
    way = np.abs(np.diff(median, axis=0)).sum(axis=0) / (high - low).mean(axis=0)
    return float(way.mean()), int(np.argsort(way)[len(way) // 2])


def serve(facts: Callable[[], dict[str, Any]], make: Callable[[Run, Sequence[Array]], Net]) -> None:
    """Runs come on stdin, as JSON; on stdout goes a line of JSON for the facts, and one for each run."""
    runs = [Run(**each) for each in json.load(sys.stdin)]
    print(json.dumps(facts()), flush=True)
    for run in runs:
        with np.errstate(all="ignore"):
            print(json.dumps(train(run, make)), flush=True)
