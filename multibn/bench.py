"""``multibn bench``: how fast the layers are, beside the framework's own and beside copying the same bytes.

Each framework is measured in a process of its own, because the one that is imported first would set the threads of the other.
In it ours, the framework's own and the copy take turns, so that a busy moment of the machine meets all of them. Reported are
medians: of the times, and of the ratios within a turn. ``--model`` measures training steps of whole networks in the same way:
after ``swap``, as they are, and without any BatchNorm.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console

from .bench_result import Input, Result, Row, caption, draw, table

MODULES: Final = {"torch": "multibn_torch.bench", "mxnet": "multibn_mxnet.bench"}
"""Framework -> the module that is run to measure it."""

ROUNDS, MODEL_ROUNDS, QUICK_ROUNDS = 25, 11, 3
"""Turns that each contestant gets."""

SAMPLE_MS = 5.0
"""A sample lasts about so long at least, small inputs being repeated: the clock then counts for nothing."""

STAGES: Final = tuple((32, *stage) for stage in ((64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)))
"""What the BatchNorm layers of a ResNet-50 see at batch 32."""
_SMALL: Final = ((8, 16, 4, 4), (32, 64))
_COMMON: Final = (
    *(Input("stages", shape) for shape in STAGES),
    *(Input("inference", shape, training=False) for shape in STAGES[:3]),
    Input("fully connected", (8192, 1024)),
    *(Input("small", shape) for shape in _SMALL),
)
INPUTS: Final = {
    "torch": (*_COMMON, *(Input("channels last", shape, channels_last=True) for shape in STAGES)),
    "mxnet": (*_COMMON, *(Input("small", shape, hybridized=True) for shape in _SMALL)),
}
"""Framework -> what its layers are measured on."""

MODELS: Final = {
    "densenet121": Input("models", (16, 3, 112, 112), model="densenet121"),
    "resnet18": Input("models", (32, 3, 64, 64), model="resnet18"),
}
"""Network -> what it is trained on. The ``contest`` of a framework's module makes the network that ``Input.model`` names."""


class Contest(NamedTuple):
    """Who takes turns on an input.

    Args:
        own: name of the framework's own layer, or of its network.
        runs: who -> one run; it returns what has to live until the clock stops. "ours" and "own"; "copy", where it says
            something about a layer; of a network "none", the same without BatchNorm layers.
        clear: lets go of the gradients of the run before.
    """

    own: str
    runs: Mapping[str, Callable[[], object]]
    clear: Callable[[], None]


def check(
    frameworks: Sequence[str], threads: int | None, json_file: Path | None, picture: Path | None, models: Sequence[str] = ()
) -> tuple[list[str], dict[str, str], int]:
    """The frameworks to measure, those that are absent with the reason, and the threads.

    Args:
        frameworks: as asked for; empty for all that are installed.
        threads: as asked for; None for 2, or 1 where there is one processor.
        json_file, picture: what will be written.
        models: networks to train, in place of measuring the layers.

    Raises:
        ValueError: an unknown framework or network, a framework asked for that is not installed, none installed at all, an
            impossible number of threads, a file that cannot be written, or a picture of networks.
    """
    for option, known, asked in (("--framework", MODULES, frameworks), ("--model", MODELS, models)):
        for name in asked:
            if name not in known:
                raise ValueError(f"{option} must be {' or '.join(known)}, got {name}.")
    if models and picture is not None:
        raise ValueError("--picture draws the stages of ResNet-50, which --model does not measure: leave one of them out.")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= processors:
        raise ValueError(f"--threads must be from 1 to {processors}, the processors that this process may use, got {threads}.")
    if picture is not None and picture.suffix not in (".svg", ".png"):
        raise ValueError(f"--picture must end in .svg or .png, got {picture}.")
    for file in (json_file, picture):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{file} cannot be written, there is no folder {file.absolute().parent}: make it first.")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib, which is not installed: pip install 'multibn[conformance]'.")
    absent = {name: f"not installed: pip install 'multibn[{name}]'" for name in MODULES if not _installed(name)}
    for name in frameworks:
        if name in absent:
            raise ValueError(f"{name} is {absent[name]}.")
    present = [name for name in dict.fromkeys(frameworks or MODULES) if name not in absent]
    if not present:
        raise ValueError(f"nothing to measure: {'; '.join(f'{name} is {why}' for name, why in absent.items())}.")
    return present, {} if frameworks else absent, threads or min(2, processors)


def run(
    frameworks: Sequence[str],
    absent: Mapping[str, str],
    threads: int,
    quick: bool,
    json_file: Path | None,
    picture: Path | None,
    command: str,
    models: Sequence[str] = (),
    inputs: Mapping[str, Sequence[Input]] = INPUTS,
) -> bool:
    """Measure, print the tables, write the files; False if a framework could not be measured.

    Args:
        frameworks, absent, threads: as ``check`` returned them.
        quick: few turns, to see that it works; no numbers to quote.
        json_file, picture: where to write ``Result.to_dict()`` and ``draw``.
        command: the line that asked for this, for the record.
        models: networks to train, in place of the layers' inputs.
        inputs: framework -> what its layers are measured on.
    """
    if models:
        inputs = {name: [replace(MODELS[model], hybridized=name == "mxnet") for model in models] for name in frameworks}
    result = Result(command, threads, QUICK_ROUNDS if quick else MODEL_ROUNDS if models else ROUNDS, absent=dict(absent))
    console = Console()
    for framework in frameworks:
        rows = []
        try:
            with console.status(f"{framework} begins") as status:
                for row in measure(framework, inputs[framework], threads, result.rounds):
                    rows.append(row)
                    status.update(f"{framework}: {len(rows)} of {len(inputs[framework])} done, last {row.input}")
        except ChildProcessError as error:
            result.absent[framework] = str(error)
        else:
            result.rows[framework] = rows
            console.print(table(result, framework))
    for framework, reason in result.absent.items():
        console.print(f"{framework} was not measured: {reason}", markup=False, soft_wrap=True)
    console.print(caption(result), markup=False, highlight=False, soft_wrap=True)
    if json_file:
        json_file.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    if picture and result.rows:
        draw(result, picture)
    return list(frameworks) == list(result.rows)


def measure(framework: str, inputs: Sequence[Input], threads: int, rounds: int) -> Iterator[Row]:
    """Measure a framework's layers in a process of its own, one row after the other.

    Raises:
        ChildProcessError: the process failed; what it said went to stderr.
    """
    settings = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    order = json.dumps({"inputs": [asdict(each) for each in inputs], "threads": threads, "rounds": rounds})
    command = [sys.executable, "-m", MODULES[framework], order]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}) as process:
        assert process.stdout is not None
        for each, line in zip(inputs, process.stdout, strict=False):
            answer = json.loads(line)
            yield Row(each, answer["own"], answer["samples"])
    if process.returncode:
        raise ChildProcessError(f"its process ended with code {process.returncode}; what it said stands above.")


def serve(prepare: Callable[[int], None], contest: Callable[[Input], Contest]) -> None:
    """The process that ``measure`` started: its order is the argument, on stdout goes a line of JSON for each input."""
    order = json.loads(sys.argv[1])
    prepare(order["threads"])
    for fields in order["inputs"]:
        own, runs, clear = contest(Input(**{**fields, "shape": tuple(fields["shape"])}))
        print(json.dumps({"own": own, "samples": take_turns(runs, clear, order["rounds"])}), flush=True)


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


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
