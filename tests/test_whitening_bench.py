"""``multibn bench --whitening``: rows, file, refusals, and that the straightforward contestants compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'multibn[torch]'")

from multibn.bench import whitening as bench_whitening
from multibn.bench.contest import take_turns
from multibn.bench.whitening import BATCHNORM, Input, Row
from multibn.cli import app
from multibn_torch.studies import whitening_bench


@pytest.mark.parametrize(("ours", "plain"), bench_whitening.AGAINST.items())
def test_the_contestants_compute_the_same(ours: str, plain: str) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(8, 5, 7, 7), torch.randn(8, 5, 7, 7)
    found = []
    for name in (ours, plain):
        given = x.clone().requires_grad_()
        y = whitening_bench.LAYERS[name](5)(given)
        y.backward(dy)
        found.append((y.detach(), given.grad))
    for came, other in zip(*found, strict=True):
        torch.testing.assert_close(came, other, rtol=1e-3, atol=1e-4)


def test_ratios_are_of_the_same_turn() -> None:
    row = Row((2, 3, 4, 4), {"zca": [1.0, 10.0, 3.0], "eigh, autograd": [2.0, 20.0, 6.0], BATCHNORM: [0.5, 5.0, 1.5]})
    assert row.ms("zca") == 3.0
    assert row.speedups == {"zca": 2.0}
    assert row.times("zca", BATCHNORM) == 2.0


def test_a_run_prints_tables_and_writes_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = (
        Input((2, 4, 3, 3), (*bench_whitening.AGAINST, *bench_whitening.AGAINST.values()), 9),
        Input((2, 4, 3, 3), (BATCHNORM, "zca"), 9),
    )

    def in_process(given: Any, threads: int) -> Any:
        for each in given:
            yield Row(each.shape, take_turns(*whitening_bench.contest(each.shape, list(each.contestants)), each.rounds))

    monkeypatch.setattr(bench_whitening, "measure", in_process)
    assert bench_whitening.run(1, True, tmp_path / "times.json", "the command", inputs)
    text = capsys.readouterr().out
    assert "whitening of (2, 4, 3, 3)" in text
    assert "over the channels C, (2, C, 3, 3)" in text
    found = json.loads((tmp_path / "times.json").read_text())
    assert (found["format"], found["command"]) == ("multibn whitening bench 1", "the command")
    assert [len(row["samples_ms"]["zca"]) for row in found["rows"]] == [bench_whitening.QUICK_ROUNDS] * 2
    assert set(found["rows"][0]["speedups"]) == {"zca", "newton"}
    assert found["rows"][0]["to_batchnorm"] == {}
    assert set(found["rows"][1]["to_batchnorm"]) == {BATCHNORM, "zca"}


def test_it_is_measured_in_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    (row,) = bench_whitening.measure([Input((2, 4, 3, 3), ("zca",), 1)], threads=1)
    assert list(row.samples) == ["zca"]
    assert not bench_whitening.run(1, True, None, "", [Input((2, 4, 3, 3), ("nobody",), 1)])
    assert "whitening was not measured: its process ended with code 1; what it said stands above." in capfd.readouterr().out


def test_the_process_prints_a_line_for_each_input(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        whitening_bench.main(json.dumps({"inputs": [[[2, 4, 3, 3], ["zca"], 2]], "threads": 1}))
    finally:
        torch.set_num_threads(before)
    assert len(json.loads(capsys.readouterr().out)["zca"]) == 2


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def run(*arguments: Any) -> bool:
        given.append(arguments)
        return True

    monkeypatch.setattr(bench_whitening, "run", run)
    assert CliRunner().invoke(app, ["bench", "--whitening", "--quick", "--threads", "1"]).exit_code == 0
    assert given[0][:3] == (1, True, None)
    wrong = CliRunner().invoke(app, ["bench", "--whitening", "--framework", "mxnet"])
    assert (wrong.exit_code, wrong.stderr) == (
        2,
        "multibn: --whitening is measured in torch and draws no picture. Leave --framework, --model and --picture out.\n",
    )


def speed_table(found: dict[str, Any]) -> str:
    """The first table of docs/whitening.md."""
    lines = ["| kind | multibn, ms | PyTorch's operators, ms | faster |", "|---|---|---|---|"]
    first = found["rows"][0]
    for ours, plain in bench_whitening.AGAINST.items():
        lines.append(f"| {ours} | {first['ms'][ours]:.1f} | {first['ms'][plain]:.1f} ({plain}) | {first['speedups'][ours]:.2f} |")
    return "\n".join(lines)


def cost_table(found: dict[str, Any]) -> str:
    """The second."""
    rows = found["rows"][1:]
    lines = [f"| C | {' | '.join(rows[0]['ms'])} |", "|---" * (1 + len(rows[0]["ms"])) + "|"]
    for row in rows:
        cells = (f"{ms:.1f} ({row['to_batchnorm'][who]:.2g})" for who, ms in row["ms"].items())
        lines.append(f"| {row['shape'][1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_page_shows_the_numbers_of_the_run_beside_it() -> None:
    docs = Path(__file__).parent.parent / "docs"
    found = json.loads((docs / "whitening.json").read_text())
    page = (docs / "whitening.md").read_text()
    assert speed_table(found) in page
    assert cost_table(found) in page
    assert min(found["rows"][0]["speedups"].values()) >= 1.3
