"""Results of ``multibn bench``: rows of times, and the run as JSON."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Final

from multibn import __version__
from multibn.interpreters import BESIDE
from multibn.machine import processor

TIMES: Final = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Input:
    """The input of a layer or of the network ``model``: float32 of ``shape``, channel axis 1."""

    group: str
    shape: tuple[int, ...]
    training: bool = True
    channels_last: bool = False
    hybridized: bool = False
    model: str = ""
    compiled: bool = False
    recompute: bool = False

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Input:
        """Make an input from the JSON of ``asdict``."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})

    def __str__(self) -> str:
        return f"{self.model} {self.shape}" if self.model else f"{self.shape}{', hybrid' if self.hybridized else ''}"


@dataclass(frozen=True)
class Row:
    """The times of one input: ``samples`` has a list of milliseconds per contestant, in the order of the turns.

    ``peaks`` has, if memory was measured, the largest growth of the resident memory during a forward, in MiB.
    """

    input: Input
    own: str
    samples: Mapping[str, Sequence[float]]
    peaks: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def ms(self, who: str) -> float | None:
        """The median time of "ours", "own", "copy" or "none"; None where it was not measured."""
        return statistics.median(self.samples[who]) if who in self.samples else None

    @property
    def speedup(self) -> float:
        """Time of the framework's own / time of ours."""
        return median_of_ratios(self.samples["own"], self.samples["ours"])

    @property
    def memory(self) -> float | None:
        """Growth of the resident memory during a forward, ours / own; None where it was not measured."""
        return median_of_ratios(self.peaks["ours"], self.peaks["own"]) if self.peaks else None

    def peak(self, who: str) -> float | None:
        """The median growth of the resident memory in MiB, of "ours" or "own"; None where it was not measured."""
        return statistics.median(self.peaks[who]) if who in self.peaks else None

    @property
    def limit(self) -> float | None:
        """Speed-up of the network without any BatchNorm over the network with the framework's own: the limit for any
        BatchNorm.
        """
        return median_of_ratios(self.samples["own"], self.samples["none"]) if "none" in self.samples else None

    @property
    def to_copy(self) -> float | None:
        """Time of ours / time of copying the same bytes."""
        return median_of_ratios(self.samples["ours"], self.samples["copy"]) if "copy" in self.samples else None


@dataclass
class Result:
    """A run: where and how it was made, and framework -> rows. ``absent``: framework -> why it was not measured.

    ``elsewhere``: framework of another interpreter -> the versions there.
    """

    command: str
    threads: int
    rounds: int
    rows: dict[str, list[Row]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, Mapping[str, str]] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    processor: str = field(default_factory=lambda: processor(count=True))

    @property
    def versions(self) -> dict[str, str]:
        """What took part; ``numpy of jax`` where that of another interpreter is another version."""
        here = {"python": platform.python_version(), **{name: version(name) for name in BESIDE}}
        frameworks = {name: self.elsewhere[name][name] if name in self.elsewhere else version(name) for name in self.rows}
        there = {
            f"{name} of {framework}": number
            for framework in self.rows
            for name, number in self.elsewhere.get(framework, {}).items()
            if here.get(name, number) != number
        }
        return {"multibn": __version__, **here, **frameworks, **there}

    @property
    def of_networks(self) -> bool:
        """Return whether networks, not layers, were measured."""
        return any(row.input.model for rows in self.rows.values() for row in rows)

    @property
    def of_memory(self) -> bool:
        """Return whether networks were measured with and without ``recompute``."""
        return any(row.input.recompute for rows in self.rows.values() for row in rows)

    @property
    def of_compiled(self) -> bool:
        """Return whether compiled networks were measured."""
        return any(row.input.compiled for rows in self.rows.values() for row in rows)

    def geometric_means(self, framework: str) -> dict[str, float]:
        """Return group -> geometric mean of its speedups, for the groups that consist of a network's stages."""
        groups: dict[str, list[float]] = {}
        for row in self.rows[framework]:
            groups.setdefault(row.input.group, []).append(row.speedup)
        return {
            group: geometric_mean(values) for group, values in groups.items() if group in ("stages", "channels last", "inference")
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the run for JSON; names keep their meaning while "format" stays the same.

        ``{"format": "multibn bench 1", "command", "date" (ISO 8601, UTC), "processor", "threads", "rounds", "versions": {name:
        version}, "absent": {framework: reason}, "frameworks": {framework: {"rows": [...], "geometric_means": {group:
        speedup}}}}``

        A row: ``{"group", "shape", "training", "channels_last", "hybridized", "model": name of the network, "" for a layer,
        "compiled", "recompute", "own": name of the framework's layer, "ours_ms", "own_ms", "copy_ms", "none_ms", "speedup":
        own / ours, "to_copy": ours / copy, "limit": own / none, "samples_ms": {"ours": [...], "own": [...], "copy": [...]},
        "memory": ours / own, "peaks_mib": {"ours": [...], "own": [...]}}``. "memory" is null where it was not
        measured. "copy" is missing, and values derived from it are null, for small inputs and for networks; "none", without
        BatchNorm, exists for networks only.
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
                            "memory": row.memory,
                            "peaks_mib": {who: list(peaks) for who, peaks in row.peaks.items()},
                        }
                        for row in rows
                    ],
                    "geometric_means": self.geometric_means(framework),
                }
                for framework, rows in self.rows.items()
            },
        }


def median_of_ratios(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios within a turn: a slowdown of a whole turn cancels."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean: that of the inverse ratios is its inverse."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))
