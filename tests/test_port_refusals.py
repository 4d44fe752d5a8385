"""What cannot be ported is refused in one error that names each item and says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from port_checkpoints import node, small, symbol_text, values, write

from multibn.port import PortError
from multibn.port.operators import calls
from multibn.port.symbol import read_symbol
from multibn_torch import from_mxnet
from multibn_torch.port.importer import read

INPUT = {"data": (2, 3, 8, 8)}
Edit = Callable[[dict[str, Any]], Any]


def cases(name: str, given: dict[str, tuple[Any, str]]) -> pytest.MarkDecorator:
    """A parameter and the whole message for each case."""
    return pytest.mark.parametrize((name, "message"), [pytest.param(*its, id=case) for case, its in given.items()])


def refused(symbol: Path, params: Path | dict[str, Any], shapes: Any = INPUT) -> str:
    with pytest.raises(PortError) as error:
        from_mxnet(symbol, params, shapes)
    return str(error.value).replace(str(symbol), "SYMBOL").replace(str(params), "PARAMS")


@cases(
    "attributes",
    {
        "axis": ({"axis": -1}, "axis=-1; in PyTorch the channels are on axis 1."),
        "axis 2": ({"axis": 2}, "axis=2; in PyTorch the channels are on axis 1."),
        "eps": ({"eps": "0"}, "eps=0; it must be > 0 (BN-03), or a constant channel divides by zero."),
        "negative eps": ({"eps": "-1e-3"}, "eps=-0.001; it must be > 0 (BN-03), or a constant channel divides by zero."),
        "momentum": ({"momentum": "1.5"}, "momentum=1.5; it must be 0 to 1, the weight of the old value (BN-05)."),
        "negative momentum": ({"momentum": "-0.1"}, "momentum=-0.1; it must be 0 to 1, the weight of the old value (BN-05)."),
    },
)
def test_a_batch_norm_that_pytorch_cannot_be(tmp_path: Path, attributes: dict[str, Any], message: str) -> None:
    symbol, params, _ = small(tmp_path, **attributes)
    assert refused(symbol, params) == f"SYMBOL cannot be ported: BatchNorm 'bn': {message}"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_momentum_of_0_and_of_1_is_allowed(tmp_path: Path, value: float) -> None:
    symbol, params, arrays = small(tmp_path, momentum=value)
    layer: Any = from_mxnet(symbol, params).get_submodule("bn")
    assert layer.momentum == 1 - value
    layer.train()(torch.ones(2, 4, 3, 3) * 7)
    wanted = np.full(4, 7) if value == 0 else arrays["bn_moving_mean"]
    np.testing.assert_array_equal(layer.running_mean.numpy(), wanted)


@cases("edit", {
        "negative": (
            lambda a: a["bn_moving_var"].__setitem__(1, -1e-9),
            "SYMBOL cannot be ported: BatchNorm 'bn': bn_moving_var holds a negative variance, -1e-09.",
        ),
        "NaN": (
            lambda a: a["bn_moving_var"].__setitem__(1, np.nan),
            "SYMBOL: the arrays cannot be ported: the array 'bn_moving_var' holds NaN or Inf.",
        ),
        "Inf": (
            lambda a: a["bn_gamma"].__setitem__(1, np.inf),
            "SYMBOL: the arrays cannot be ported: the array 'bn_gamma' holds NaN or Inf.",
        ),
        "missing": (
            lambda a: a.pop("bn_gamma"),
            "SYMBOL: graph and arrays do not belong together: the array 'bn_gamma' is missing.",
        ),
        "missing and unused": (
            lambda a: a.update(x=a.pop("bn_gamma"), y=a.pop("fc_bias")),
            "SYMBOL: graph and arrays do not belong together: 4 problems:\n  the array 'bn_gamma' is missing.\n"
            "  the array 'fc_bias' is missing.\n  the array 'x' is not used by the graph.\n"
            "  the array 'y' is not used by the graph.",
        ),
        "short": (
            lambda a: a.update(bn_beta=np.ones(3, "f4")),
            "SYMBOL cannot be ported: BatchNorm 'bn': its arrays must have one value per channel, got bn_gamma (4,), "
            "bn_beta (3,), bn_moving_mean (4,), bn_moving_var (4,).",
        ),
        "all short": (
            lambda a: a.update({name: value[:3] for name, value in a.items() if name.startswith("bn_")}),
            "SYMBOL cannot be ported: BatchNorm 'bn': its arrays have 3 values, its input 4 channels.",
        ),
        "misshapen": (
            lambda a: a.update(conv_weight=a["conv_weight"][:, :2]),
            "SYMBOL cannot be ported: Convolution 'conv': 'conv_weight' has shape (4, 2, 3, 3); its attributes and its input ask "
            "for (4, 3, 3, 3).",
        ),
        "float64": (
            lambda a: a.update(fc_bias=a["fc_bias"].astype("f8") + 1e-12),
            "SYMBOL: the arrays cannot be ported: the array 'fc_bias' has type float64 and values that float32 does not hold.",
        ),
        "integers": (
            lambda a: a.update(fc_bias=np.ones(5, "i4")),
            "SYMBOL: the arrays cannot be ported: the array 'fc_bias' has type int32; floating point is ported.",
        ),
        "of save_parameters": (
            lambda a: a.update({"features.0.weight": a.pop("conv_weight")}),
            "SYMBOL: the file's names, such as 'features.0.weight', are those of save_parameters, and the graph's are not, such "
            "as 'conv_weight'. Their order proves nothing. In MXNet: net.load_parameters(...), net.export(...); port that.",
        ),
})  # fmt: skip
def test_arrays_that_do_not_belong_there(tmp_path: Path, edit: Edit, message: str) -> None:
    symbol, _, arrays = small(tmp_path)
    edit(arrays)
    assert refused(symbol, arrays) == message


def test_float16_and_exact_float64_are_taken(tmp_path: Path) -> None:
    symbol, _, arrays = small(tmp_path)
    half = {name: array.astype("f2") for name, array in arrays.items()}
    model = from_mxnet(symbol, half | {"fc_bias": half["fc_bias"].astype("f8")}, INPUT)
    np.testing.assert_array_equal(model.get_parameter("fc.bias").detach().numpy(), half["fc_bias"].astype("f4"))


def edited(tmp_path: Path, edit: Edit) -> str:
    symbol, params, _ = small(tmp_path)
    graph = json.loads(symbol.read_text())
    edit(graph)
    symbol.write_text(json.dumps(graph))
    return refused(symbol, params)


def attribute(name: str, **new: str) -> Edit:
    return lambda graph: next(each for each in graph["nodes"] if each["name"] == name).setdefault("attrs", {}).update(new)


@cases("edit", {
        "operator": (
            lambda g: g["nodes"][8].update(op="Correlation"),
            "SYMBOL cannot be ported: Correlation 'relu': the operator is not known.",
        ),
        "attribute": (
            attribute("bn", wobble="3"), "SYMBOL cannot be ported: BatchNorm 'bn': the attribute wobble='3' is not known.",
        ),
        "random": (
            lambda g: g["nodes"][8].update(op="LeakyReLU", attrs={"act_type": "rrelu"}),
            "SYMBOL cannot be ported: LeakyReLU 'relu': act_type=rrelu cannot be ported; leaky, elu, prelu, selu, gelu can.",
        ),
        "unreadable": (attribute("bn", eps="small"), "SYMBOL cannot be ported: BatchNorm 'bn': eps='small' cannot be read."),
        "NaN": (attribute("bn", eps="nan"), "SYMBOL cannot be ported: BatchNorm 'bn': eps='nan' cannot be read."),
        "statistics as outputs": (
            attribute("bn", output_mean_var="True"),
            "SYMBOL cannot be ported: BatchNorm 'bn': output_mean_var=True cannot be ported; False can.",
        ),
        "layout": (
            attribute("conv", layout="NHWC"),
            "SYMBOL cannot be ported: Convolution 'conv': layout=NHWC cannot be ported; NCHW, NCW, NCDHW can.",
        ),
        "everything at once": (
            lambda g: [
                attribute("conv", wobble="1")(g), attribute("pool", pooling_convention="same")(g),
                attribute("relu", act_type="swish")(g),
                g["nodes"][12].update(op="RNN"),
            ],
            "SYMBOL cannot be ported: 4 problems:\n  Convolution 'conv': the attribute wobble='1' is not known.\n"
            "  Activation 'relu': act_type=swish cannot be ported; relu, sigmoid, tanh, softrelu, softsign can.\n"
            "  Pooling 'pool': pooling_convention=same cannot be ported; valid, full can.\n"
            "  RNN 'fc': the operator is not known.",
        ),
        "missing attribute": (
            lambda g: g["nodes"][12].update(attrs={}),
            "SYMBOL cannot be ported: FullyConnected 'fc': the attribute num_hidden is missing.",
        ),
        "inputs": (
            lambda g: g["nodes"][12]["inputs"].pop(),
            "SYMBOL cannot be ported: FullyConnected 'fc': it has 2 inputs, its attributes ask for 3.",
        ),
        "second output": (
            lambda g: g["nodes"][8]["inputs"][0].__setitem__(1, 1),
            "SYMBOL cannot be ported: Activation 'relu' takes output 1 of BatchNorm 'bn', which is not ported.",
        ),
        "computed weight": (
            lambda g: g["nodes"][12]["inputs"][1].__setitem__(0, 9),
            "SYMBOL: graph and arrays do not belong together: 2 problems:\n  the array 'pool' is missing.\n"
            "  the array 'fc_weight' is not used by the graph.",
        ),
        "no outputs": (
            lambda g: g.update(heads=[]),
            "SYMBOL is no graph of MXNet: it has no outputs. Give the -symbol.json file of the network.",
        ),
        "backwards": (
            lambda g: g["nodes"][2]["inputs"][0].__setitem__(0, 5),
            "SYMBOL is no graph of MXNet: [5, 0, 0] refers to a node that does not come before. "
            "Give the -symbol.json file of the network.",
        ),
        "no nodes": (
            lambda g: g.pop("nodes"),
            "SYMBOL is no graph of MXNet: it has no list of nodes. Give the -symbol.json file of the network.",
        ),
        "huge": (
            attribute("conv", pad="(99999, 99999)"),
            "SYMBOL cannot be ported: Convolution 'conv': it has a result of shape (2, 4, 200004, 200004); a tensor of 1 to "
            "268435456 values was expected.",
        ),
        "does not fit": (
            attribute("conv", kernel="(3, 3, 3)"),
            "SYMBOL cannot be ported: Convolution 'conv': kernel=(3, 3, 3) does not fit input of shape (2, 3, 8, 8).",
        ),
})  # fmt: skip
def test_graphs_that_cannot_be_ported(tmp_path: Path, edit: Edit, message: str) -> None:
    assert edited(tmp_path, edit) == message


def test_texts_that_are_no_graph(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path)
    symbol.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:97\nsize 1\n")
    assert refused(symbol, params) == "SYMBOL is a Git LFS pointer, not the graph itself. Run `git lfs pull` in its repository."
    symbol.write_text("hello")
    assert refused(symbol, params) == (
        "SYMBOL is not JSON: Expecting value: line 1 column 1 (char 0). Give the -symbol.json file of the network."
    )
    symbol.write_text("[" * 100_000)
    assert refused(symbol, params).startswith("SYMBOL is not JSON: maximum recursion depth exceeded")


def test_shapes_are_asked_for(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path)
    assert refused(symbol, params, {"image": (1, 3, 8, 8)}) == (
        "SYMBOL: the inputs are data; shapes were given for image. Give a shape for each input, such as data=1,3,224,224."
    )
    assert (
        refused(symbol, params, {"data": (1, 3, 0, 8)})
        == "SYMBOL: the shape of data must have sizes of 1 and more, got (1, 3, 0, 8)."
    )
    assert refused(symbol, params, {"data": (1, 4, 8, 8)}) == (
        "SYMBOL cannot be ported: Convolution 'conv': 'conv_weight' has shape (4, 3, 3, 3); its attributes and its input ask "
        "for (4, 4, 3, 3)."
    )
    assert from_mxnet(symbol, params)(torch.zeros(1, 3, 20, 30)).shape == (1, 5)


def test_unknown_layers_are_refused(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path)
    with pytest.raises(ValueError, match=r"^layers must be 'multibn' or 'torch', got 'gluon'\.$"):
        from_mxnet(symbol, params, layers="gluon")  # type: ignore[arg-type]


def norms(*arrays: tuple[str, str, str, str], attributes: tuple[dict[str, str], ...] = ({}, {})) -> str:
    """Make two consecutive BatchNorms with arrays of these names."""
    names = list(dict.fromkeys(name for each in arrays for name in each))
    nodes = [node("null", "data"), *[node("null", name) for name in names]]
    last = 0
    for i, each in enumerate(arrays):
        nodes.append(node("BatchNorm", f"bn{i}", last, *[1 + names.index(name) for name in each], **attributes[i]))
        last = len(nodes) - 1
    return symbol_text(nodes)


def test_a_batch_norm_used_twice_is_one_module(tmp_path: Path) -> None:
    its = ("gamma", "beta", "moving_mean", "moving_var")
    arrays = values(dict.fromkeys(its, (3,)))
    model: Any = read(read_symbol(norms(its, its)), arrays, INPUT).model
    assert [name for name, _ in model.named_children()] == ["bn0"]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), model.bn0(model.bn0(x)))
    model.train()(x)
    assert int(model.bn0.num_batches_tracked) == 2


def test_batch_norms_that_share_a_part_are_refused() -> None:
    first, second = ("gamma", "beta", "moving_mean", "moving_var"), ("gamma", "b2_beta", "b2_moving_mean", "b2_moving_var")
    arrays = values(dict.fromkeys([*first, *second], (3,)))
    with pytest.raises(PortError) as error:
        read(read_symbol(norms(first, second)), arrays, INPUT)
    assert str(error.value) == (
        "the symbol cannot be ported: BatchNorm 'bn1': it shares arrays with BatchNorm 'bn0', but not all of them in the same "
        "way."
    )
    with pytest.raises(PortError, match="it shares arrays with BatchNorm 'bn0', but not all of them in the same way"):
        read(read_symbol(norms(first, first, attributes=({}, {"eps": "1e-5"}))), values(dict.fromkeys(first, (3,))), INPUT)


def test_a_shared_weight_is_one_parameter() -> None:
    nodes = [
        node("null", "data"), node("null", "w_weight"),
        node("Convolution", "a", 0, 1, kernel="(1, 1)", num_filter=3, no_bias="True"),
        node("Convolution", "b", 2, 1, kernel="(1, 1)", num_filter=3, no_bias="True"),
    ]  # fmt: skip
    model: Any = read(read_symbol(symbol_text(nodes)), values({"w_weight": (3, 3, 1, 1)}), INPUT).model
    assert model.a.weight is model.b.weight
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    assert len(list(model.parameters())) == 1
    nodes[3] = node("FullyConnected", "b", 2, 1, num_hidden=3, no_bias="True")
    with pytest.raises(PortError, match=r"'w_weight' has shape \(3, 3, 1, 1\); its attributes and its input ask for \(3, 192\)"):
        read(read_symbol(symbol_text(nodes)), values({"w_weight": (3, 3, 1, 1)}), INPUT)


def test_statistics_used_elsewhere_are_refused() -> None:
    its = ("gamma", "beta", "moving_mean", "moving_var")
    graph = json.loads(norms(its))
    graph["nodes"].append(node("Activation", "relu", 3, act_type="relu"))
    graph["heads"] = [[5, 0, 0], [6, 0, 0]]
    with pytest.raises(PortError) as error:
        read(read_symbol(json.dumps(graph)), values(dict.fromkeys(its, (3,))), INPUT)
    assert str(error.value) == (
        "the symbol cannot be ported: Activation 'relu': 'moving_mean' is a moving statistic of BatchNorm 'bn0', and used "
        "elsewhere too."
    )


def test_old_files_are_read_as_new_ones(tmp_path: Path) -> None:
    symbol, _, arrays = small(tmp_path, eps="1e-5", fix_gamma="False")
    new = read(read_symbol(symbol.read_text()), arrays, INPUT)
    for key in ("attr", "param"):
        graph = json.loads(symbol.read_text())
        del graph["attrs"]
        for each in graph["nodes"]:
            if "attrs" in each:
                each[key] = each.pop("attrs") | {"weight_lr_mult": "2", "ctx_group": "a"}
            each["inputs"] = [reference[:2] for reference in each["inputs"]]
            if each["op"] == "BatchNorm":
                del each["inputs"][3:]  # the moving statistics were no inputs
        old = read(read_symbol(json.dumps(graph)), arrays, INPUT)
        assert [bn.facts() for bn in old.batch_norms] == [bn.facts() for bn in new.batch_norms]
        assert all((a == b).all() for a, b in zip(old.model.state_dict().values(), new.model.state_dict().values(), strict=True))


def test_what_the_outputs_do_not_need_is_not_looked_at() -> None:
    nodes = [node("null", "data"), node("Unheard", "of", 0), node("Activation", "relu", 0, act_type="relu")]
    assert [call.op for call in calls(read_symbol(symbol_text(nodes)))] == ["Activation"]


def test_names_that_python_does_not_take_are_changed(tmp_path: Path) -> None:
    names = ("0conv-1/bn_gamma", "train", "forward", "graph")
    nodes = [node("null", "x.y"), *[node("null", name) for name in names], node("BatchNorm", "add_module", 0, 1, 2, 3, 4)]
    arrays = values(dict.fromkeys(names, (3,))) | {"graph": np.ones(3, "f4")}
    symbol, params = write(tmp_path, symbol_text(nodes), arrays)
    model = from_mxnet(symbol, params, {"x.y": (2, 3, 4, 4)})
    assert sorted(model.state_dict()) == [
        f"add_module_.{name}" for name in ("bias", "num_batches_tracked", "running_mean", "running_var", "weight")
    ]
