"""Unusual arguments for the PyTorch layers: correct results, or an exception that leaves the state unchanged."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import grid
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import multibn_torch as ours


def test_no_cell_of_the_grid_crashes_or_is_wrong() -> None:
    verdicts = grid.run("torch")
    assert len(verdicts) >= 1000
    assert {name: verdict for name, verdict in verdicts.items() if verdict not in ("agreed", "raised")} == {}
    assert "agreed" in verdicts.values()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_one_of_the_moving_statistics_is_missing(missing: str, training: bool) -> None:
    """No shared memory is written to: other layers still compute the same."""
    x = torch.randn(8, 16, 8, 8) * 7
    wanted = ours.BatchNorm2d(16, affine=False)(x)
    layer: Any = ours.BatchNorm2d(16).train(training)
    setattr(layer, missing, None)
    there = "running_mean" if missing == "running_var" else "running_var"
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    assert str(caught.value) == (
        f"expected running_mean and running_var, or neither, got only {there} (BN-05). Give both, or set both to None."
    )
    assert layer.num_batches_tracked == 0
    assert torch.equal(ours.BatchNorm2d(16, affine=False)(x), wanted)


@pytest.mark.parametrize("kind", [torch.float32, torch.int32, torch.uint8])
def test_a_counter_of_another_type_counts(kind: Any) -> None:
    counters = torch.full((2,), 0, dtype=kind)
    counters[1] = 77
    mine, own = ours.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, momentum=None)
    mine.num_batches_tracked, own.num_batches_tracked = counters[0], torch.zeros((), dtype=kind)
    for step in range(4):
        x = torch.randn(8, 3) + step
        mine(x)
        own(x)
    assert counters.tolist() == [4, 77]
    torch.testing.assert_close(mine.running_mean, own.running_mean)


@pytest.mark.parametrize(
    ("pack", "unpack", "text"),
    [
        (
            lambda t: t.bfloat16(),
            lambda t: t,
            "backward needs the input that forward saved, 8 samples of 16 channels of type torch.float32, got "
            "shape (8, 16, 4, 4) of type torch.bfloat16. Do not assign to .data between forward and backward, and let hooks on "
            "saved tensors return what they were given.",
        ),
        (
            lambda t: t,
            lambda t: t[:3] if t.dim() == 1 else t,
            "the CPU kernel needs weight of type torch.float32, one value for each channel, got shape (3,) of type "
            "torch.float32. Give one of the right type and size.",
        ),
    ],
    ids=["type", "size"],
)
def test_hooks_that_return_something_else(pack: Any, unpack: Any, text: str) -> None:
    layer, x = ours.BatchNorm2d(16), torch.randn(8, 16, 4, 4, requires_grad=True)
    with saved_tensors_hooks(pack, unpack):
        y = layer(x)
    with pytest.raises(RuntimeError) as caught:
        y.backward(torch.randn_like(y))
    assert str(caught.value) == text
    assert x.grad is None


@pytest.mark.parametrize("which", ["x", "dy", "weight"])
def test_the_negative_bit_is_seen(which: str) -> None:
    layers: Any = [ours.BatchNorm2d(16) for _ in range(2)]
    given = {"x": torch.randn(8, 16, 4, 4), "dy": torch.randn(8, 16, 4, 4), "weight": torch.rand(16) + 0.5}
    results = []
    for layer, bit in zip(layers, (False, True), strict=True):
        its = {name: t.clone() for name, t in given.items()}
        if bit:
            its[which] = torch._neg_view(-its[which])
        layer.weight = nn.Parameter(its["weight"])
        x = its["x"].requires_grad_()
        y = layer(x)
        y.backward(its["dy"])
        results.append((y, x.grad, layer.weight.grad, layer.running_var))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_freed_storage_is_named_and_the_state_stays(name: str) -> None:
    layer: Any = ours.BatchNorm2d(16)
    x = torch.randn(8, 16, 4, 4)
    layer(x)
    tensor = getattr(layer, name).detach()
    tensor.untyped_storage().resize_(0)
    before = {key: t.clone() for key, t in layer.state_dict().items() if key != name}
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    assert str(caught.value) == (
        f"{name} needs a storage of at least 64 bytes, got one of 0. Allocate the storage before the layer is called."
    )
    for key, t in before.items():
        assert torch.equal(layer.state_dict()[key], t)


def test_statistics_that_share_memory_are_refused() -> None:
    layer: Any = ours.BatchNorm2d(16)
    layer.running_mean = layer.running_var
    with pytest.raises(RuntimeError) as caught:
        layer(torch.randn(8, 16, 4, 4))
    assert str(caught.value) == (
        "running_mean and running_var must not share memory, since both are written to. Call .clone() on one."
    )
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("counter", [None, torch.zeros(()), torch.tensor(0)], ids=["none", "float", "int64"])
def test_statistics_that_passed_in_inference_are_examined_in_training(counter: Any) -> None:
    layer: Any = ours.BatchNorm2d(16).eval()
    layer.running_mean, layer.num_batches_tracked = layer.running_var, counter
    x = torch.randn(8, 16, 4, 4)
    layer(x)
    with pytest.raises(RuntimeError) as caught:
        layer.train()(x)
    assert str(caught.value) == (
        "running_mean and running_var must not share memory, since both are written to. Call .clone() on one."
    )
    assert torch.equal(layer.running_var, torch.ones(16))


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("what", ["negative bit", "steps", "type"])
def test_a_change_at_the_same_address_is_seen(name: str, what: str) -> None:
    """``.data`` is given another view of the same memory, between two forwards."""
    layers: Any = [ours.BatchNorm2d(16) for _ in range(2)]
    x = torch.randn(8, 16, 4, 4)
    results: list[Any] = []
    for layer, trick in zip(layers, (True, False), strict=True):
        tensor = getattr(layer, name)
        tensor.data = torch.linspace(1, 2, 32)[:16]
        layer(x)
        memory = tensor.data.as_strided((32,), (1,))
        views: Any = {"negative bit": torch._neg_view(tensor.data), "steps": memory[::2]}
        new = views.get(what, tensor.data.view(torch.bfloat16)[:16])
        tensor.data = new if trick else new.clone().resolve_neg()
        try:
            results.append((layer(x), layer.running_mean.resolve_neg(), layer.running_var.resolve_neg()))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    if what == "type":
        assert isinstance(results[0], str)
        assert results[0] == results[1]
    else:
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("which", ["x", "dy"])
def test_views_with_an_offset_into_storage_that_shrank(which: str) -> None:
    layer = ours.BatchNorm2d(16)
    larger = torch.randn(12, 16, 4, 4)
    view = larger[4:]
    other = torch.randn(8, 16, 4, 4, requires_grad=True)
    layer(other).backward(view)
    assert other.grad is not None
    larger.untyped_storage().resize_(view.nbytes)
    call: Any = partial(layer, view) if which == "x" else partial(layer(other).backward, view)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError) as caught:
        call()
    name = "the input" if which == "x" else "the gradient of the output"
    assert str(caught.value) == (
        f"{name} needs a storage of at least 12288 bytes, got one of 8192. Allocate the storage before the layer is called."
    )
    assert all(torch.equal(t, before[key]) for key, t in layer.state_dict().items())


def test_a_forward_without_memory_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from multibn_torch.forward import eager

    def fail(x: Any) -> Any:
        raise MemoryError

    layer: Any = ours.BatchNorm2d(16)
    before = copy.deepcopy(layer.state_dict())
    monkeypatch.setattr(eager, "output_like", fail)
    with pytest.raises(MemoryError):
        layer(torch.randn(8, 16, 4, 4))
    for key, t in before.items():
        assert torch.equal(layer.state_dict()[key], t)


CALLS = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}


@pytest.mark.parametrize("given", CALLS, ids=str)
@pytest.mark.parametrize("loaded", CALLS, ids=str)
def test_the_message_about_types_names_a_call_that_helps(loaded: Any, given: Any) -> None:
    """Of a state that ``load_state_dict(assign=True)`` has put in place with its types (BN-10)."""
    torch.manual_seed(0)
    layer, x = ours.BatchNorm2d(3), torch.randn(4, 3, 2, 2).to(given)
    wanted = copy.deepcopy(layer).to(given)(x)
    state = nn.BatchNorm2d(3).to(loaded).state_dict()
    layer.load_state_dict(state, assign=True)
    needed = torch.float64 if given is torch.float64 else torch.float32
    if loaded is not needed:
        before = copy.deepcopy(state)
        with pytest.raises(RuntimeError) as caught:
            layer(x)
        its, got = (str(t).removeprefix("torch.") for t in (needed, loaded))
        assert str(caught.value) == (
            f"weight must be {its} for {str(given).removeprefix('torch.')} input, got {got} (BN-10). Call {CALLS[given]}() of "
            "the layer or of the model, also after load_state_dict(assign=True), which keeps the types of what it loads."
        )
        assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
        getattr(layer, CALLS[given])()
    assert torch.equal(layer(x), wanted)
    assert layer.weight.dtype is needed


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16], ids=str)
def test_types_of_a_half_model(given: Any) -> None:
    """``type`` makes the counter floating-point, as it does PyTorch's own."""
    x = torch.randn(4, 3, 2, 2).to(given)
    results = []
    for way in ("half" if given is torch.float16 else "bfloat16", "type", "to"):
        layer: Any = ours.BatchNorm2d(3, momentum=None)
        layer = getattr(layer, way)() if "half" in way or "float" in way else getattr(layer, way)(given)
        for _ in range(2):
            results.append(layer(x))
        assert {t.dtype for name, t in layer.state_dict().items() if "num" not in name} == {torch.float32}
        assert layer.num_batches_tracked == 2
    assert all(torch.equal(y, results[0]) for y in results)
