"""BatchNorms folded into the layer before them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from port_checkpoints import node, small, symbol_text, values
from typer.testing import CliRunner

from multibn.cli import app
from multibn.port.symbol import read_symbol
from multibn_torch.port.fold import fold
from multibn_torch.port.importer import read

SHAPES = {"data": (2, 4, 6, 6)}
X = {"data": torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))}


def with_norms(*layers: dict[str, Any], **shapes: tuple[int, ...]) -> Any:
    """A graph of layers, each followed by a BatchNorm of its output, imported; a layer has ``{name}_weight``, ``{name}_bias``."""
    nodes, arrays, last = [node("null", "data")], dict(shapes), 0
    for each in layers:
        name, inputs = each["name"], [last]
        for array in ("weight", "bias"):
            if f"{name}_{array}" in shapes:
                nodes.append(node("null", f"{name}_{array}"))
                inputs.append(len(nodes) - 1)
        nodes.append(node(each["op"], name, *inputs, **each["attrs"]))
        before = len(nodes) - 1
        for array in ("gamma", "beta", "moving_mean", "moving_var"):
            nodes.append(node("null", f"bn_{name}_{array}"))
            arrays[f"bn_{name}_{array}"] = (each["channels"],)
        nodes.append(node("BatchNorm", f"bn_{name}", before, *range(before + 1, before + 5), fix_gamma="False"))
        last = len(nodes) - 1
    return read(read_symbol(symbol_text(nodes)), values(arrays), SHAPES)


CONV = {"kernel": "(3, 3)", "num_filter": 6, "pad": "(1, 1)"}


LAYERS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "bias": ({"op": "Convolution", "attrs": CONV}, {"c_weight": (6, 4, 3, 3), "c_bias": (6,)}),
    "groups": ({"op": "Convolution", "attrs": CONV | {"no_bias": "True", "num_group": 2}}, {"c_weight": (6, 2, 3, 3)}),
    "transposed, groups": (
        {"op": "Deconvolution", "attrs": CONV | {"stride": "(2, 2)", "num_group": 2, "no_bias": "False"}},
        {"c_weight": (4, 3, 3, 3), "c_bias": (6,)},
    ),
    "dense": ({"op": "FullyConnected", "attrs": {"num_hidden": 6}}, {"c_weight": (6, 144), "c_bias": (6,)}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_takes_in_the_batch_norm_after_it(case: str) -> None:
    layer, shapes = LAYERS[case]
    imported = with_norms({"name": "c", "channels": 6} | layer, **shapes)
    model, told, states = fold(imported, X)
    assert [each["name"] for each in told["layers"]] == ["bn_c"]
    assert told["kept"] == []
    assert 0 < told["layers"][0]["error"] <= 2e-7
    assert told["outputs"] <= 1e-6
    assert not any("bn_c" in name for name in model.state_dict())
    assert set(states) == set(model.state_dict())
    exact = imported.model.double()(X["data"].double())
    torch.testing.assert_close(model.double()(X["data"].double()), exact, rtol=1e-6, atol=1e-6)
    assert len(imported.model.state_dict()) > len(model.state_dict())  # the original is as it was


def test_the_weights_are_rounded_once() -> None:
    imported = with_norms(
        {"op": "Convolution", "name": "c", "attrs": CONV | {"no_bias": "True"}, "channels": 6}, c_weight=(6, 4, 3, 3)
    )
    model, _, _ = fold(imported, X)
    (bn,) = imported.batch_norms
    weight, (_, beta, mean, _) = imported.arrays["c_weight"].astype("f8"), bn.arrays
    wanted = (weight * bn.gain.reshape(-1, 1, 1, 1)).astype("f4")
    np.testing.assert_array_equal(model.get_parameter("c.weight").detach().numpy(), wanted)
    np.testing.assert_array_equal(
        model.get_parameter("c.bias").detach().numpy(), (beta.astype("f8") - mean.astype("f8") * bn.gain).astype("f4")
    )


def test_what_cannot_be_folded_is_kept_and_says_why() -> None:
    arrays = values({"w_weight": (4, 4, 1, 1), **{f"{b}_{a}": (4,) for b in "pqrs" for a in ("g", "beta", "mean", "var")}})
    nodes = [node("null", "data"), node("null", "w_weight")]
    at = {}
    for norm_name in "pqrs":
        for array in ("g", "beta", "mean", "var"):
            nodes.append(node("null", f"{norm_name}_{array}"))
            at[f"{norm_name}_{array}"] = len(nodes) - 1

    def norm(b: str, x: int) -> int:
        nodes.append(node("BatchNorm", b, x, *[at[f"{b}_{a}"] for a in ("g", "beta", "mean", "var")]))
        return len(nodes) - 1

    def conv(name: str, x: int) -> int:
        nodes.append(node("Convolution", name, x, 1, kernel="(1, 1)", num_filter=4, no_bias="True"))
        return len(nodes) - 1

    first = norm("p", 0)  # of the input
    a = conv("a", first)
    shared = norm("q", a)  # its weight is another's too
    b = conv("b", shared)
    both = norm("r", b)
    nodes.append(node("Activation", "act", b, act_type="relu"))
    last = norm("s", len(nodes) - 1)
    imported = read(read_symbol(symbol_text(nodes, both, last)), arrays, SHAPES)
    _, told, _ = fold(imported, X)
    assert told["layers"] == []
    assert told["outputs"] == 0
    assert {each["name"]: each["reason"] for each in told["kept"]} == {
        "p": "it follows data, not a convolution or dense layer",
        "q": "a shares its arrays with another layer",
        "r": "the output of b goes elsewhere too",
        "s": "it follows ReLU, not a convolution or dense layer",
    }


def test_the_command_folds(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path, fix_gamma="False")
    done = CliRunner().invoke(app, ["port", str(symbol), str(params), "data=2,3,8,8", "-o", str(tmp_path / "out"), "--fold"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert [(each["name"], each["into"]) for each in report["fold"]["layers"]] == [("bn", "conv")]
    assert report["states"] == {
        "conv.weight": "conv_weight folded with bn", "conv.bias": "no bias folded with bn",
        "fc.weight": "fc_weight", "fc.bias": "fc_bias",
    }  # fmt: skip
    assert set(torch.load(tmp_path / "out.pt")) == set(report["states"])
    folded, original = (
        torch.export.load(str(tmp_path / "out.pt2")).module(),
        read(read_symbol(symbol.read_text()), dict(small(tmp_path, fix_gamma="False")[2]), {"data": (2, 3, 8, 8)}).model,
    )
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(x), original(x), rtol=1e-5, atol=1e-5)
    assert "The folded network is for inference." in (tmp_path / "out.report.html").read_text()


def test_a_batch_norm_that_is_called_twice_is_kept() -> None:
    names = ("g", "beta", "mean", "var")
    nodes = [
        node("null", "data"), node("null", "w_weight"), *[node("null", name) for name in names],
        node("Convolution", "a", 0, 1, kernel="(1, 1)", num_filter=4, no_bias="True"), node("BatchNorm", "n", 6, 2, 3, 4, 5),
        node("BatchNorm", "m", 7, 2, 3, 4, 5),
    ]  # fmt: skip
    arrays = values({"w_weight": (4, 4, 1, 1), **dict.fromkeys(names, (4,))})
    _, told, _ = fold(read(read_symbol(symbol_text(nodes)), arrays, SHAPES), X)
    assert told["layers"] == []
    assert [each["reason"] for each in told["kept"]] == [
        "one of the two layers is called more than once", "it follows BatchNorm2d, not a convolution or dense layer",
    ]  # fmt: skip
