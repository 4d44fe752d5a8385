"""The benchmark's tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
from .inputs import MALLOC, MALLOC_KEEPS
from .result import TIMES, Result, Row

_HEADINGS: Final = {
    "stages": "ResNet-50's stages",
    "channels last": "stages, channels last",
    "inference": "inference",
    "fully connected": "fully connected",
    "small": "small",
    "models": "training steps",
    "compiled": "compiled training steps",
    "memory": "steps, and memory",
}
"""Group -> its heading, in the table's order."""


def table(result: Result, framework: str) -> Table:
    """Return the rows of a framework by group, each group ending with the geometric mean of its speedups.

    Layers are compared with the copy, networks with the same network without BatchNorm.
    """
    names = " and ".join(dict.fromkeys(row.own for row in result.rows[framework]))
    networks = result.of_networks
    found = Table(box=box.SIMPLE_HEAD, title=f"{framework} {result.versions[framework]}; own: {names}", title_justify="left")
    found.add_column("input", no_wrap=True)
    columns: tuple[str, ...] = ("own/ours", "limit") if networks else ("copy ms", "own/ours", "ours/copy")
    if result.of_compiled:
        columns = ("own/ours",)
    if result.of_memory:
        columns = "own/ours", "ours MiB", "own MiB", "ours/own"
    for heading in ("ours ms", "own ms", *columns):
        found.add_column(heading, justify="right", no_wrap=True)
    means = result.geometric_means(framework)
    for group, heading in _HEADINGS.items():
        rows = [row for row in result.rows[framework] if row.input.group == group]
        if rows:
            found.add_row(f"[bold]{heading}")
        for row in rows:
            times = (_digits(row.ms(who)) for who in ("ours", "own", *(() if networks else ("copy",))))
            beside = [] if result.of_compiled else [row.limit if networks else row.to_copy]
            if result.of_memory:
                beside = [row.peak("ours"), row.peak("own"), row.memory]
            found.add_row(f" {row.input}", *times, f"[bold]{_digits(row.speedup)}", *map(_digits, beside))
        if group in means:
            found.add_row(" geometric mean", "", "", "", f"[bold]{_digits(means[group])}", "")
        found.add_section()
    return found


def _settings(variables: Mapping[str, str]) -> str:
    return " ".join(map("=".join, variables.items()))


def caption(result: Result) -> str:
    """Return where and how the run was made."""
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    what = (
        "forward + backward in training, or forward in inference.\ncopy: copying the same bytes, two copies into memory "
        "allocated like y and three into memory allocated like dx; in inference one."
    )
    if result.of_memory:
        what = (
            "a training step: forward, loss, backward, SGD.\nown: after swap with fuse_relu; ours: the same within recompute(). "
            f"MiB: peak of the resident memory during forward over its start,\nwith {_settings(MALLOC)}."
        )
    elif result.of_compiled:
        what = (
            "a training step under torch.compile(fullgraph=True): forward, loss, backward, SGD.\n"
            "own: the network as it is; ours: after swap.\n"
            f"Freed memory stays in the process: {_settings(MALLOC_KEEPS)}."
        )
    elif result.of_networks:
        what = (
            "a training step: forward, loss, backward, SGD.\nown: the network as it is; ours: after swap, in PyTorch with "
            "fuse_relu; limit: how many times faster it is without any BatchNorm."
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
