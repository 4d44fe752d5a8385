"""``multibn bench``: its arithmetic, the reports of a made-up run, the processes that measure, and wrong calls."""

import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from multibn import cli, machine
from multibn.bench import contest, result, show
from multibn.bench import run as bench
from multibn.bench.inputs import MODELS
from multibn.bench.result import Input, Result, Row

PROCESSORS = len(os.sched_getaffinity(0))


def row(given: Input, ours: list[float], own: list[float], copy: list[float] | None = None) -> Row:
    samples = {"ours": ours, "own": own}
    return Row(given, "torch.nn.BatchNorm2d", samples if copy is None else {**samples, "copy": copy})


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setattr(result, "version", lambda name: f"of-{name}")
    monkeypatch.setattr(platform, "python_version", lambda: "3.11.0")
    monkeypatch.setattr(result, "__version__", "0.0")
    rows = [
        row(Input("stages", (32, 64, 4, 4)), [10.0, 12.0, 30.0], [40.0, 12.0, 90.0], [10.0, 8.0, 10.0]),
        row(Input("stages", (32, 128, 2, 2)), [1.0, 1.0, 1.0], [12.0, 12.0, 12.0], [2.0, 2.0, 2.0]),
        row(Input("small", (8, 2), hybridized=True), [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]),
    ]
    return Result(
        "multibn bench", 2, 3, {"torch": rows}, {"mxnet": "gone"}, date="2026-01-02T03:04:05+00:00", processor="A processor"
    )


def test_the_speedup_is_the_median_of_the_ratios_and_not_the_ratio_of_the_medians() -> None:
    busy = row(Input("stages", (2, 2)), [10.0, 100.0, 14.0], [40.0, 300.0, 28.0], [5.0, 100.0, 2.0])
    assert busy.speedup == 3.0  # of 4, 3, 2; the medians are 14 and 40
    assert busy.to_copy == 2.0  # of 2, 1, 7
    assert busy.ms("ours") == 14.0
    assert busy.ms("own") == 40.0


def test_without_a_copy_there_is_no_ratio_to_it() -> None:
    small = row(Input("small", (2, 2)), [1.0], [2.0])
    assert small.to_copy is None
    assert small.ms("copy") is None


def test_samples_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError):
        result.median_of_ratios([1.0, 2.0], [1.0])


def test_the_geometric_mean_of_two_and_eight_is_four() -> None:
    assert round(result.geometric_mean([2.0, 8.0]), 12) == 4.0


def test_geometric_means_are_those_of_the_stages(made_up: Result) -> None:
    means = made_up.geometric_means("torch")
    assert list(means) == ["stages"]
    assert round(means["stages"], 12) == 6.0  # of 3 and 12


def test_the_processor_is_named(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A processor\nflags\t: x\nprocessor\t: 1\nmodel name\t: A processor\n")
    assert machine.processor(True, info) == "A processor, 2 processors"
    assert machine.processor(False, info) == "A processor"
    for count in (True, False):
        assert machine.processor(count, tmp_path / "missing") == (platform.processor() or platform.machine())


def test_the_table(made_up: Result) -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(show.table(made_up, "torch"))
    assert [line.rstrip() for line in capture.get().splitlines() if line.strip()] == [
        "torch of-torch; own: torch.nn.BatchNorm2d",
        "  input                ours ms   own ms   copy ms   own/ours   ours/copy",
        " ────────────────────────────────────────────────────────────────────────",
        "  ResNet-50's stages",
        "   (32, 64, 4, 4)        12.00    40.00     10.00       3.00        1.50",
        "   (32, 128, 2, 2)        1.00    12.00      2.00      12.00       0.500",
        "   geometric mean                                       6.00",
        "  small",
        "   (8, 2), hybrid        0.500    0.250                0.500",
    ]


def test_the_caption_says_how_the_run_was_made(made_up: Result) -> None:
    assert show.caption(made_up).splitlines() == [
        "Medians of 3 turns; forward + backward in training, or forward in inference.",
        "copy: copying the same bytes, two copies into memory allocated like y and three into memory allocated like dx; "
        "in inference one.",
        "multibn 0.0, python 3.11.0, numpy of-numpy, numba of-numba, torch of-torch",
        "A processor, 2 threads, 2026-01-02T03:04:05+00:00",
        "multibn bench",
    ]


def test_the_json(made_up: Result) -> None:
    found = json.loads(json.dumps(made_up.to_dict()))
    rows = found["frameworks"]["torch"].pop("rows")
    means = found["frameworks"]["torch"].pop("geometric_means")
    assert means == made_up.geometric_means("torch")
    assert found == {
        "format": "multibn bench 1",
        "command": "multibn bench",
        "date": "2026-01-02T03:04:05+00:00",
        "processor": "A processor",
        "threads": 2,
        "rounds": 3,
        "versions": {"multibn": "0.0", "python": "3.11.0", "numpy": "of-numpy", "numba": "of-numba", "torch": "of-torch"},
        "absent": {"mxnet": "gone"},
        "frameworks": {"torch": {}},
    }
    assert rows[0] == {
        "group": "stages",
        "shape": [32, 64, 4, 4],
        "training": True,
        "channels_last": False,
        "hybridized": False,
        "model": "",
        "compiled": False,
        "recompute": False,
        "own": "torch.nn.BatchNorm2d",
        "ours_ms": 12.0,
        "own_ms": 40.0,
        "copy_ms": 10.0,
        "none_ms": None,
        "speedup": 3.0,
        "to_copy": 1.5,
        "limit": None,
        "samples_ms": {"ours": [10.0, 12.0, 30.0], "own": [40.0, 12.0, 90.0], "copy": [10.0, 8.0, 10.0]},
        "memory": None,
        "peaks_mib": {},
    }
    assert rows[2]["copy_ms"] is rows[2]["to_copy"] is None
    assert list(rows[2]["samples_ms"]) == ["ours", "own"]


@pytest.fixture
def of_networks(made_up: Result) -> Result:
    samples = {"ours": [8.0, 9.0, 90.0], "own": [10.0, 9.0, 180.0], "none": [5.0, 6.0, 60.0]}
    network = Row(Input("models", (16, 3, 112, 112), hybridized=True, model="densenet121"), "densenet121", samples)
    return replace(made_up, rows={"torch": [network]}, command="multibn bench --model densenet121")


def test_the_table_of_networks_has_the_limit(of_networks: Result) -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(show.table(of_networks, "torch"))
    assert [line.rstrip() for line in capture.get().splitlines() if line.strip()] == [
        "torch of-torch; own: densenet121",
        "  input                            ours ms   own ms   own/ours   limit",
        " ──────────────────────────────────────────────────────────────────────",
        "  training steps",
        "   densenet121 (16, 3, 112, 112)      9.00    10.00       1.25    2.00",
    ]
    assert show.caption(of_networks).splitlines() == [
        "Medians of 3 turns; a training step: forward, loss, backward, SGD.",
        "own: the network as it is; ours: after swap, in PyTorch with fuse_relu; limit: how many times faster it is without any "
        "BatchNorm.",
        "multibn 0.0, python 3.11.0, numpy of-numpy, numba of-numba, torch of-torch",
        "A processor, 2 threads, 2026-01-02T03:04:05+00:00",
        "multibn bench --model densenet121",
    ]


def test_the_json_of_networks(of_networks: Result) -> None:
    (found,) = of_networks.to_dict()["frameworks"]["torch"]["rows"]
    assert (found["model"], found["none_ms"], found["limit"], found["copy_ms"]) == ("densenet121", 6.0, 2.0, None)


def test_the_picture_has_a_bar_for_each_and_the_ratio_above(made_up: Result) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.text import Annotation

    axes = Figure().subplots()
    show._bars(axes, made_up.rows["torch"][:2])
    assert [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)] == [12.0, 40.0, 1.0, 12.0]
    assert [text.get_text() for text in axes.texts] == ["3.0\N{MULTIPLICATION SIGN}", "12.0\N{MULTIPLICATION SIGN}"]
    assert [text.xy for text in axes.texts if isinstance(text, Annotation)] == [(0, 40.0), (1, 12.0)]
    assert [line.get_segments()[0][0][1] for line in axes.collections if isinstance(line, LineCollection)] == [10.0, 2.0]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["copying the same bytes", "multibn", "torch.nn.BatchNorm2d"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "64\n4\N{MULTIPLICATION SIGN}4",
        "128\n2\N{MULTIPLICATION SIGN}2",
    ]


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_picture_is_written(made_up: Result, tmp_path: Path, suffix: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"bench{suffix}"
    show.draw(made_up, file)
    assert file.read_bytes().startswith(begins)


def test_turns_alternate_and_the_first_runs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def clock(run: Callable[[], str], clear: object, repeats: int) -> float:
        calls.append((run(), repeats))
        return 2.0

    monkeypatch.setattr(contest, "clock", clock)
    samples = contest.take_turns({"ours": lambda: "ours", "own": lambda: "own"}, lambda: None, 3)
    assert samples == {"ours": [2.0] * 3, "own": [2.0] * 3}
    assert calls[-6:] == [(who, 3) for who in ("ours", "own", "own", "ours", "ours", "own")]  # 3 of 2 ms last 5 ms
    assert len(calls) == 2 + 6 + 6


def test_the_clock_divides_by_the_repeats_and_clears_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 10.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    calls: list[str] = []
    assert contest.clock(lambda: calls.append("run"), lambda: calls.append("clear"), 2) == 250.0
    assert calls == ["clear", "clear", "run", "clear", "run"]


TINY = {
    "torch": [
        Input("stages", (4, 3, 5, 5)),
        Input("channels last", (4, 3, 5, 5), channels_last=True),
        Input("inference", (4, 3), training=False),
        Input("small", (4, 3)),
    ],
    "mxnet": [
        Input("stages", (4, 3, 5, 5)),
        Input("inference", (4, 3), training=False),
        Input("small", (4, 3), hybridized=True),
    ],
}


@pytest.mark.parametrize("framework", TINY)
def test_a_framework_is_measured_in_its_own_process(
    framework: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(framework)
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "100")
    file, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    assert bench.run([framework], {"other": "not installed"}, 1, True, file, picture, "multibn bench", inputs=TINY)
    found = json.loads(file.read_text())
    rows = found["frameworks"][framework]["rows"]
    assert [tuple(each["shape"]) for each in rows] == [each.shape for each in TINY[framework]]
    own = {"torch": ["torch.nn.BatchNorm2d"] * 2 + ["torch.nn.BatchNorm1d"] * 2, "mxnet": ["gluon.nn.BatchNorm"] * 3}
    assert [each["own"] for each in rows] == own[framework]
    for each in rows:
        assert list(each["samples_ms"]) == (["ours", "own"] if each["group"] == "small" else ["ours", "own", "copy"])
        assert all(len(times) == 3 and min(times) > 0 for times in each["samples_ms"].values())
    assert found["versions"][framework] == version(framework)
    assert picture.stat().st_size > 0
    out = capfd.readouterr().out
    assert out.startswith(f"{framework} {version(framework)}; own: {' and '.join(dict.fromkeys(own[framework]))}")
    assert "\nother was not measured: not installed\n" in out
    assert out.endswith("\nmultibn bench\n")


@pytest.mark.parametrize("model", MODELS)
def test_a_network_is_trained_in_its_own_process(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    tiny = {"torch": [Input("models", (2, 3, 32, 32), model=model)]}
    file = tmp_path / "bench.json"
    assert bench.run(["torch"], {}, 1, True, file, None, "multibn bench", [model], tiny)
    (found,) = json.loads(file.read_text())["frameworks"]["torch"]["rows"]
    assert (found["model"], found["own"]) == (model, model)
    assert list(found["samples_ms"]) == ["ours", "own", "none"]
    assert all(len(times) == 3 and min(times) > 0 for times in found["samples_ms"].values())
    assert f"{model} (2, 3, 32, 32)" in capfd.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_memory_of_a_network_is_measured_within_recompute_and_without(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("COLUMNS", "100")
    small = {"torch": [Input("memory", (8, 64, 32, 32), model="densenet10", recompute=True)]}
    file = tmp_path / "bench.json"
    assert bench.run(["torch"], {}, 1, True, file, None, "multibn bench", (), small)
    (found,) = json.loads(file.read_text())["frameworks"]["torch"]["rows"]
    assert (found["model"], found["own"]) == ("densenet10", "densenet10 without recompute()")
    assert {who: len(peaks) for who, peaks in found["peaks_mib"].items()} == {"ours": 3, "own": 3}
    assert list(found["samples_ms"]) == ["ours", "own"]
    assert 0.4 < found["memory"] < 0.8
    out = capfd.readouterr().out
    assert "densenet10 (8, 64, 32, 32)" in out
    assert "with MALLOC_MMAP_THRESHOLD_=262144 MALLOC_TRIM_THRESHOLD_=0." in out


def test_compiled_networks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Dynamo's backend that generates no code, which would take minutes."""
    torch = pytest.importorskip("torch")
    from multibn_torch.layers import Layer
    from multibn_torch.studies import bench as its

    compiled: list[Any] = []

    def compile_(model: Any, **options: Any) -> Any:
        compiled.append((model, options))
        return of_torch(model, backend="eager", **options)

    of_torch = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    networks = its.contest(Input("compiled", (2, 3, 16, 16), model="convnet", compiled=True))
    try:
        samples = contest.take_turns(networks.runs, networks.clear, 2)
    finally:
        torch._dynamo.reset()
    assert list(samples) == ["ours", "own"]
    assert [options for _, options in compiled] == [{"fullgraph": True}] * 2
    assert [sum(isinstance(each, Layer) for each in model.modules()) > 0 for model, _ in compiled] == [True, False]


def test_the_table_and_the_caption_of_compiled_networks(of_networks: Result) -> None:
    (row,) = of_networks.rows["torch"]
    found = replace(of_networks, rows={"torch": [replace(row, input=replace(row.input, compiled=True))]})
    assert show.caption(found).splitlines()[:3] == [
        "Medians of 3 turns; a training step under torch.compile(fullgraph=True): forward, loss, backward, SGD.",
        "own: the network as it is; ours: after swap.",
        "Freed memory stays in the process: "
        "MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592.",
    ]
    assert [column.header for column in show.table(found, "torch").columns] == ["input", "ours ms", "own ms", "own/ours"]


def test_a_framework_of_another_interpreter_is_measured_there_and_its_versions_are_told(tmp_path: Path) -> None:
    given = asdict(Input("models", (2, 3, 8, 8), model="resnet18"))
    line = {"input": given, "own": "resnet18", "samples": {"ours": [1.0], "own": [2.0], "none": [0.5]}}
    versions = {"jax": "9.9", "numpy": "2.0", "numba": version("numba"), "python": "3.99"}
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n[ $1 = -c ] && echo '{json.dumps(versions)}' || echo '{json.dumps(line)}'\n")
    python.chmod(0o755)
    options = ["--framework", "jax", "--python", str(python), "--model", "resnet18", "--quick", "--json", str(tmp_path / "out")]
    if importlib.util.find_spec("jax") is not None:
        pytest.skip("jax is installed here, so it is not looked for elsewhere")
    done = CliRunner().invoke(cli.app, ["bench", *options])
    assert done.exit_code == 0, done.output
    assert f"numpy {version('numpy')}, numba {version('numba')}, jax 9.9, numpy of jax 2.0, python of jax 3.99" in done.output
    assert json.loads((tmp_path / "out").read_text())["versions"] == {
        "multibn": version("multibn"), "python": platform.python_version(), "numpy": version("numpy"), "numba": version("numba"),
        "jax": "9.9", "numpy of jax": "2.0", "python of jax": "3.99",
    }  # fmt: skip


def test_gluons_networks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mxnet")
    from multibn_mxnet import GluonBatchNorm
    from multibn_mxnet.studies import bench as its

    made = [its._ZOO["resnet18"]() for _ in range(3)]
    monkeypatch.setitem(its._ZOO, "resnet18", iter(made).__next__)
    found = its.contest(Input("models", (2, 3, 32, 32), model="resnet18"))
    assert (found.own, list(found.runs)) == ("resnet18", ["ours", "own", "none"])
    for net, kinds in zip(made, ({GluonBatchNorm}, {mx.gluon.nn.BatchNorm}, set()), strict=True):
        blocks: list[Any] = []
        net.apply(blocks.append)
        assert {type(block) for block in blocks if isinstance(block, mx.gluon.nn.BatchNorm)} == kinds
    for step, net in zip(found.runs.values(), made, strict=True):
        before = net.output.weight.data().asnumpy()
        step()
        assert (net.output.weight.data().asnumpy() != before).any()
    pools = [block for block in its._densenet121().features if isinstance(block, mx.gluon.nn.GlobalAvgPool2D)]
    assert len(pools) == 1


@pytest.mark.parametrize(("name", "layers", "parameters"), [("densenet121", 121, 7_978_856), ("resnet18", 20, 11_689_512)])
def test_the_networks_are_those_of_the_papers(name: str, layers: int, parameters: int) -> None:
    """The numbers are those of torchvision, whose names the weights have too."""
    torch = pytest.importorskip("torch")
    from multibn_torch.studies import models

    network = models.MODELS[name]()
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()) == layers
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
    inside = {"densenet121": "features.denseblock4.denselayer16.norm2.weight", "resnet18": "layer4.1.bn2.weight"}
    assert inside[name] in network.state_dict()


def test_a_process_that_fails_is_reported_and_the_others_are_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "modules", lambda: {"torch": "multibn.no_such_module"})
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    assert not bench.run(["torch"], {}, 1, True, file, picture, "multibn bench", inputs=TINY)
    reason = "its process ended with code 1; what it said stands above."
    assert json.loads(file.read_text())["absent"] == {"torch": reason}
    assert not picture.exists()
    out, err = capfd.readouterr()
    assert f"torch was not measured: {reason}" in out.splitlines()
    assert "No module named multibn.no_such_module\n" in err


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which frameworks are installed, of two that have studies."""
    monkeypatch.setattr(
        bench, "modules", lambda: {"mxnet": "multibn_mxnet.studies.bench", "torch": "multibn_torch.studies.bench"}
    )

    def only(*names: str) -> None:
        monkeypatch.setattr(bench, "installed", lambda name: name in names)

    only("torch", "mxnet")
    return only


def test_all_that_is_installed_is_measured_unless_chosen(installed: Callable[..., None]) -> None:
    assert bench.what_to_measure([], None, None, None) == (["mxnet", "torch"], {}, min(2, PROCESSORS))
    assert bench.what_to_measure(["mxnet", "mxnet"], 1, Path("a.json"), None) == (["mxnet"], {}, 1)
    installed("torch")
    absent = {"mxnet": "not installed: pip install 'multibn[mxnet]'"}
    assert bench.what_to_measure([], 1, None, None) == (["torch"], absent, 1)
    assert bench.what_to_measure(["torch"], 1, None, None) == (["torch"], {}, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--framework", "jax"], "--framework must be mxnet or torch, got jax."),
        (["--threads", "0"], f"--threads must be from 1 to {PROCESSORS}, the processors that this process may use, got 0."),
        (["--threads", "9999"], f"--threads must be from 1 to {PROCESSORS}, the processors that this process may use, got 9999."),
        (["--model", "vgg"], "--model must be densenet121 or resnet18, got vgg."),
        (
            ["--model", "resnet18", "--picture", "a.svg"],
            "--picture draws the stages of ResNet-50, which --model does not measure: leave one of them out.",
        ),
        (["--picture", "bench.gif"], "--picture must end in .svg or .png, got bench.gif."),
        (["--json", "/none/a.json"], "/none/a.json cannot be written, there is no folder /none: make it first."),
        (["--picture", "/none/a.svg"], "/none/a.svg cannot be written, there is no folder /none: make it first."),
    ],
)
def test_a_wrong_call_ends_with_2(installed: Callable[..., None], arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"multibn: {message}\n")


def test_a_framework_asked_for_must_be_installed(installed: Callable[..., None]) -> None:
    installed("torch")
    with pytest.raises(ValueError) as raised:
        bench.what_to_measure(["mxnet"], None, None, None)
    assert str(raised.value) == "mxnet is not installed: pip install 'multibn[mxnet]'."


def test_with_nothing_installed_there_is_nothing_to_measure(installed: Callable[..., None]) -> None:
    installed()
    with pytest.raises(ValueError) as raised:
        bench.what_to_measure([], None, None, None)
    assert str(raised.value) == (
        "nothing to measure: mxnet is not installed: pip install 'multibn[mxnet]'; "
        "torch is not installed: pip install 'multibn[torch]'."
    )


def test_a_picture_needs_matplotlib(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as raised:
        bench.what_to_measure([], None, None, Path("a.svg"))
    assert str(raised.value) == "--picture needs matplotlib, which is not installed: pip install 'multibn[conformance]'."


@pytest.mark.parametrize(("done", "code"), [(True, 0), (False, 1)])
def test_the_command_passes_on_what_was_asked(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, done: bool, code: int
) -> None:
    pytest.importorskip("matplotlib")
    asked = []

    def run(*plan: object, others: object) -> bool:
        asked.append(plan)
        assert not others
        return done

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(sys, "argv", ["/bin/multibn", "bench", "--json", "a b.json"])
    arguments = ["bench", "--quick", "--framework", "mxnet", "--threads", "1", "--json", "a b.json", "--picture", "c.svg"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == code
    assert asked == [(["mxnet"], {}, 1, True, Path("a b.json"), Path("c.svg"), "multibn bench --json 'a b.json'", ())]


def test_a_networks_profile_has_every_contestant_and_its_operators(monkeypatch: Any, capsys: Any) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from multibn_torch.studies import network_profile

    monkeypatch.setattr(network_profile, "STEPS", 1)
    spent = network_profile.measure("convnet", False)
    assert list(spent) == ["ours", "own", "none"]
    batch_norms = {who: {each for each in one if "batch_norm" in each} for who, one in spent.items()}
    assert batch_norms["ours"] >= {"multibn::batch_norm", "multibn::batch_norm_backward"}
    assert batch_norms["own"] >= {"aten::native_batch_norm", "aten::native_batch_norm_backward"}
    assert batch_norms["none"] == set()
    assert all(one["aten::convolution_backward"] > 0 for one in spent.values())
    monkeypatch.setattr(network_profile, "measure", lambda *_: spent)
    network_profile.main("convnet")
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0].split(), len(lines)) == (["ours", "own", "none", "ms", "in", "convnet"], network_profile.ROWS + 2)
    assert "aten::convolution_backward" in lines[1]
    with pytest.raises(SystemExit) as caught:
        network_profile.main("alexnet")
    assert str(caught.value) == (
        "expected convnet or resnet18 or densenet121 or transformers-resnet or transformers-mobilenetv2, and perhaps --compiled, "
        "got alexnet."
    )
