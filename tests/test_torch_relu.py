"""A ReLU fused into the layer: the same bits as a layer followed by a ReLU, in eager, compiled and transformed programs."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.utils.checkpoint import checkpoint

import multibn_torch as ours
from multibn_torch.forward.eager import PARAMETER
from multibn_torch.swap import ReLU, swap

nn = torch.nn


def net(channels: int, inplace: bool = True) -> Any:
    torch.manual_seed(0)
    layer = ours.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.uniform_(-1, 1)
        layer.bias.uniform_(-1, 1)
    return nn.Sequential(layer, nn.ReLU(inplace))


def fused(model: Any) -> Any:
    model = copy.deepcopy(model)
    model[0].__class__ = nn.BatchNorm2d
    swap(model, fuse_relu=True)
    return model


def results(model: Any, x: Any, dy: Any) -> list[Any]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    layer = model[0]
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(8, 16, 4, 4), (70, 3, 37, 39), (8, 64, 14, 14), (5, 2, 20, 110), (100, 3, 2, 1), (8, 300, 7, 7)], ids=str
)
def test_same_bits_as_a_relu_after_it(shape: Any, dtype: Any, training: bool) -> None:
    two = net(shape[1]).to(PARAMETER[dtype]).train(training)
    one = fused(two)
    assert one[0].fuse_relu
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for a, b in zip(results(two, x, dy), results(one, x, dy), strict=True):
        assert torch.equal(a, b)


def test_nan_stays_and_zero_has_no_gradient() -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, float("nan")]]).view(2, 2, 1, 1)
    two = net(2).eval()
    with torch.no_grad():
        two[0].bias.zero_()
        two[0].weight.fill_(1.0)
    for a, b in zip(results(two, x, torch.ones_like(x)), results(fused(two), x, torch.ones_like(x)), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_channels_have_no_gradient_where_y_is_0(dtype: Any) -> None:
    """Train with rows long enough for the vectorised loops."""
    two = net(16).to(dtype)
    with torch.no_grad():
        two[0].bias.zero_()
    one, x, dy = fused(two), torch.full((9, 16, 8, 8), 3.0, dtype=dtype), torch.randn(9, 16, 8, 8, dtype=dtype)
    for a, b in zip(results(two, x, dy), results(one, x, dy), strict=True):
        assert torch.equal(a, b)


def test_values_that_vanish_in_the_type_of_y_have_no_gradient() -> None:
    """y is nonzero in float64 and rounds to 0."""
    two = net(1).eval()
    with torch.no_grad():
        two[0].bias.zero_()
        two[0].weight.fill_(2.0**-149)
    x = torch.tensor([0.4, 0.6, 1.0, -1.0]).view(4, 1, 1, 1)
    for a, b in zip(results(two, x, torch.ones_like(x)), results(fused(two), x, torch.ones_like(x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("affine", [True, False])
def test_second_derivatives(affine: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, affine=affine, dtype=torch.float64), nn.ReLU())
    swap(model, fuse_relu=True)
    torch.manual_seed(1)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    model[0].momentum = 0.0
    assert torch.autograd.gradcheck(model, x)
    assert torch.autograd.gradgradcheck(model, x)


def test_other_ways_than_the_kernel_rectify_too() -> None:
    one = fused(net(3))
    x = torch.randn(4, 3, 5, 5)
    y = copy.deepcopy(one)(x)
    assert y.min() == 0
    mapped = torch.func.functional_call(copy.deepcopy(one), {}, (x,))
    compiled = torch.compile(copy.deepcopy(one), fullgraph=True, backend="eager")(x)
    traced = torch.fx.symbolic_trace(copy.deepcopy(one))(x)
    own = copy.deepcopy(one)
    own[0].implementation = "framework"
    for other in (mapped, compiled, traced):
        assert torch.equal(y, other)
    torch.testing.assert_close(own(x), y)
    mask = torch.ones(4, 5, 5, dtype=torch.bool)
    assert torch.equal(copy.deepcopy(one)[0](x, mask=mask).relu(), y)
    alone = copy.deepcopy(one)[0]
    alone.fused_in = ()  # as a program that sets fuse_relu itself has it
    assert torch.equal(alone(x, mask=mask), y)
    assert torch.equal(alone(x), alone(x).relu())


def test_the_relu_has_nothing_left_to_do() -> None:
    one, seen = fused(net(3, inplace=False)), []
    one[1].register_forward_hook(lambda module, given, y: seen.append((*given, y)))
    one(torch.randn(4, 3, 5, 5))
    ((given, y),) = seen
    assert given is y
    assert y.min() == 0
    other = torch.randn(3)
    assert one[1](other) is not other
    assert torch.equal(one[1](other), other.relu())


class Inner(nn.Module):  # type: ignore[misc,name-defined]
    """A block whose layer and ReLU are also called one by one from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.relu(self.bn(x))


class Outer(nn.Module):  # type: ignore[misc,name-defined]
    """It cannot be traced, and goes past the forward of its block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Inner()

    def forward(self, x: Any) -> Any:
        if x.sum() > 1e9:
            return x
        return self.block(x) + self.block.bn(x)


def test_a_layer_that_is_called_past_its_block_is_not_rectified() -> None:
    model, x = Outer().eval(), torch.randn(4, 3, 5, 5)
    plain = copy.deepcopy(model)
    swap(plain)
    assert swap(model, fuse_relu=True).fused == ["block.bn"]
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        y = other.block.bn(x)
        assert y.min() < 0
        assert torch.equal(y, plain.block.bn(x))
        assert torch.equal(other(x), plain(x))
        assert other.block.bn(x).min() < 0


def test_a_run_that_was_interrupted_leaves_the_layer_as_it_was() -> None:
    model, x = Outer(), torch.randn(4, 3, 5, 5)
    swap(model, fuse_relu=True)

    def interrupt(module: Any, given: Any) -> None:
        raise KeyboardInterrupt

    hook = model.block.relu.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    hook.remove()
    assert model.block.bn(x).min() < 0
    assert model.block(x).min() == 0
    assert model.block.bn(x).min() < 0


def test_another_thread_does_not_rectify() -> None:
    model, x = Outer(), torch.randn(4, 3, 5, 5)
    swap(model, fuse_relu=True)
    seen: list[Any] = []

    def beside(module: Any, given: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(model.block.bn(x)))
        thread.start()
        thread.join()

    model.block.relu.register_forward_pre_hook(beside)
    assert model.block(x).min() == 0
    assert seen[0].min() < 0


@pytest.mark.parametrize("inference", [True, False])
def test_a_relu_that_was_replaced_is_missed(inference: bool) -> None:
    one = fused(net(3)).eval()
    one[1] = nn.LeakyReLU()
    with torch.inference_mode(inference), pytest.raises(RuntimeError) as caught:
        one(torch.randn(4, 3, 5, 5))
    assert str(caught.value) == (
        "Sequential no longer passes the output of each fused layer to its ReLU, as it did when swap(model, fuse_relu=True) "
        "looked at it. Call unswap before the model is changed, then swap again."
    )


def test_a_block_runs_again_under_checkpointing() -> None:
    two = net(3)
    one, x = fused(two), torch.randn(4, 3, 5, 5)
    gradients = []
    for model in (two, one):
        given = x.clone().requires_grad_()
        checkpoint(model, given, use_reentrant=False).square().sum().backward()
        gradients.append((given.grad, model[0].weight.grad))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_what_a_hook_has_changed_is_rectified_again() -> None:
    one = fused(net(3))
    one[0].register_forward_hook(lambda layer, given, y: y.sub_(0.5))
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        assert one(x).min() == 0


def test_inference_mode() -> None:
    one, x = fused(net(3)).eval(), torch.randn(4, 3, 5, 5)
    with torch.inference_mode():
        assert torch.equal(one(x), copy.deepcopy(one)[0](x).relu())


def test_relus_are_fused_in_a_model_that_is_swapped_already() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    assert swap(model) == ["0"]
    assert swap(model, fuse_relu=True) == []
    assert model[0].fuse_relu
    assert type(model[1]) is ReLU


class Block(nn.Module):  # type: ignore[misc,name-defined]
    """A ReLU shared by a layer and a sum; a layer with two consumers; a layer called twice, once with a ReLU after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shared, self.last = (nn.BatchNorm2d(3) for _ in range(4))
        self.relu = nn.ReLU()

    def forward(self, x: Any) -> Any:
        y = self.relu(self.first(x))
        z = self.second(y)
        y = self.relu(z) + z
        return self.last(self.relu(self.shared(y)) + self.shared(y))


def test_only_where_a_relu_alone_takes_the_output() -> None:
    model, x = Block(), torch.randn(4, 3, 5, 5)
    plain = copy.deepcopy(model)
    assert swap(plain) == ["first", "second", "shared", "last"]
    assert swap(model, fuse_relu=True) == ["first", "second", "shared", "last"]
    assert {name for name, module in model.named_modules() if getattr(module, "fuse_relu", False)} == {"first"}
    assert type(model.relu) is ReLU
    assert torch.equal(model(x), plain(x))
    assert ", fuse_relu=True, by=multibn)" in repr(model.first)
    assert "fuse_relu" not in repr(model.second)
    assert list(model.state_dict()) == list(plain.state_dict())


class Untraceable(nn.Module):  # type: ignore[misc,name-defined]
    """An untraceable module with a traceable submodule and a layer that it calls directly."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Any) -> Any:
        y = self.part(x)
        return self.relu(self.bn(y)) if y.sum() > 0 else y


def test_parts_that_can_be_traced_are_fused() -> None:
    model, x = Untraceable(), torch.randn(4, 3, 5, 5)
    plain = copy.deepcopy(model)
    swap(plain)
    result = swap(model, fuse_relu=True)
    assert result == result.swapped == ["part.0", "bn"]
    assert result.fused == ["part.0"]
    assert list(result.skipped) == [""]
    start = "torch.fx cannot trace Untraceable, so its own layers are not fused: "
    assert re.match(re.escape(start) + "symbolically traced variables", result.skipped[""])
    assert torch.equal(model(x), plain(x))


def by_sign(x: Any) -> Any:
    """A function that torch.fx cannot trace, since it compares values."""
    return x + 1 if x.sum() > 0 else x - 1


def test_the_graph_of_a_graph_module_is_used_without_a_new_trace() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    with model.graph.inserting_before(output):
        output.args = (model.graph.call_function(by_sign, output.args),)
    model.recompile()
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)
    x = torch.randn(4, 3, 5, 5)
    wanted = copy.deepcopy(model)
    swap(wanted)
    result = swap(model, fuse_relu=True)
    assert (result.fused, result.skipped) == (["0"], {})
    assert torch.equal(model(x), wanted(x))


def test_a_layer_under_checkpointing_inside_its_block_is_not_fused() -> None:
    class Checkpointed(Inner):
        def forward(self, x: Any) -> Any:
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = Checkpointed(), torch.randn(4, 3, 5, 5, requires_grad=True)
    assert swap(model, fuse_relu=True).fused == ["bn"]
    y = model(x)
    assert y.min() == 0
    y.square().sum().backward()
    assert x.grad.any()


class Functional(nn.Module):  # type: ignore[misc,name-defined]
    """A block of a residual network that calls ReLU as a function."""

    def __init__(self, relu: Any = torch.nn.functional.relu, channels: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x: Any) -> Any:
        y = self.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


FUNCTIONS: dict[str, Any] = {
    "F.relu": torch.nn.functional.relu,
    "F.relu, inplace": lambda y: torch.nn.functional.relu(y, inplace=True),
    "F.relu, by name": lambda y: torch.nn.functional.relu(input=y),
    "F.relu_": torch.nn.functional.relu_,
    "torch.relu": torch.relu,
    "torch.relu, by name": lambda y: torch.relu(input=y),
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda y: y.relu(),
    "Tensor.relu_": lambda y: y.relu_(),
}


def functional(relu: Any) -> tuple[Any, Any, Any]:
    """An unfused model, the same one fused, and an input."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(Functional(relu), Functional(relu)), torch.randn(4, 3, 5, 5)
    model = copy.deepcopy(plain)
    swap(plain)
    assert swap(model, fuse_relu=True).fused == ["0.bn1", "1.bn1"]
    return plain, model, x


@pytest.mark.parametrize("mode", ["training", "inference", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_follows_is_fused_with_the_same_bits(name: str, mode: str) -> None:
    plain, model, x = functional(FUNCTIONS[name])
    results = []
    for each in (plain, model):
        each.train(mode == "training")
        given = x.clone().requires_grad_(mode in ("training", "inference"))
        with torch.inference_mode(mode == "inference_mode"), torch.set_grad_enabled(given.requires_grad):
            y = each(given)
        assert type(y) is torch.Tensor
        if given.requires_grad:
            y.square().sum().backward()
        results.append((y, given.grad, *(p.grad for p in each.parameters()), *each.buffers()))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_function_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, ReLU would leave a node in the graph."""
    plain, model, x = functional(torch.relu)

    def nodes(y: Any) -> list[str]:
        found, waiting = [], [y.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None:
                found.append(type(node).__name__)
                waiting += [each for each, _ in node.next_functions]
        return found

    x.requires_grad_()
    assert nodes(plain(x)).count("ReluBackward0") > nodes(model(x)).count("ReluBackward0")
    assert "AliasBackward0" not in nodes(model(x))


def test_a_forward_that_no_longer_calls_the_function_is_an_error() -> None:
    _, model, x = functional(torch.relu)
    model[0].relu = torch.nn.functional.leaky_relu
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError) as caught:
        model(x)
    assert str(caught.value) == (
        "Functional no longer passes the output of each fused layer to its ReLU, as it did when swap(model, fuse_relu=True) "
        "looked at it. Call unswap before the model is changed, then swap again."
    )
    assert before.keys() == model.state_dict().keys()
    assert ours.unswap(model) == ["0.bn1", "0.bn2", "1.bn1", "1.bn2"]
    assert "before_function" not in vars(model[0].bn1)
    model(x)


def test_a_hook_sees_the_rectified_output_and_what_it_changes_is_rectified_again() -> None:
    _, model, x = functional(torch.relu)
    seen = []
    handle = model[0].bn1.register_forward_hook(lambda layer, given, y: seen.append(float(y.detach().min())))
    model(x)
    assert seen == [0]
    handle.remove()
    model[0].bn1.register_forward_hook(lambda layer, given, y: [y.sub_(0.5)].clear())
    model[0].conv2.register_forward_pre_hook(lambda layer, given: seen.append(float(given[0].min())))
    with torch.no_grad():
        model(x)
    assert seen == [0, 0]


@pytest.mark.parametrize("full", [True, False])
def test_other_ways_around_a_function_are_right(full: bool) -> None:
    """Compiled, traced, checkpointed, copied and called past the block."""
    plain, model, x = functional(torch.nn.functional.relu)
    for each in (plain, model):
        each.eval()
    wanted = plain(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=full)(x), wanted)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(model.state_dict())))["0.bn1.weight"], model[0].bn1.weight)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    assert model[0].bn1(x).min() < 0
    gradients = []
    for each in (plain, model):
        each.train()
        given = x.clone().requires_grad_()
        checkpoint(each, given, use_reentrant=False).square().sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)


def test_a_layer_before_a_function_and_a_module() -> None:
    class Both(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x: Any) -> Any:
            return self.relu(self.bn(torch.nn.functional.relu(self.bn(x))))

    model, x = Both(), torch.randn(4, 3, 5, 5)
    plain = copy.deepcopy(model)
    swap(plain)
    assert swap(model, fuse_relu=True).fused == ["bn"]
    assert torch.equal(model(x), plain(x))
