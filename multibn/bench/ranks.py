"""``multibn bench --ranks N``: synchronised statistics over processes of one thread each, all in one run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from multibn.usage import UsageError

from . import scaling

GROUP: Final = "multibn.bench.ranks"
"""Entry points framework -> the module that a process runs: ``python -m MODULE FOLDER ROUNDS SHAPES [RANK SIZE]``."""

SHAPES: Final = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
"""ResNet-50's stages, on each rank."""

ROUNDS, QUICK_ROUNDS, LIMIT = 15, 2, 900.0
"""Turns of each contestant, and a time limit in seconds."""

_MPI: Final = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_btl": "self,sm",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
"""Settings for Open MPI on one machine, as root and with more ranks than processors."""


def run(size: int, quick: bool, json_file: Path | None, command: str) -> bool:
    """Measure, print and write; return whether everything was measured.

    Raises:
        UsageError: no installed framework can measure it.
    """
    points = {point.name: point.value for point in entry_points(group=GROUP)}
    if "torch" not in points or importlib.util.find_spec("torch") is None:
        raise UsageError("--ranks measures PyTorch, which is not installed. Install the extra torch.")
    console = Console()
    shapes, rounds = (SHAPES[-1:], QUICK_ROUNDS) if quick else (SHAPES, ROUNDS)
    result = _measured(points["torch"], size, shapes, rounds, console)
    if result is None:
        return False
    console.print(_table(result, size))
    console.print(_types(result))
    console.print(_messages(result))
    console.print(scaling.table(result["messages"]))
    console.print(
        f"{size} processes of 1 thread, forward + backward, medians. by hand: PyTorch's operators and all_reduce over gloo. "
        f"ratio: by hand/gloo, within a turn. exact: a group of one, without exchange. alone: BatchNorm2d. bytes: of both "
        f"messages. Passes: at most 5 turns.\n{command}",
        soft_wrap=True,
    )
    if json_file is not None:
        json_file.write_text(json.dumps({"ranks": size, "command": command, **result}, indent=1) + "\n")
    return True


def _measured(module: str, size: int, shapes: Sequence[tuple[int, ...]], rounds: int, console: Console) -> dict[str, Any] | None:
    mpirun = Path(sys.executable).parent / "mpirun"
    mpi = importlib.util.find_spec("mpi4py") is not None and mpirun.exists()
    with tempfile.TemporaryDirectory() as folder:
        here = [sys.executable, "-m", module, folder, str(rounds), json.dumps(shapes)]
        commands = [[str(mpirun), "-n", str(size), *here]] if mpi else [[*here, str(rank), str(size)] for rank in range(size)]
        environment = {**os.environ, **_MPI, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        started = [subprocess.Popen(each, env=environment, start_new_session=True) for each in commands]
        try:
            for process in started:
                process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            console.print(f"[red]the processes did not end within {LIMIT:g} s[/red]")
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        path = Path(folder, "result.json")
        result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return result


def _table(result: dict[str, Any], size: int) -> Table:
    engines = list(result["messages"])
    table = Table(box=box.SIMPLE_HEAD, min_width=70, title=f"synchronised over {size} processes, ms", title_justify="left")
    table.add_column("input of each", no_wrap=True)
    for name in (*engines, "by hand", "ratio", "exact", "alone", "bytes"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        ms = row["ms"]
        times = [f"{ms[name]:.2f}" for name in (*engines, "straightforward")]
        table.add_row(
            str(tuple(row["shape"])), *times, f"{row['ratio']:.2f}", f"{ms['exact']:.2f}", f"{ms['alone']:.2f}", str(row["bytes"])
        )
    return table


def _types(result: dict[str, Any]) -> Table:
    title = "passes with exact sums, without exchange: times as long as BatchNorm2d's, forward and backward"
    table = Table(box=box.SIMPLE_HEAD, min_width=70, title=title, title_justify="left")
    table.add_column("input of each", no_wrap=True)
    found: dict[str, dict[str, str]] = {}
    for row in result["types"]:
        forward, backward = (f"{row[name]['ratio']:.2f}" for name in ("forward", "backward"))
        found.setdefault(str(tuple(row["shape"])), {})[row["dtype"]] = f"{forward} {backward}"
    for dtype in next(iter(found.values())):
        table.add_column(dtype, justify="right", no_wrap=True)
    for shape, cells in found.items():
        table.add_row(shape, *cells.values())
    return table


def _messages(result: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, min_width=40, title="adding a message, microseconds", title_justify="left")
    table.add_column("bytes", justify="right")
    for engine in result["messages"]:
        table.add_column(engine, justify="right")
    for size in next(iter(result["messages"].values())):
        table.add_row(size, *(f"{its[size]:.0f}" for its in result["messages"].values()))
    return table
