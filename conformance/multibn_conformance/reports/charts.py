"""The geometry of the page's charts: numbers to places in an SVG. The template draws them; its CSS has the colours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 420, 280
WORDS = {"moving_mean": "moving mean", "moving_var": "moving variance"}
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 40


@dataclass(frozen=True)
class Scale:
    """An axis: where a number lies between two ends, and the numbers that are written at it."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """The place of a value; what lies beyond an end is put there."""
        low, high = (math.log10(each) if self.log else each for each in (self.low, self.high))
        value = (math.log10(value) if value > 0 else low) if self.log else value
        part = (min(max(value, low), high) - low) / (high - low)
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Place and text: every power of ten that fits, or about five round numbers."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            step = 1 if last - first <= 7 else 2
            return [(self.at(10.0**power), _power(power)) for power in range(first, last + 1) if power % step == 0]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(each for each in (1, 2, 5, 10) if (self.high - self.low) / (each * step) <= 6)
        first = math.ceil(self.low / step)
        count = math.floor(self.high / step) - first + 1
        return [(self.at((first + i) * step), f"{(first + i) * step:g}") for i in range(count)]


def _power(power: int) -> str:
    if power in (-1, 0, 1):
        return f"{10.0**power:g}"
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@dataclass(frozen=True)
class Line:
    """One line: the number of its colour and mark, its paths between its gaps, and its marks with their texts."""

    style: int
    width: float
    paths: tuple[str, ...]
    points: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Chart:
    """What the template draws."""

    id: str
    title: str
    description: str
    x_label: str
    y_label: str
    x: Scale
    y: Scale
    lines: tuple[Line, ...]
    pale: str
    """The path of what is drawn behind: a bound, or the exact values."""


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x},{y}" for x, y in places)


def _line(
    names: Sequence[str],
    style: int,
    x: Scale,
    y: Scale,
    xs: Sequence[float],
    ys: Sequence[float | None],
    turn: tuple[int, int],
) -> Line:
    """``turn``: of so many lines this is that one.

    Each is thinner than the one before and marks other points, so that lines on top of each other stay visible.
    """
    label = ", ".join(names)
    runs: list[list[tuple[float, float]]] = [[]]
    points = []
    for number, (a, b) in enumerate(zip(xs, ys, strict=False)):
        if b is None:
            runs.append([])
            continue
        runs[-1].append((x.at(a), y.at(b)))
        if number % turn[1] == turn[0]:
            points.append((x.at(a), y.at(b), f"{label}: {b:.3g} at {a:.3g}"))
    return Line(style, max(4 - turn[0], 1.4), tuple(_path(run) for run in runs if run), tuple(points))


def grouped(curves: Mapping[str, Sequence[float | None]]) -> dict[tuple[str, ...], Sequence[float | None]]:
    """Subjects whose numbers are all the same share a line."""
    found: dict[tuple[float | None, ...], list[str]] = {}
    for name, values in curves.items():
        found.setdefault(tuple(values), []).append(name)
    return {tuple(names): values for values, names in found.items()}


def kappa_charts(record: Mapping[str, Any]) -> list[Chart]:
    """Error in ulp against kappa: one chart for each type and result."""
    charts = []
    for allowed in record["pictures"]["allowed"]:
        dtype, result = allowed["dtype"], allowed["result"]
        kappa = record["pictures"]["kappa"][dtype]
        curves = {
            subject["name"]: curve["ulp"]
            for subject in record["subjects"]
            for curve in subject["errors"]
            if (curve["dtype"], curve["result"]) == (dtype, result)
        }
        seen = [value for values in (*curves.values(), allowed["ulp"]) for value in values if value is not None]
        x = Scale(1, 10 ** math.ceil(math.log10(max(kappa) / 2)), LEFT, WIDTH - RIGHT, log=True)
        y = Scale(0.1, 10 ** max(1, math.ceil(math.log10(max(seen)))), HEIGHT - BOTTOM, TOP, log=True)
        groups = list(grouped(curves).items())
        charts.append(
            Chart(
                id=f"kappa-{dtype}-{result}",
                title=f"{result}, {dtype}",
                description=f"The worst error of {result} in ulp of {dtype} against the condition number, on logarithmic axes.",
                x_label="κ, about mean/std of the input",
                y_label="error in ulp",
                x=x,
                y=y,
                lines=tuple(
                    _line(names, _style(record, names[0]), x, y, kappa, values, (turn, len(groups)))
                    for turn, (names, values) in enumerate(groups)
                ),
                pale=_path([(x.at(a), y.at(b)) for a, b in zip(kappa, allowed["ulp"], strict=True) if b is not None]),
            )
        )
    return charts


def moving_charts(record: Mapping[str, Any]) -> list[Chart]:
    """The moving statistics of one channel over training steps, beside the exact ones."""
    charts = []
    for result, exact in record["pictures"]["exact"].items():
        curves = {subject["name"]: subject["moving"][result]["values"] for subject in record["subjects"]}
        steps = list(range(1, len(exact) + 1))
        top = 1.3 * max(exact)
        x = Scale(0, len(exact), LEFT, WIDTH - RIGHT, log=False)
        y = Scale(0, top, HEIGHT - BOTTOM, TOP, log=False)
        groups = list(grouped(curves).items())
        charts.append(
            Chart(
                id=f"walk-{result}",
                title=WORDS[result],
                description=f"The {WORDS[result]} of one channel over {len(exact)} training steps, and the exact one.",
                x_label="training step",
                y_label=WORDS[result],
                x=x,
                y=y,
                lines=tuple(
                    _line(names, _style(record, names[0]), x, y, steps, values, (turn, len(groups)))
                    for turn, (names, values) in enumerate(groups)
                ),
                pale=_path([(x.at(a), y.at(b)) for a, b in zip(steps, exact, strict=True)]),
            )
        )
    return charts


def legend(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The subjects, those together whose every number in the pictures is the same: each group has one colour and mark."""
    found: dict[str, list[str]] = {}
    for subject in record["subjects"]:
        found.setdefault(json.dumps([subject["errors"], subject["moving"]]), []).append(subject["name"])
    return [tuple(names) for names in found.values()]


def _style(record: Mapping[str, Any], name: str) -> int:
    return next(style for style, names in enumerate(legend(record)) if name in names)
