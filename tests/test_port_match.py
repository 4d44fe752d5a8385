"""States of two models are matched by their graphs, or refused where that is not certain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from port_checkpoints import mxnet, node, small, symbol_text, values
from torch import nn
from typer.testing import CliRunner

from multibn.cli import app
from multibn.port import PortError, load_params
from multibn.port.symbol import read_symbol
from multibn_torch import from_mxnet
from multibn_torch.port import to_mxnet
from multibn_torch.port.match import fill, match

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """The network of ``small`` with other names, another order and other spelling."""

    def __init__(
        self, eps: float = 1e-3, classes: int = 5, act: Any = nn.ReLU, momentum: float = 0.1, more: bool = False
    ) -> None:
        super().__init__()
        self.head = nn.Linear(4, classes)
        self.norm = nn.BatchNorm2d(4, eps, momentum)
        self.stem = nn.Conv2d(3, 4, 3, padding="same", bias=False) if False else nn.Conv2d(3, 4, (3, 3), 1, 1, bias=False)
        self.act, self.drop = act(), nn.Dropout(0.5)
        if more:
            self.unused = nn.Linear(2, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.drop(self.act(self.norm(self.stem(x))).mean((2, 3))))


def make() -> Small:
    return Small()


def make_other() -> Small:
    return Small(eps=1e-5)


def make_nothing() -> None:
    return None


def trained(model: nn.Module) -> nn.Module:
    """Return the model with other values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, each in model.state_dict().items():
            if each.is_floating_point():
                each.copy_(torch.rand(each.shape, generator=generator) + (0.1 if name.endswith("var") else -0.3))
    return model


def state(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_model_written_differently_is_filled(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path, fix_gamma="False")
    source, target = from_mxnet(symbol, params), trained(Small()).train()
    found, apart = fill(target, source, [X])
    assert found.pairs == {
        "head.weight": "fc.weight", "head.bias": "fc.bias", "norm.weight": "bn.weight", "norm.bias": "bn.bias",
        "norm.running_mean": "bn.running_mean", "norm.running_var": "bn.running_var", "stem.weight": "conv.weight",
    }  # fmt: skip
    assert apart <= 1e-12
    assert target.training
    torch.testing.assert_close(target.eval()(X), source(X))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(
            {"eps": 1e-5}, "batch_norm (bn.weight) and batch_norm (norm.weight) differ: eps=0.001 against 1e-05.", id="eps"
        ),
        pytest.param({"act": nn.GELU}, "relu and gelu differ: relu against gelu.", id="activation"),
        pytest.param({"classes": 6}, "fc.weight has shape (5, 4), head.weight has shape (6, 4).", id="classes"),
        pytest.param(
            {"more": True}, "2 states of the target take no part in its outputs: unused.weight, unused.bias.", id="unused"
        ),
    ],
)
def test_what_is_not_the_same_is_refused_and_nothing_changes(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    symbol, params, _ = small(tmp_path, fix_gamma="False")
    target = Small(**other)
    before = state(target)
    with pytest.raises(PortError) as error:
        fill(target, from_mxnet(symbol, params), [X])
    assert str(error.value) == message
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_another_momentum_is_noted(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path, fix_gamma="False")
    found = match(from_mxnet(symbol, params, layers="torch"), Small(momentum=0.3), [X])
    assert found.notes == ["momentum: 0.1 at bn.weight, 0.3 at norm.weight; it counts in training alone."]


class Two(nn.Module):
    """Two branches of the same shape, called in either order, concatenated or added."""

    def __init__(self, first: str, add: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.first, self.add = first, add

    def forward(self, x: Any) -> Any:
        if self.first == "a":
            a, b = self.a(x), self.b(x)
        else:
            b, a = self.b(x), self.a(x)
        return a + b if self.add else torch.cat([a, b], 1)


def test_branches_are_told_apart_by_where_they_go_not_by_their_order() -> None:
    found = match(Two("a", add=False), Two("b", add=False), [X])
    assert all(target == source for target, source in found.pairs.items())
    assert len(found.pairs) == 4


def test_branches_that_nothing_tells_apart_are_refused() -> None:
    with pytest.raises(PortError) as error:
        match(Two("a", add=True), Two("b", add=True), [X])
    assert str(error.value) == (
        "the operands of add look the same down to the inputs, so nothing says which is which: a.weight and b.weight."
    )


class Told(Two):
    """The same, with one branch as an additional output, which tells them apart."""

    def forward(self, x: Any) -> Any:
        return self.a(x) + self.b(x), self.a(x)


def test_what_another_output_tells_apart_is_matched() -> None:
    found = match(Told("a", add=True), Told("b", add=True), [X])
    assert found.pairs == {f"{each}.{part}": f"{each}.{part}" for each in "ab" for part in ("weight", "bias")}


class Residual(nn.Module):
    """x + f(x) or f(x) + x, scaled by a constant."""

    def __init__(self, swapped: bool, scale: float = 2.0) -> None:
        super().__init__()
        self.f, self.swapped, self.scale = nn.Conv2d(3, 3, 1), swapped, scale

    def forward(self, x: Any) -> Any:
        return self.scale * (self.f(x) + x if self.swapped else x + self.f(x))


def test_operands_that_look_different_may_be_exchanged() -> None:
    assert match(Residual(False), Residual(True), [X]).pairs == {"f.weight": "f.weight", "f.bias": "f.bias"}


def test_a_constant_is_compared() -> None:
    with pytest.raises(PortError, match=r"^mul and mul differ: other=2\.0 against 3\.0\.$"):
        match(Residual(False), Residual(True, 3.0), [X])


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Undecided(nn.Module):
        def forward(self, x: Any) -> Any:
            return x if x.sum() > 0 else -x

    with pytest.raises(PortError, match=r"^the target cannot be traced by torch\.export: "):
        match(Residual(False), Undecided(), [X])


def command(folder: Path, into: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    symbol, params, _ = small(folder)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return CliRunner().invoke(app, ["port", str(symbol), str(params), "data=2,3,8,8", "-o", str(folder / "out"), "--into", into])


def test_the_command_fills_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command(tmp_path, "test_port_match:make", monkeypatch)
    assert done.exit_code == 0, done.output
    model = Small()
    model.load_state_dict(torch.load(tmp_path / "out.into.pt"))
    wanted = from_mxnet(tmp_path / "small-symbol.json", tmp_path / "small-0000.params")
    torch.testing.assert_close(model.eval()(X), wanted(X))
    assert (model.norm.weight == 1).all()
    page = (tmp_path / "out.report.html").read_text()
    assert "norm.weight is 1, as fix_gamma of bn asks, and learns in your model; in MXNet it did not." in page


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ("test_port_match:make_other", "batch_norm (bn.weight) and batch_norm (norm.weight) differ: eps=0.001 against 1e-05."),
        ("test_port_match:make_nothing", "--into test_port_match:make_nothing: it returned NoneType, not a torch.nn.Module."),
        (
            "test_port_match:make_what",
            f"--into test_port_match:make_what: AttributeError: module '{__name__}' has no attribute 'make_what'. "
            "Give MODULE:MAKE, a function that returns a model.",
        ),
    ],
)
def test_the_command_refuses_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, into: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, "test_port_match", sys.modules[__name__])
    done = command(tmp_path, into, monkeypatch)
    assert (done.exit_code, done.output) == (2, f"multibn: {message}\n")
    assert not list(tmp_path.glob("out*"))


def test_a_torch_model_becomes_arrays_of_a_graph(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path, fix_gamma="False")
    model = trained(Small()).eval()
    filled = to_mxnet(model, read_symbol(symbol.read_text()), load_params(params), {"data": tuple(X.shape)})
    assert list(filled) == list(load_params(params))
    assert filled.layouts == load_params(params).layouts
    torch.testing.assert_close(from_mxnet(symbol, filled)(X), model(X))
    assert (load_params(params)["arg:fc_bias"] != filled["arg:fc_bias"]).all()


def test_a_gamma_that_mxnet_would_ignore_is_refused(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path)
    with pytest.raises(PortError) as error:
        to_mxnet(trained(Small()), read_symbol(symbol.read_text()), load_params(params), {"data": tuple(X.shape)})
    assert str(error.value) == (
        "norm.weight is not 1 everywhere, and BatchNorm 'bn' has fix_gamma=True, which ignores it. Build the network with "
        "scale=True (fix_gamma=False)."
    )


def test_values_that_an_array_cannot_hold_are_refused(tmp_path: Path) -> None:
    symbol, params, _ = small(tmp_path, fix_gamma="False")
    half = {name: array.astype(np.float16) for name, array in load_params(params).items()}
    with pytest.raises(PortError, match=r"^arg:conv_weight has type float16, which does not hold the values of stem\.weight\.$"):
        to_mxnet(trained(Small()), read_symbol(symbol.read_text()), half, {"data": tuple(X.shape)})


def test_a_gluon_network_gets_a_torch_models_values() -> None:
    mx = mxnet()
    from multibn_mxnet.port import from_torch

    net = mx.gluon.nn.HybridSequential()
    net.add(
        mx.gluon.nn.Conv2D(4, 3, padding=1, use_bias=False), mx.gluon.nn.BatchNorm(epsilon=1e-3), mx.gluon.nn.Activation("relu"),
        mx.gluon.nn.GlobalAvgPool2D(), mx.gluon.nn.Dense(5),
    )  # fmt: skip
    net.initialize()
    model, x = trained(Small()).eval(), X.numpy()
    before = from_torch(net, model, x)
    with torch.no_grad():
        wanted = model(X).numpy()
    assert len(before) == 7
    assert np.abs(net(mx.nd.array(x)).asnumpy() - wanted).max() <= 1e-5 * np.abs(wanted).max()
    state = {name: parameter.data().asnumpy() for name, parameter in net.collect_params().items()}
    with pytest.raises(PortError, match=r"differ: eps=1e-05 against 0\.001\.$"):
        from_torch(net, trained(make_other()), x)
    assert all((parameter.data().asnumpy() == state[name]).all() for name, parameter in net.collect_params().items())


def test_a_shared_parameter_takes_part_once() -> None:
    nodes = [
        node("null", "data"), node("null", "w_weight"),
        node("Convolution", "a", 0, 1, kernel="(1, 1)", num_filter=3, no_bias="True"),
        node("Convolution", "b", 2, 1, kernel="(1, 1)", num_filter=3, no_bias="True"),
    ]  # fmt: skip

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x: Any) -> Any:
            return self.one(self.one(x))

    arrays = values({"w_weight": (3, 3, 1, 1)})
    from multibn_torch.port.importer import read

    source = read(read_symbol(symbol_text(nodes)), arrays, {"data": tuple(X.shape)}).model
    target = Tied()
    fill(target, source, [X])
    np.testing.assert_array_equal(target.one.weight.detach().numpy(), arrays["w_weight"])
