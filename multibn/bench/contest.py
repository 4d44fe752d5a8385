"""A contest: contestants take turns on an input, inside the process that measures a framework."""

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
"""A sample lasts about so long at least, small inputs being repeated: the clock then counts for nothing."""


class Contest(NamedTuple):
    """Who takes turns on an input.

    Args:
        own: name of the framework's own layer, or of its network.
        runs: who -> one run; it returns what has to live until the clock stops. "ours" and "own"; "copy", where it says
            something about a layer; of a network "none", the same without BatchNorm layers.
        clear: lets go of the gradients of the run before.
        peak: who -> MiB by which the resident memory grows at most during a forward; None where memory is not measured.
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
    """Measure what the command line's argument asks for; a line of JSON on stdout for each input.

    Args:
        prepare: called with the number of threads first.
        contest: who takes turns on an input.
        inputs: what the layers are measured on, where the order names nothing else.
        models: network -> what it is trained on.
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
    """Milliseconds of each contestant in each round; every other round goes in the opposite order, so that none always follows
    the same one."""
    for run in runs.values():
        clock(run, clear, 2)  # the first run compiles and allocates
    repeats = math.ceil(SAMPLE_MS / min(clock(run, clear, 1) for run in runs.values() for _ in range(3)))
    samples: dict[str, list[float]] = {who: [] for who in runs}
    for turn in range(rounds):
        for who in list(runs)[:: -1 if turn % 2 else 1]:
            samples[who].append(clock(runs[who], clear, repeats))
    return samples


def clock(run: Callable[[], object], clear: Callable[[], None], repeats: int) -> float:
    """Milliseconds of one run, of several in a row; memory of the run before the first and after the last is freed outside."""
    clear()
    start = time.perf_counter()
    for _ in range(repeats):
        clear()
        _kept = run()
    return (time.perf_counter() - start) * 1e3 / repeats
