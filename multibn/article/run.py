"""Runs the studies, each framework in a process of its own, side by side: importing both in one disturbs their threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from multibn.interpreters import Elsewhere
from multibn.usage import UsageError

from .plan import Plan, Run

GROUP: Final = "multibn.article"
"""Entry points framework -> the module with its nets, run with ``python -m``: see ``train.serve``."""


def modules() -> dict[str, str]:
    """Framework -> the module with its nets, for every backend that registers one."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


class Study(NamedTuple):
    """What a framework's process gave: its facts, and the result of each run."""

    facts: dict[str, Any]
    results: dict[Run, dict[str, Any]]


def frameworks_to_run(frameworks: Sequence[str], out: Path, others: Mapping[str, Elsewhere] = MappingProxyType({})) -> list[str]:
    """The frameworks to run: those asked for, or all that are installed here or, ``others``, in other interpreters.

    Raises:
        UsageError: an unknown framework, one that is not installed, none at all, or a file that cannot be written.
    """
    known = modules()
    for name in frameworks:
        if name not in known:
            raise UsageError(f"--framework must be {' or '.join(known)}, got {name}.")
        if find_spec(name) is None and name not in others:
            raise UsageError(f"{name} is not installed: pip install 'multibn[{name}]'.")
    present = [name for name in known if name in (frameworks or known) and (find_spec(name) or name in others)]
    if not present:
        raise UsageError("no framework is installed to train in: pip install 'multibn[torch]' or 'multibn[mxnet]'.")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"--out must be the name of a file in a folder that exists, got {out}.")
    return present


def run(
    frameworks: Sequence[str], plan: Plan, console: Console, others: Mapping[str, Elsewhere] = MappingProxyType({})
) -> dict[str, Study]:
    """Every framework's study, with a progress bar.

    Raises:
        ChildProcessError: a process failed; what it said went to stderr.
    """
    runs = plan.runs()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar, ThreadPoolExecutor() as pool:
        bars = {name: bar.add_task(f"{name} trains", total=len(runs)) for name in frameworks}
        steps: dict[str, Callable[[], None]] = {name: lambda task=task: bar.advance(task) for name, task in bars.items()}  # type: ignore[misc]
        pythons = {name: others[name].python if name in others else sys.executable for name in frameworks}
        studies = pool.map(lambda name: ask(name, runs, steps[name], pythons[name]), frameworks)
        return dict(zip(frameworks, studies, strict=True))


def ask(framework: str, runs: Sequence[Run], step: Callable[[], None], python: str = sys.executable) -> Study:
    """The study of one framework, on one thread; step is called after each run."""
    settings = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    command = [python, "-m", modules()[framework]]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ, **settings}}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([asdict(each) for each in runs]))
        process.stdin.close()
        lines = []
        for line in process.stdout:
            lines.append(json.loads(line))
            if len(lines) > 1:
                step()
    if process.returncode or len(lines) != len(runs) + 1:
        raise ChildProcessError(f"{framework}: its process ended with code {process.returncode}; what it said stands above.")
    return Study(lines[0], dict(zip(runs, lines[1:], strict=True)))
