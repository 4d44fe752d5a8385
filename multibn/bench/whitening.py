"""``multibn bench --whitening``: compare whitening with BatchNorm, and with the same formulas in PyTorch's operators.

Measured in PyTorch, forward and backward in training, in a process of its own, all contestants taking turns; see ``bench``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from multibn import __version__
from multibn.machine import processor

from .result import TIMES, median_of_ratios

MODULE: Final = "multibn_torch.studies.whitening_bench"
"""The module that is run to measure."""

BATCHNORM: Final = "torch.nn.BatchNorm2d"
"""The contestant with which costs are compared."""

QUICK_ROUNDS = 2

AGAINST: Final = {"zca": "eigh, autograd", "newton": "IterNorm, autograd"}
"""Our contestant -> the same formulas with PyTorch's operators."""


class Input(NamedTuple):
    """An input: float32 of ``shape``, its contestants, and how many turns each gets."""

    shape: tuple[int, ...]
    contestants: tuple[str, ...]
    rounds: int


_BESIDE: Final = (BATCHNORM, "BatchNorm2d", "zca", "zca, groups of 16", "pca", "newton", "eigh, autograd")
INPUTS: Final = (
    Input((32, 64, 28, 28), (*AGAINST, *AGAINST.values()), 15),
    *(Input((32, c, 14, 14), _BESIDE, 5) for c in (16, 32, 64, 128, 256, 512)),
)
"""The first shows the speed, the others the cost as a function of the channels."""


@dataclass(frozen=True)
class Row:
    """The times of one input: ``samples`` has a list of milliseconds per contestant, in the order of the turns."""

    shape: tuple[int, ...]
    samples: Mapping[str, Sequence[float]]

    def ms(self, who: str) -> float:
        """The median time of a contestant."""
        return statistics.median(self.samples[who])

    def times(self, who: str, than: str) -> float:
        """Return time of ``who`` / time of ``than``: the median of the ratios within a turn."""
        return median_of_ratios(self.samples[who], self.samples[than])

    @property
    def speedups(self) -> dict[str, float]:
        """Return our contestant -> speed-up over the same formulas with PyTorch's operators, if both took part."""
        return {ours: self.times(plain, ours) for ours, plain in AGAINST.items() if plain in self.samples}


@dataclass
class Result:
    """A run: where and how it was made, and its rows."""

    command: str
    threads: int
    rows: list[Row] = field(default_factory=list)
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    processor: str = field(default_factory=lambda: processor(count=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the run for JSON: ``{"format": "multibn whitening bench 1", "command", "date", "processor", "threads",
        "versions", "rows": [{"shape", "ms": {contestant: median}, "speedups": {ours: factor}, "to_batchnorm": {contestant:
        factor}, "samples_ms": {contestant: [...]}}]}``; "to_batchnorm" is empty without BatchNorm.
        """
        versions = {
            "multibn": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch")},
        }
        return {
            "format": "multibn whitening bench 1",
            "command": self.command,
            "date": self.date,
            "processor": self.processor,
            "threads": self.threads,
            "versions": versions,
            "rows": [
                {
                    "shape": list(row.shape),
                    "ms": {who: row.ms(who) for who in row.samples},
                    "speedups": row.speedups,
                    "to_batchnorm": {who: row.times(who, BATCHNORM) for who in row.samples if BATCHNORM in row.samples},
                    "samples_ms": {who: list(times) for who, times in row.samples.items()},
                }
                for row in self.rows
            ],
        }


def run(
    threads: int,
    quick: bool,
    json_file: Path | None,
    command: str,
    inputs: Sequence[Input] = INPUTS,
) -> bool:
    """Measure, print the tables and write the file; return whether PyTorch was measured.

    Args:
        threads: for each contestant.
        quick: few turns, as a smoke test; do not quote the times.
        json_file: where to write ``Result.to_dict()``.
        command: the command line, for the record.
        inputs: what is measured.
    """
    result = Result(command, threads)
    inputs = [each._replace(rounds=QUICK_ROUNDS) if quick else each for each in inputs]
    console = Console()
    try:
        with console.status("whitening begins") as status:
            for row in measure(inputs, threads):
                result.rows.append(row)
                status.update(f"whitening: {len(result.rows)} of {len(inputs)} done, last {row.shape}")
    except ChildProcessError as error:
        console.print(f"whitening was not measured: {error}", markup=False, soft_wrap=True)
        return False
    for row in result.rows:
        if BATCHNORM not in row.samples:
            console.print(_speed(row))
    if any(BATCHNORM in row.samples for row in result.rows):
        console.print(_cost([row for row in result.rows if BATCHNORM in row.samples]))
    console.print(
        f"Forward + backward in training, float32, medians in milliseconds; below, how many times as long as "
        f"{BATCHNORM}, the median within a turn. {threads} threads of {result.processor}, torch {version('torch')}.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if json_file:
        json_file.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    return True


def measure(inputs: Sequence[Input], threads: int) -> Iterator[Row]:
    """Measure in a process of its own, one row after the other.

    Raises:
        ChildProcessError: the process failed; its output went to stderr.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    order = json.dumps({"inputs": inputs, "threads": threads})
    settings = {**os.environ, **dict.fromkeys(names, str(threads))}
    with subprocess.Popen([sys.executable, "-m", MODULE, order], stdout=subprocess.PIPE, text=True, env=settings) as process:
        assert process.stdout is not None
        for each, line in zip(inputs, process.stdout, strict=False):
            yield Row(each.shape, json.loads(line))
    if process.returncode:
        raise ChildProcessError(f"its process ended with code {process.returncode}; what it said stands above.")


def _speed(row: Row) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"whitening of {row.shape}", title_justify="left")
    for heading in ("kind", "multibn", "with PyTorch's operators", "faster"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for ours, plain in AGAINST.items():
        table.add_row(ours, f"{row.ms(ours):.1f}", f"{row.ms(plain):.1f} ({plain})", f"{row.speedups[ours]:.2f}{TIMES}")
    return table


def _cost(rows: Sequence[Row]) -> Table:
    n, _, *space = rows[0].shape
    table = Table(box=box.SIMPLE_HEAD, title=f"over the channels C, {(n, 'C', *space)}".replace("'", ""), title_justify="left")
    table.add_column("C", justify="right")
    for who in rows[0].samples:
        table.add_column(who, justify="right")
    for row in rows:
        cells = [f"{row.ms(who):.1f}\n{row.times(who, BATCHNORM):.2g}{TIMES}" for who in row.samples]
        table.add_row(str(row.shape[1]), *cells)
    return table
