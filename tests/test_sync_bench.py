"""``multibn bench --ranks``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from multibn.bench import scaling
from multibn.cli import app


def test_messages_on_paper() -> None:
    """10 microseconds for nothing, 1 more for each 1000 bytes, among two ranks."""
    times = {"0": 10.0, "100000": 110.0}
    assert scaling.model(times) == (5.0, 1000.0)
    assert sum(scaling.LAYERS.values()) == 53
    passes = 2 * 53
    size = sum(count * scaling.message(channels) for channels, count in scaling.LAYERS.items()) * 2
    assert scaling.milliseconds("gloo", times, 2) == pytest.approx((passes * 10 + size / 1000) / 1e3)
    assert scaling.milliseconds("mpi", times, 2) == pytest.approx(scaling.milliseconds("gloo", times, 2))
    assert scaling.milliseconds("mpi", times, 1024) < scaling.milliseconds("gloo", times, 1024) / 20


def test_processes_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    file = tmp_path / "ranks.json"
    done = CliRunner().invoke(app, ["bench", "--ranks", "2", "--quick", "--json", str(file)])
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert row["shape"] == [32, 2048, 7, 7]
    assert {"gloo", "straightforward", "alone", "exact"} <= set(row["ms"])
    assert all(value > 0 for value in row["ms"].values())
    assert 2 * 8 * 2048 * 8 < row["bytes"] < 2 * 8 * 2048 * 20
    assert [each["dtype"] for each in result["types"]] == ["float16", "bfloat16", "float32", "float64"]
    for each in result["types"]:
        for name in ("forward", "backward"):
            times = each[name]
            assert times["exact"] > 0.3 * times["alone"] > 0
            assert 0.3 < times["ratio"] / (times["exact"] / times["alone"]) < 3
    headings = [line.split() for line in done.output.splitlines() if "input of each" in line]
    assert headings == [
        ["input", "of", "each", *result["messages"], "by", "hand", "ratio", "exact", "alone", "bytes"],
        ["input", "of", "each", "float16", "bfloat16", "float32", "float64"],
    ]
    assert "on paper" in done.output
