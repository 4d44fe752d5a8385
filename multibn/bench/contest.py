"""Measure contestants in turns on one input, in the process of one framework."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

from .inputs import MODELS
from .result import Input

SAMPLE_MS = 5.0
"""Least duration of a sample; small inputs are repeated, so that the overhead of the clock is negligible."""


class Contest(NamedTuple):
    """The contestants for an input.

    Args:
        own: name of the framework's own layer, or of its network.
        runs: contestant -> function for one run, which returns objects to free after the clock stops. "ours" and "own"; "copy"
            for layers with large input; for a network "none", the network without BatchNorm layers.
        clear: frees the gradients of the previous run.
        peak: contestant -> largest growth of the resident memory during a forward, in MiB; None if memory is not measured.
    """

    own: str
    runs: Mapping[str, Callable[[], object]]
    clear: Callable[[], None]
    peak: Callable[[str], float] | None = None


def serve(
    prepare: Callable[[int], None],
    contest: Callable[[Input], Contest],
    inputs: Sequence[Input],
    models: Mapping[str, Input] = MODELS,
) -> None:
    """Measure what the command line's argument names; print a line of JSON per input.

    Args:
        prepare: called with the number of threads first.
        contest: returns the contestants for an input.
        inputs: the layers' inputs, unless the argument names others.
        models: network -> its input.
    """
    order = json.loads(sys.argv[1])
    prepare(order["threads"])
    asked = [models[name] for name in order["models"]] or inputs
    for given in asked if order["inputs"] is None else map(Input.from_dict, order["inputs"]):
        own, runs, clear, peak = contest(given)
        line = {"input": asdict(given), "own": own, "samples": take_turns(runs, clear, order["rounds"])}
        if peak is not None:
            turns = [{who: peak(who) for who in runs} for _ in range(order["rounds"])]
            line["peaks"] = {who: [turn[who] for turn in turns] for who in runs}
        print(json.dumps(line), flush=True)


def take_turns(runs: Mapping[str, Callable[[], object]], clear: Callable[[], None], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each contestant in each round; every other round has the opposite order, so that none always
    follows the same one."""
    for run in runs.values():
        clock(run, clear, 2)  # the first run compiles and allocates
    repeats = math.ceil(SAMPLE_MS / min(clock(run, clear, 1) for run in runs.values() for _ in range(3)))
    samples: dict[str, list[float]] = {who: [] for who in runs}
    for turn in range(rounds):
        for who in list(runs)[:: -1 if turn % 2 else 1]:
            samples[who].append(clock(runs[who], clear, repeats))
    return samples


def clock(run: Callable[[], object], clear: Callable[[], None], repeats: int) -> float:
    """Return the mean milliseconds of several runs in a row; memory is freed outside of the measured time."""
    clear()
    start = time.perf_counter()
    for _ in range(repeats):
        clear()
        _kept = run()
    return (time.perf_counter() - start) * 1e3 / repeats
