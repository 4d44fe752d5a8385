"""The report as one HTML page without external resources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from multibn.usage import needed

from .proof import LINE
from .report import FAR, OUTPUTS

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 420, 220, 52, 10, 30


def render(report: Mapping[str, Any]) -> str:
    """Return the page of a report.

    Raises:
        UsageError: Jinja2 is not installed.
    """
    with needed("port", "port"):
        from jinja2 import Environment, PackageLoader, StrictUndefined
    environment = Environment(
        loader=PackageLoader("multibn.port", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    css = (files("multibn.port") / "page" / "report.css").read_text(encoding="utf-8")
    outputs = [max(each["errors"]) for each in (report["check"] or {"outputs": []})["outputs"]]
    return environment.get_template("report.html.j2").render(
        report=report, css=css, charts=charts(report), worst_output=max(outputs, default=0.0), allowed=LINE, limit=OUTPUTS
    )


def short(value: float) -> str:
    """Format a number with a few digits."""
    if value >= FAR:
        return "not finite"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


def charts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Charts of each layer's deviation and of its stored values, in the order of the graph."""
    norms = report["batch_norms"]
    if len(norms) < 2:
        return []
    off = {"line in inference, float64": [each["inference"]["deviation"] for each in norms]}
    limit = LINE
    if report["check"]:
        off["output, beside MXNet in float32"] = [each["measured"] for each in norms]
        limit = OUTPUTS
    stored = {
        "largest gain": [each["largest_gain"] for each in norms],
        "kappa": [each["kappa"] for each in norms],
        "stored gamma from 1": [each["stored_gamma_off_one"] for each in norms],
    }
    names = [each["name"] for each in norms]
    return [
        _chart("off", "How far each BatchNorm is off", off, names, limit),
        _chart("stored", "What is stored", stored, names, None),
    ]


def _chart(
    key: str, title: str, series: Mapping[str, Sequence[float]], names: Sequence[str], limit: float | None
) -> dict[str, Any]:
    """A chart of points per layer with a logarithmic scale; 0 and non-finite values lie on its edges."""
    shown = [value for values in series.values() for value in values if 0 < value < FAR] + [limit or 1.0]
    low, high = math.floor(math.log10(min(shown))), max(math.ceil(math.log10(max(shown))), math.floor(math.log10(min(shown))) + 1)
    room, step = HEIGHT - TOP - BOTTOM, max(1, round((high - low) / 6))

    def place(value: float) -> float:
        power = min(max(math.log10(value), low), high) if value else low
        return round(TOP + room * (high - power) / (high - low), 1)

    def across(i: int) -> float:
        return round(LEFT + 8 + (WIDTH - LEFT - 24) * i / (len(names) - 1), 1)

    lines = [
        {
            "label": label,
            "points": [(across(i), place(value), f"{names[i]}: {label} {short(value)}") for i, value in enumerate(values)],
        }
        for label, values in series.items()
    ]
    ticks = [(place(10.0**power), f"1e{power}" if abs(power) > 3 else f"{10.0**power:g}") for power in range(low, high + 1, step)]
    its_limit = None if limit is None else place(limit)
    return {
        "id": key, "title": title, "width": WIDTH, "height": HEIGHT, "left": LEFT, "ticks": ticks, "limit": its_limit,
        "series": lines,
    }  # fmt: skip
