"""`multibn port`: what it writes, prints and exits with; what is in the report; and that the usual mistakes are caught by it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from port_checkpoints import mxnet, node, small, symbol_text, values, write
from typer.testing import CliRunner

from multibn.cli import app
from multibn.port import PortError
from multibn.port.page import render
from multibn.port.report import batch_norm, differences
from multibn_torch import from_mxnet
from multibn_torch.port import make as making
from multibn_torch.port.prove import prove

ENDINGS = (".pt", ".pt2", ".report.html", ".report.json")
SCHEMA = json.loads((files("multibn.port") / "schemas" / "report.schema.json").read_text(encoding="utf-8"))


def port(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["port", *map(str, arguments)])


def report_of(folder: Path, *arguments: Any, code: int = 0, **batch_norm_attributes: Any) -> dict[str, Any]:
    """Return the report of a small network."""
    symbol, params, _ = small(folder, **batch_norm_attributes)
    done = port(symbol, params, "data=2,3,8,8", "-o", folder / "out", *arguments)
    assert done.exit_code == code, done.output
    report = json.loads((folder / "out.report.json").read_text())
    pytest.importorskip("jsonschema").validate(report, SCHEMA)
    return report  # type: ignore[no-any-return]


def test_it_writes_four_files_and_says_so(tmp_path: Path) -> None:
    symbol, params, arrays = small(tmp_path, eps="2e-5")
    done = port(symbol, params, "data=2,3,8,8", "-o", tmp_path / "out")
    off = float(np.abs(arrays["bn_gamma"] - 1).max())
    lines = done.stdout.splitlines()
    assert lines[0] == "the same: 5 operators, 1 BatchNorms, 1 output"
    assert lines[1].startswith("  inference: 1 of 1 BatchNorms proved for all inputs; largest deviation ")
    assert lines[2:] == [
        "  training: 1 of 1 BatchNorms give MXNet's y, gradients and moving statistics",
        f"  fix_gamma: in 1 of 1 the stored gamma, up to {off:.3g} from 1, does not count",
        *[f"  {tmp_path / 'out'}{ending}" for ending in (".pt2", ".pt", ".report.json", ".report.html")],
    ]
    assert done.exit_code == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        [symbol.name, params.name, *[f"out{end}" for end in ENDINGS]]
    )


def test_the_program_runs_where_only_torch_is(tmp_path: Path) -> None:
    report_of(tmp_path, fix_gamma="False")
    symbol, params = tmp_path / "small-symbol.json", tmp_path / "small-0000.params"
    x = torch.randn(2, 3, 8, 8)
    torch.save((x, from_mxnet(symbol, params)(x)), tmp_path / "wanted.pt")
    code = (
        "import sys, torch\n"
        "program = torch.export.load('out.pt2').module()\n"
        "x, wanted = torch.load('wanted.pt')\n"
        "torch.testing.assert_close(program(x), wanted, rtol=1e-5, atol=1e-6)\n"
        "state = torch.load('out.pt')\n"
        "print(sorted(state), any(name.startswith('multibn') for name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    names = [
        "bn.bias",
        "bn.num_batches_tracked",
        "bn.running_mean",
        "bn.running_var",
        "bn.weight",
        "conv.weight",
        "fc.bias",
        "fc.weight",
    ]
    assert done.stdout == f"{names} False\n", done.stderr


def test_the_report_says_what_the_file_does_not_write(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    (entry,) = report["batch_norms"]
    assert (entry["eps"], entry["eps_written"], entry["fix_gamma"], entry["fix_gamma_written"]) == (1e-3, False, True, False)
    assert entry["momentum"] == {"mxnet": 0.9, "torch": 0.1, "written": False}
    assert entry["bits"] == dict.fromkeys(("gamma", "beta", "moving_mean", "moving_var"), True)
    assert entry["training"]["errors"].keys() == {"y", "dx", "dbeta", "moving_mean", "moving_var"}
    assert max(entry["training"]["errors"].values()) <= 1
    assert entry["inference"]["deviation"] <= 1e-12
    assert report["params"] == {"arrays": 7, "versions": {"V2": 7}, "unused": []}
    assert report["mxnet_version"] == "1.9.1"
    assert report["states"]["bn.running_var"] == "bn_moving_var"


def test_the_report_counts_dead_channels(tmp_path: Path) -> None:
    symbol, _, arrays = small(tmp_path)
    arrays["bn_moving_var"][1:3] = (1e-11, 6e-45)
    symbol, params = write(tmp_path, symbol.read_text(), arrays)
    assert port(symbol, params, "data=2,3,8,8", "-o", tmp_path / "out").exit_code == 0
    (entry,) = json.loads((tmp_path / "out.report.json").read_text())["batch_norms"]
    assert entry["dead_channels"] == 2
    assert entry["largest_gain"] == pytest.approx(1e-3**-0.5)


def test_torchs_own_layers_differ_in_training_and_the_report_says_how(tmp_path: Path) -> None:
    report = report_of(tmp_path, "--layers", "torch", code=1, fix_gamma="False")
    assert report["differences"] == [
        "1 of 1 BatchNorms, the first bn: torch.nn.BatchNorm keeps the unbiased variance: m/(m-1) of MXNet's on a CPU, for m "
        "values per channel. multibn's layers keep MXNet's."
    ]
    errors = report["batch_norms"][0]["training"]["errors"]
    assert {name for name, value in errors.items() if value > 1} == {"moving_var"}


def test_global_statistics_are_kept_by_our_layers_and_not_by_torchs(tmp_path: Path) -> None:
    assert report_of(tmp_path, use_global_stats="True")["differences"] == []
    assert report_of(tmp_path, "--layers", "torch", code=1, use_global_stats="True")["differences"] == [
        "1 of 1 BatchNorms, the first bn: torch.nn.BatchNorm has no use_global_stats: train() normalises with the batch and "
        "moves the statistics. Keep it in eval(), or take multibn's layers."
    ]


MISTAKES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "fix_gamma ignored": (
        lambda layer, arrays: setattr(layer, "weight", torch.nn.Parameter(torch.from_numpy(arrays["bn_gamma"].copy()))),
        ("In inference it is not what the stored arrays say.", "y, dx, dgamma: not what"),
    ),
    "gamma fixed, but learning": (
        lambda layer, arrays: layer.weight.requires_grad_(True),
        ("In inference it is not what the stored arrays say.", "dgamma: not what"),
    ),
    "eps 1e-5": (
        lambda layer, arrays: setattr(layer, "eps", 1e-5),
        ("In inference it is not what the stored arrays say.", "y, dx: not what"),
    ),
    "momentum not turned round": (
        lambda layer, arrays: setattr(layer, "momentum", 0.9), ("moving_mean, moving_var: not what",),
    ),
    "statistics exchanged": (
        lambda layer, arrays: (
            layer.running_mean.copy_(torch.from_numpy(arrays["bn_moving_var"])),
            layer.running_var.copy_(torch.from_numpy(np.abs(arrays["bn_moving_mean"]))),
        ),
        ("In inference it is not what the stored arrays say.", "moving_mean, moving_var: not what"),
    ),
    "one bit of one value": (
        lambda layer, arrays: layer.bias.data.view(torch.int32)[2].bitwise_xor_(1),
        ("In inference it is not what the stored arrays say.",),
    ),
    "variance unbiased": (lambda layer, arrays: setattr(layer, "moving_variance", "unbiased"), ("moving_var: not what",)),
}  # fmt: skip


@pytest.mark.parametrize("layers", ["multibn", "torch"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught_by_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str, layers: str) -> None:
    symbol, params, arrays = small(tmp_path)
    spoil, wanted = MISTAKES[mistake]
    original: Any = vars(making)["read"]

    def spoiled(*arguments: Any) -> Any:
        imported = original(*arguments)
        spoil(imported.model.get_submodule("bn"), arrays)
        return imported

    monkeypatch.setattr(making, "read", spoiled)
    done = port(symbol, params, "data=2,3,8,8", "-o", tmp_path / "out", "--layers", layers)
    report = json.loads((tmp_path / "out.report.json").read_text())
    if layers == "torch":  # its unbiased variance is a known difference, unless more is wrong
        wanted = tuple(
            text.replace("dgamma: not", "dgamma, moving_var: not").replace("dx: not", "dx, moving_var: not") for text in wanted
        )
        wanted = () if mistake == "variance unbiased" else wanted
    assert done.exit_code == 1
    assert all(any(text in each for each in report["differences"]) for text in wanted), report["differences"]
    assert "ported, with differences" in (tmp_path / "out.report.html").read_text()


def test_float32_error_of_a_layer_is_seen(tmp_path: Path) -> None:
    """A layer that computes in float32 is not within BN-16 (dy and statistics are drawn, so its last bits are off)."""
    symbol, params, _ = small(tmp_path, fix_gamma="False")
    from multibn.port import load_params
    from multibn.port.symbol import read_symbol
    from multibn_torch.port.importer import read

    imported = read(read_symbol(symbol.read_text()), load_params(params), {"data": (2, 3, 8, 8)}, "torch")
    (bn,) = imported.batch_norms
    own: Any = imported.model.get_submodule("bn")
    ours = torch.nn.Module.__new__(_Float32)
    ours.__dict__.update(own.__dict__)
    proof = prove(bn, ours)
    assert proof.same_in_inference
    assert max(proof.training.values()) > 1
    assert differences({"batch_norms": [batch_norm(bn, "torch", proof, 0.1)], "check": None, "fold": None})


class _Float32(torch.nn.BatchNorm2d):
    """PyTorch's layer under another name, so that it is judged like ours."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SYMBOL", "PARAMS", "data:1,3"], "expected INPUT=SIZES once per input, such as data=1,3,112,112, got 'data:1,3'."),
        (["SYMBOL", "PARAMS", "data=1,0"], "expected INPUT=SIZES once per input, such as data=1,3,112,112, got 'data=1,0'."),
        (["SYMBOL", "PARAMS", "data=1,3", "data=1,3"],
         "expected INPUT=SIZES once per input, such as data=1,3,112,112, got 'data=1,3'."),
        (["SYMBOL", "PARAMS", "--layers", "gluon"], "--layers must be multibn or torch, got 'gluon'."),
        (["SYMBOL", "PARAMS", "--python", "x"], "--python is the interpreter that runs MXNet for --check. Give --check too."),
        (["SYMBOL", "PARAMS", "-o", "no/where"], "the folder no does not exist. Make it, or give another -o."),
        (["absent.json", "PARAMS"], "absent.json: No such file or directory."),
        (
            ["PARAMS", "SYMBOL"],
            "PARAMS holds arrays without a graph, and those say nothing of eps, fix_gamma or the order of layers. "
            "Give the -symbol.json file first; in MXNet, net.export writes both.",
        ),
        (["SYMBOL", "SYMBOL"], "SYMBOL is JSON, not arrays. Give the -symbol.json file first, then the .params file."),
        (["SYMBOL", "PARAMS", "--into", "nowhere:make"], "--into nowhere:make: ModuleNotFoundError: No module named 'nowhere'. "
         "Give MODULE:MAKE, a function that returns a model."),
        (["SYMBOL", "PARAMS", "--check", "--python", "/no/python"],
         "--python: /no/python cannot be started: No such file or directory."),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    symbol, params, _ = small(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    names = {"SYMBOL": str(symbol), "PARAMS": str(params)}
    done = port(*[names.get(each, each) for each in arguments])
    shown = done.output.replace(str(symbol), "SYMBOL").replace(str(params), "PARAMS")
    assert (shown, done.exit_code) == (f"multibn: {message}\n", 2)
    assert sorted(tmp_path.iterdir()) == before


def test_a_refusal_writes_nothing(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path, eps="0")
    before = sorted(tmp_path.iterdir())
    done = port(symbol, params, "-o", tmp_path / "out")
    assert (done.exit_code, done.output) == (
        2, f"multibn: {symbol} cannot be ported: BatchNorm 'bn': eps=0; it must be > 0 (BN-03), or a constant channel divides by "
        "zero.\n",
    )  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    symbol, params, _ = small(tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "out.report.html")

    monkeypatch.setattr(making, "_html", full)
    done = port(symbol, params, "-o", tmp_path / "out")
    assert (done.output, done.exit_code) == ("multibn: out.report.html: No space left on device.\n", 2)
    assert sorted(tmp_path.iterdir()) == before


def test_a_name_in_a_file_cannot_put_a_script_in_the_page(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    nodes = [
        node("null", "data"), *[node("null", f"{name}{each}") for each in ("gamma", "beta", "mean", "var")],
        node("BatchNorm", name, 0, 1, 2, 3, 4),
    ]  # fmt: skip
    symbol, params = write(
        tmp_path, symbol_text(nodes), values({f"{name}{each}": (3,) for each in ("gamma", "beta", "mean", "var")})
    )
    assert port(symbol, params, "data=2,3,4,4", "-o", tmp_path / "out").exit_code == 0
    page = (tmp_path / "out.report.html").read_text()
    assert name not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_network_without_batch_norm_is_ported(tmp_path: Path) -> None:
    symbol, params = write(tmp_path, symbol_text([node("null", "data"), node("Activation", "a", 0, act_type="relu")]), {})
    done = port(symbol, params, "data=1,2", "-o", tmp_path / "out")
    assert done.stdout.splitlines()[0] == "the same: 1 operators, 0 BatchNorms, 1 output"
    assert done.exit_code == 0


def test_mxnet_runs_beside(tmp_path: Path) -> None:
    mxnet()
    report = report_of(tmp_path, "--check", fix_gamma="False")
    assert report["check"]["by"] == "MXNet 1.9.1"
    assert report["check"]["inputs"] == ["standard normal values", "values uniform from 0 to 255"]
    (output,) = report["check"]["outputs"]
    assert output["name"] == "fc"
    assert max(output["errors"]) <= 1e-5
    assert report["batch_norms"][0]["measured"] <= 1e-5
    assert "MXNet 1.9.1 ran beside" in (tmp_path / "out.report.html").read_text()


def test_a_difference_from_mxnet_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mxnet()
    symbol, params, _ = small(tmp_path, fix_gamma="False")
    original: Any = vars(making)["read"]

    def spoiled(*arguments: Any) -> Any:
        imported = original(*arguments)
        imported.model.get_parameter("conv.weight").data *= 1.01
        return imported

    monkeypatch.setattr(making, "read", spoiled)
    done = port(symbol, params, "data=2,3,8,8", "-o", tmp_path / "out", "--check")
    assert done.exit_code == 1
    differs = json.loads((tmp_path / "out.report.json").read_text())["differences"]
    assert [each.split(" is ")[0].split(" gives ")[0] for each in differs] == ["Output fc", "BatchNorm bn"]


def test_without_mxnet_a_check_is_refused(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    done = port(symbol, params, "data=2,3,8,8", "-o", tmp_path / "out", "--check", "--python", python)
    assert (done.output, done.exit_code) == (
        "multibn: --check could not run the checkpoint in MXNet: MXNet is not installed there: pip install 'multibn[mxnet]', or "
        "give --python an interpreter that has it.\n",
        2,
    )


def test_the_page_needs_no_more_than_the_report(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    assert (tmp_path / "out.report.html").read_text() == render(report)
    assert "http" not in render(report).replace("http-equiv", "")


def test_without_torch_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    symbol, params, _ = small(tmp_path)
    monkeypatch.setitem(sys.modules, "multibn_torch.port.make", None)
    done = port(symbol, params)
    assert done.exit_code == 2
    assert done.output == "multibn: multibn port needs multibn_torch, which is not installed: pip install 'multibn[port]'\n"


def test_port_errors_are_wrong_calls() -> None:
    from multibn.usage import UsageError

    assert issubclass(PortError, UsageError)
