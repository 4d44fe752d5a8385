"""The page's pictures: SVG drawn by Matplotlib, in the page's colours and font."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from .plan import Plan
from .verdicts import Results, accuracies, interval

COLOURS: Final = {
    "#010101": "var(--quiet)",
    "#020202": "var(--edge)",
    "#0a0a01": "var(--c0)",
    "#0a0a02": "var(--c1)",
    "#0a0a03": "var(--c2)",
}
"""Matplotlib's colour -> the page's CSS variable, which is light or dark."""
_TEXT, _GRID, WITH, WITHOUT, THIRD = COLOURS
_STYLE: Final = {WITH: ("-", "o"), WITHOUT: ("--", "s"), THIRD: (":", "^")}


class Picture:
    """One pair of axes, about as wide as a phone."""

    def __init__(self, x: str, y: str, *, log: str = "", size: tuple[float, float] = (4.2, 2.9)) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=size, layout="constrained")
        self.axes = self.figure.add_subplot()
        self.axes.set_xlabel(x, color=_TEXT)
        self.axes.set_ylabel(y, color=_TEXT)
        if "x" in log:
            self.axes.set_xscale("log")
        if "y" in log:
            self.axes.set_yscale("log")
        self.axes.tick_params(colors=_TEXT, which="both", length=0)
        self.axes.grid(color=_GRID, linewidth=0.8)
        self.axes.set_axisbelow(True)
        self.axes.spines[:].set_visible(False)

    def line(
        self, xs: Sequence[float], ys: Sequence[float], colour: str, label: str, band: Any = None, marks: bool = True
    ) -> None:
        """A line, with the band of its intervals."""
        style, mark = _STYLE[colour]
        self.axes.plot(xs, ys, style, color=colour, label=label, linewidth=2, marker=mark if marks else None, markersize=5)
        if band is not None:
            self.axes.fill_between(xs, *band, color=colour, alpha=0.18, linewidth=0)

    def svg(self, name: str, about: str) -> str:
        """Return the SVG element; ``name`` makes its ids unique, ``about`` is its description."""
        import matplotlib

        labels = self.axes.get_legend_handles_labels()[1]
        if labels:
            columns = 2 if len(labels) == 2 else 1
            self.figure.legend(frameon=False, labelcolor=_TEXT, loc="outside upper left", ncols=columns)
        file = io.StringIO()
        fixed = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}
        with matplotlib.rc_context(fixed):
            self.figure.savefig(
                file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
            )
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
        text = re.sub(r'\bid="', f'id="{name}-', text)
        text = re.sub(r"url\(#", f"url(#{name}-", text)
        text = re.sub(r'href="#', f'href="#{name}-', text)
        text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
        for drawn, ours in COLOURS.items():
            text = text.replace(drawn, ours)
        title = f'<title id="{name}-about">{about}</title>'
        head, rest = text.split(">", 1)
        head = re.sub(r' (width|height)="[^"]*"', "", head)
        return f'{head} class="drawn" role="img" aria-labelledby="{name}-about">{title}{rest}'


def study(
    results: Results, plan: Plan, what: Any, values: Sequence[float], x: str, name: str, about: str, close: bool = False
) -> str:
    """Test accuracy against the varied parameter, with and without BatchNorm; ``close`` scales to the differences."""
    picture = Picture(x, "test digits known, %", log="x")
    for norm, colour, label in ((True, WITH, "with BatchNorm"), (False, WITHOUT, "without")):
        found = [interval(column) for column in accuracies(results, plan, what, values, norm).T]
        means, lows, highs = (100 * np.array([getattr(i, part) for i in found]) for part in ("mean", "low", "high"))
        picture.line(values, list(means), colour, label, (np.clip(lows, 0, 100), np.clip(highs, 0, 100)))
    if not close:
        picture.axes.set_ylim(-3, 103)
    picture.axes.set_xticks(values, [f"{value:g}" for value in values])
    picture.axes.minorticks_off()
    return picture.svg(name, about)


def losses(results: Results, plan: Plan, activation: tuple[str, float], name: str, about: str) -> str:
    """Training loss over the steps, each seed a thin line, the median a broad one."""
    picture = Picture("step", "training loss", log="y")
    for norm, colour, label in ((True, WITH, "with BatchNorm"), (False, WITHOUT, "without")):
        run = plan.saturating(norm, 0, activation)
        curves = [results[plan.saturating(norm, seed, activation)]["losses"] for seed in range(plan.seeds)]
        found = np.array(curves, dtype=float)
        steps = np.arange(found.shape[1]) * (run.steps / found.shape[1])
        for curve in found:
            picture.axes.plot(steps, curve, color=colour, alpha=0.35, linewidth=0.7)
        picture.line(list(steps), list(np.median(found, axis=0)), colour, label, marks=False)
    return picture.svg(name, about)


def shift(results: Results, plan: Plan, norm: bool, name: str, about: str) -> str:
    """The 15th, 50th and 85th percentile of a typical unit's input over the steps."""
    picture = Picture("step", "input of the activation")
    run = plan.saturating(norm, 0, plan.activations[1])
    found = np.array(results[run]["percentiles"])
    steps = np.arange(len(found)) * (run.steps / len(found))
    colour = WITH if norm else WITHOUT
    picture.axes.fill_between(
        steps, found[:, 0], found[:, 2], color=colour, alpha=0.18, linewidth=0, label="15th to 85th percentile"
    )
    picture.line(list(steps), list(found[:, 1]), colour, "median", marks=False)
    return picture.svg(name, about)


def scatter(points: Any, name: str, about: str) -> str:
    """Two features against each other."""
    picture = Picture("first", "second", size=(3.4, 3.4))
    picture.axes.scatter(points[::3, 0], points[::3, 1], s=5, color=WITH, alpha=0.5, linewidths=0, rasterized=False)
    picture.axes.set_xlim(-4, 4)
    picture.axes.set_ylim(-4, 4)
    return picture.svg(name, about)


def costs(rows: Sequence[Mapping[str, float]], name: str, about: str) -> str:
    """Milliseconds over channels."""
    picture = Picture("channels", "ms, forward and backward", log="xy")
    channels = [row["channels"] for row in rows]
    picture.line(channels, [row["whitening"] for row in rows], WITHOUT, "whitening")
    picture.line(channels, [row["batchnorm"] for row in rows], WITH, "BatchNorm")
    picture.axes.set_xticks(channels, [f"{value:g}" for value in channels])
    picture.axes.minorticks_off()
    return picture.svg(name, about)


def biases(found: Mapping[str, Mapping[str, Sequence[float]]], which: str, y: str, name: str, about: str) -> str:
    """The bias, or the loss, over the steps."""
    picture = Picture("step", y)
    for (label, its), colour in zip(found.items(), (WITHOUT, THIRD, WITH), strict=True):
        picture.line(range(len(its[which])), its[which], colour, label, marks=False)
    return picture.svg(name, about)


def averages(found: Mapping[str, Sequence[float]], name: str, about: str) -> str:
    """Distance from the statistics of all the data over the batches."""
    picture = Picture("batches seen", "off by, part of the true", log="y")
    for (label, its), colour in zip(found.items(), (WITHOUT, WITH), strict=True):
        picture.line(range(1, len(its) + 1), its, colour, label, marks=False)
    return picture.svg(name, about)
