"""What ``multibn bench`` measured: rows of times, and the run as JSON, as a table and as a picture."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.table import Table

from . import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIMES: Final = "\N{MULTIPLICATION SIGN}"
_HEADINGS: Final = {
    "stages": "ResNet-50's stages",
    "channels last": "stages, channels last",
    "inference": "inference",
    "fully connected": "fully connected",
    "small": "small",
    "models": "training steps",
}
"""Group -> its heading, in the table's order."""


@dataclass(frozen=True)
class Input:
    """What a layer, or the network ``model``, is given: float32 of ``shape``, channel axis 1."""

    group: str
    shape: tuple[int, ...]
    training: bool = True
    channels_last: bool = False
    hybridized: bool = False
    model: str = ""

    def __str__(self) -> str:
        return f"{self.model} {self.shape}" if self.model else f"{self.shape}{', hybrid' if self.hybridized else ''}"


@dataclass(frozen=True)
class Row:
    """The times of one input: ``samples`` has a list of milliseconds per contestant, in the order of the turns."""

    input: Input
    own: str
    samples: Mapping[str, Sequence[float]]

    def ms(self, who: str) -> float | None:
        """The median time of "ours", "own", "copy" or "none"; None where it was not measured."""
        return statistics.median(self.samples[who]) if who in self.samples else None

    @property
    def speedup(self) -> float:
        """How many times faster than the framework's own."""
        return median_of_ratios(self.samples["own"], self.samples["ours"])

    @property
    def limit(self) -> float | None:
        """How many times faster than its own a network is without any BatchNorm: no BatchNorm can make it faster."""
        return median_of_ratios(self.samples["own"], self.samples["none"]) if "none" in self.samples else None

    @property
    def to_copy(self) -> float | None:
        """How many times slower than copying the same bytes."""
        return median_of_ratios(self.samples["ours"], self.samples["copy"]) if "copy" in self.samples else None


@dataclass
class Result:
    """A run: where and how it was made, and framework -> rows. ``absent``: framework -> why it has none."""

    command: str
    threads: int
    rounds: int
    rows: dict[str, list[Row]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    processor: str = field(default_factory=lambda: processor())

    @property
    def versions(self) -> dict[str, str]:
        """What took part."""
        libraries = {name: version(name) for name in ("numpy", "numba", *self.rows)}
        return {"multibn": __version__, "python": platform.python_version(), **libraries}

    @property
    def of_networks(self) -> bool:
        """Whether it is about networks, and not about layers."""
        return any(row.input.model for rows in self.rows.values() for row in rows)

    def geometric_means(self, framework: str) -> dict[str, float]:
        """Group -> geometric mean of its speedups; for the groups that go through the stages of a network."""
        groups: dict[str, list[float]] = {}
        for row in self.rows[framework]:
            groups.setdefault(row.input.group, []).append(row.speedup)
        return {
            group: geometric_mean(values) for group, values in groups.items() if group in ("stages", "channels last", "inference")
        }

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON takes it; names keep their meaning while "format" stays the same.

        ``{"format": "multibn bench 1", "command", "date" (ISO 8601, UTC), "processor", "threads", "rounds", "versions": {name:
        version}, "absent": {framework: reason}, "frameworks": {framework: {"rows": [...], "geometric_means": {group:
        speedup}}}}``

        A row: ``{"group", "shape", "training", "channels_last", "hybridized", "model": name of the network, "" for a layer,
        "own": name of the framework's layer, "ours_ms", "own_ms", "copy_ms", "none_ms", "speedup": own / ours, "to_copy": ours /
        copy, "limit": own / none, "samples_ms": {"ours": [...], "own": [...], "copy": [...]}}``. "copy" is missing, and what is
        made of it null, where the input is too small for it to matter, and of networks; "none", without BatchNorm, is of networks
        alone.
        """
        return {
            "format": "multibn bench 1",
            "command": self.command,
            "date": self.date,
            "processor": self.processor,
            "threads": self.threads,
            "rounds": self.rounds,
            "versions": self.versions,
            "absent": self.absent,
            "frameworks": {
                framework: {
                    "rows": [
                        {
                            **asdict(row.input),
                            "shape": list(row.input.shape),
                            "own": row.own,
                            **{f"{who}_ms": row.ms(who) for who in ("ours", "own", "copy", "none")},
                            "speedup": row.speedup,
                            "to_copy": row.to_copy,
                            "limit": row.limit,
                            "samples_ms": {who: list(times) for who, times in row.samples.items()},
                        }
                        for row in rows
                    ],
                    "geometric_means": self.geometric_means(framework),
                }
                for framework, rows in self.rows.items()
            },
        }


def median_of_ratios(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within a turn: what slows a turn down as a whole cancels."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def geometric_mean(values: Sequence[float]) -> float:
    """The mean for ratios: that of the inverse ratios is its inverse."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} processors" if names else platform.processor() or platform.machine()


def table(result: Result, framework: str) -> Table:
    """The rows of a framework, group by group, with the geometric mean of a group's speedups at its end.

    Layers stand beside the copy, networks beside themselves without BatchNorm.
    """
    names = " and ".join(dict.fromkeys(row.own for row in result.rows[framework]))
    networks = result.of_networks
    found = Table(box=box.SIMPLE_HEAD, title=f"{framework} {result.versions[framework]}; own: {names}", title_justify="left")
    found.add_column("input", no_wrap=True)
    for heading in ("ours ms", "own ms", *(("own/ours", "limit") if networks else ("copy ms", "own/ours", "ours/copy"))):
        found.add_column(heading, justify="right", no_wrap=True)
    means = result.geometric_means(framework)
    for group, heading in _HEADINGS.items():
        rows = [row for row in result.rows[framework] if row.input.group == group]
        if rows:
            found.add_row(f"[bold]{heading}")
        for row in rows:
            times = (_digits(row.ms(who)) for who in ("ours", "own", *(() if networks else ("copy",))))
            beside = row.limit if networks else row.to_copy
            found.add_row(f" {row.input}", *times, f"[bold]{_digits(row.speedup)}", _digits(beside))
        if group in means:
            found.add_row(" geometric mean", "", "", "", f"[bold]{_digits(means[group])}", "")
        found.add_section()
    return found


def caption(result: Result) -> str:
    """Where and how the run was made."""
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    what = (
        "a training step: forward, loss, backward, SGD.\nown: the network as it is; ours: after swap, in PyTorch with "
        "fuse_relu; limit: how many times faster it is without any BatchNorm."
        if result.of_networks
        else "forward + backward in training, or forward in inference.\ncopy: copying the same bytes, two copies into memory "
        "allocated like y and three into memory allocated like dx; in inference one."
    )
    return (
        f"Medians of {result.rounds} turns; {what}\n"
        f"{versions}\n{result.processor}, {result.threads} threads, {result.date}\n{result.command}"
    )


def _digits(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}" if number < 1 else f"{number:.2f}"


def draw(result: Result, file: Path) -> None:
    """Write the stages as bars, ours and the framework's own, with the time of the copy as a line across.

    Args:
        result: with at least one framework that has a row of the group "stages".
        file: ends in .svg or .png.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = {name: [row for row in rows if row.input.group == "stages"] for name, rows in result.rows.items()}
    with mpl.rc_context({"font.size": 10, "svg.hashsalt": "multibn"}):
        figure = Figure(figsize=(5 * len(rows), 4), layout="constrained", facecolor="white")
        for axes, framework in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
            _bars(axes, rows[framework])
            axes.set_title(f"{framework} {result.versions[framework]}, {result.threads} threads", fontsize=11)
        figure.savefig(file, dpi=160, metadata={"Title": "multibn bench"})


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    for i, row in enumerate(rows):
        ours, own, copy = (row.ms(who) or 0.0 for who in ("ours", "own", "copy"))
        labels = ("multibn", row.own, "copying the same bytes") if i == 0 else ("", "", "")  # matplotlib leaves out ""
        axes.bar(i - 0.2, ours, 0.38, color="#0a6ebd", label=labels[0])
        axes.bar(i + 0.2, own, 0.38, color="#b9bec5", label=labels[1])
        axes.hlines(copy, i - 0.42, i + 0.02, color="#111111", linewidth=2, label=labels[2])
        axes.annotate(
            f"{row.speedup:.1f}{TIMES}", (i, max(ours, own, copy)), (0, 4), textcoords="offset points", ha="center", weight="bold"
        )
    axes.set_xticks(range(len(rows)), ["{1}\n{2}{0}{3}".format(TIMES, *row.input.shape[1:]) for row in rows], fontsize=9)
    axes.set_xlabel(f"channels, height {TIMES} width; batch {rows[0].input.shape[0]}")
    axes.set_ylabel("forward + backward, ms")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
