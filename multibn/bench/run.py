"""``multibn bench``: compare the layers' speed with the framework's own and with copying the same bytes.

Each framework is measured in a process of its own, because the one that is imported first would set the threads of the other.
There our layer, the framework's own and the copy take turns, so that other load on the machine affects all of them. Reported are
the medians of the times and of the ratios within a turn. ``--model`` measures training steps of whole networks in the same way:
after ``swap``, as they are, and without any BatchNorm.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Final

from rich.console import Console

from multibn.interpreters import Elsewhere, installed
from multibn.usage import UsageError

from .inputs import MALLOC, MALLOC_KEEPS, MODELS
from .result import Input, Result, Row
from .show import caption, draw, table

GROUP: Final = "multibn.bench"
"""Entry points framework -> the module that measures it, run with ``python -m``: see ``contest.serve``."""

ROUNDS, QUICK_ROUNDS = 25, 3
"""Turns that each contestant gets."""


def modules() -> dict[str, str]:
    """Framework -> the module that measures it, for every backend that registers one."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


def what_to_measure(
    frameworks: Sequence[str],
    threads: int | None,
    json_file: Path | None,
    picture: Path | None,
    models: Sequence[str] = (),
    others: Mapping[str, Elsewhere] = MappingProxyType({}),
    known_models: Collection[str] = MODELS,
) -> tuple[list[str], dict[str, str], int]:
    """Return the frameworks to measure, the absent ones with the reason, and the number of threads.

    Args:
        frameworks: requested; empty for all that are installed.
        threads: requested; None for 2, or 1 on a single processor.
        json_file, picture: what will be written.
        models: networks to train, instead of measuring layers.
        others: frameworks of other interpreters.
        known_models: names of the networks that can be measured.

    Raises:
        UsageError: an unknown framework or network, a framework asked for that is not installed, none installed at all, an
            impossible number of threads, a file that cannot be written, or a picture of networks.
    """
    known_frameworks = modules()
    for option, known, asked in (("--framework", known_frameworks, frameworks), ("--model", known_models, models)):
        for name in asked:
            if name not in known:
                raise UsageError(f"{option} must be {' or '.join(known)}, got {name}.")
    if models and picture is not None:
        raise UsageError("--picture draws the stages of ResNet-50, which --model does not measure: leave one of them out.")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= processors:
        raise UsageError(f"--threads must be from 1 to {processors}, the processors that this process may use, got {threads}.")
    if picture is not None and picture.suffix not in (".svg", ".png"):
        raise UsageError(f"--picture must end in .svg or .png, got {picture}.")
    for file in (json_file, picture):
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"{file} cannot be written, there is no folder {file.absolute().parent}: make it first.")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--picture needs matplotlib, which is not installed: pip install 'multibn[conformance]'.")
    absent = {
        name: f"not installed: pip install 'multibn[{name}]'"
        for name in known_frameworks
        if not installed(name) and name not in others
    }
    for name in frameworks:
        if name in absent:
            raise UsageError(f"{name} is {absent[name]}.")
    present = [name for name in dict.fromkeys(frameworks or known_frameworks) if name not in absent]
    if not present:
        raise UsageError(f"nothing to measure: {'; '.join(f'{name} is {why}' for name, why in absent.items())}.")
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
    inputs: Mapping[str, Sequence[Input]] | None = None,
    others: Mapping[str, Elsewhere] = MappingProxyType({}),
) -> bool:
    """Measure, print the tables and write the files; return whether all frameworks were measured.

    Args:
        frameworks, absent, threads: as ``what_to_measure`` returned them.
        quick: few turns, as a smoke test; do not quote the times.
        json_file, picture: where to write ``Result.to_dict()`` and ``draw``.
        command: the command line, for the record.
        models: networks to train, in place of the layers' inputs.
        inputs: framework -> what is measured; None for what its studies say.
        others: frameworks of other interpreters.
    """
    rounds = QUICK_ROUNDS if quick else ROUNDS
    result = Result(command, threads, rounds, absent=dict(absent))
    result.elsewhere = {name: its.versions for name, its in others.items() if name in frameworks}
    console = Console()
    for framework in frameworks:
        rows = []
        try:
            with console.status(f"{framework} begins") as status:
                asked = None if inputs is None else inputs[framework]
                python = others[framework].python if framework in others else sys.executable
                for row in measure(framework, threads, result.rounds, models, asked, python):
                    rows.append(row)
                    status.update(f"{framework}: {len(rows)} done, last {row.input}")
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


def measure(
    framework: str,
    threads: int,
    rounds: int,
    models: Sequence[str] = (),
    inputs: Sequence[Input] | None = None,
    python: str = sys.executable,
) -> Iterator[Row]:
    """Measure a framework's layers in a process of its own, one row after the other.

    Args:
        models: networks to train, in place of the layers.
        inputs: what is measured; None for what the framework's studies say.
        python: the interpreter that has the framework.

    Raises:
        ChildProcessError: the process failed; its output went to stderr.
    """
    settings = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    if inputs is not None and any(each.recompute for each in inputs):
        settings |= MALLOC
    if inputs is not None and any(each.compiled for each in inputs):
        settings |= MALLOC_KEEPS
    given = None if inputs is None else [asdict(each) for each in inputs]
    order = json.dumps({"inputs": given, "models": list(models), "threads": threads, "rounds": rounds})
    command = [python, "-m", modules()[framework], order]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            yield Row(Input.from_dict(answer["input"]), answer["own"], answer["samples"], answer.get("peaks", {}))
    if process.returncode:
        raise ChildProcessError(f"its process ended with code {process.returncode}; what it said stands above.")
