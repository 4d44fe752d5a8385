"""``recompute``: the same bits with less memory, and an exception if a tensor was changed between forward and backward."""

from __future__ import annotations

import copy
import re
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn
from torch.utils.checkpoint import checkpoint

import multibn_torch as ours


def network(fuse_relu: bool = True) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4, affine=False), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 2),
    )  # fmt: skip
    ours.swap(model, fuse_relu)
    return model


def images(seed: int = 1) -> Any:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def assert_same(model: Any, other: Any) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for p, q in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(p, q)


def step(model: Any, again: bool, **options: Any) -> None:
    with ours.recompute() if again else nullcontext():
        loss = model(images()).float().square().sum()
    loss.backward(**options)


PROGRAMS = {
    "plain": lambda model, again: step(model, again),
    "a ReLU of PyTorch": lambda model, again: step(model, again),
    "channels last": lambda model, again: step(model.to(memory_format=torch.channels_last), again),
    "float64": lambda model, again: step(nn.Sequential(_Cast(torch.float64), model.double()), again),
    "inference": lambda model, again: step(model.eval(), again),
    "two backwards of one forward": lambda model, again: twice(model, again),
    "two forwards before their backwards": lambda model, again: accumulate(model, again),
    "autocast": lambda model, again: autocast(model, again),
    "checkpoint": lambda model, again: step(_Checkpointed(model), again),
    "a gradient of a gradient": lambda model, again: penalty(model, again),
}


class _Cast(nn.Module):
    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Any) -> Any:
        return x.to(self.dtype)


class _Checkpointed(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model[4:](checkpoint(self.model[:4], x, use_reentrant=False))


def twice(model: Any, again: bool) -> None:
    with ours.recompute() if again else nullcontext():
        loss = model(images()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def accumulate(model: Any, again: bool) -> None:
    with ours.recompute() if again else nullcontext():
        losses = [model(images(seed)).square().sum() for seed in (1, 2)]
    for loss in losses:
        loss.backward()


def autocast(model: Any, again: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        step(model, again)


def penalty(model: Any, again: bool) -> None:
    x = images().requires_grad_()
    with ours.recompute() if again else nullcontext():
        y = model(x).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        loss = y + dx.square().sum()
    loss.backward()


@pytest.mark.parametrize("program", PROGRAMS)
def test_gradients_and_statistics_have_the_same_bits(program: str) -> None:
    model = network(fuse_relu=program != "a ReLU of PyTorch")
    other = copy.deepcopy(model)
    PROGRAMS[program](model, False)
    PROGRAMS[program](other, True)
    assert_same(model, other)


@pytest.mark.parametrize("again", [True, False])
def test_what_a_convolution_keeps_is_stored_only_without(again: bool) -> None:
    model, kept = network(), []
    for module in model:
        if isinstance(module, ours.BatchNorm2d):
            module.register_forward_hook(lambda module, args, y: kept.append(weakref.ref(y.untyped_storage())))
    memory = []
    with ours.recompute() if again else nullcontext():
        loss = model(images()).square().sum()
        memory = [ref() is None for ref in kept]
    assert torch.isfinite(loss)
    nodes, seen, stored = [loss.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [each for each, _ in node.next_functions]
        if again and "Convolution" in node.name():
            stored.add(type(node._raw_saved_input.data).__name__)
    assert memory == [True] * 3 or not again
    assert stored == ({"Made", "Stored"} if again else set())


def test_several_threads_each_have_their_own_switch() -> None:
    model, other = network(), network()
    inside, done, found = threading.Event(), threading.Event(), []
    count = torch.get_num_threads()  # a new thread may have another, with which convolutions round differently

    def elsewhere() -> None:
        torch.set_num_threads(count)
        inside.wait(60)
        step(other, False)
        from multibn_torch.forward import recompute

        found.append(recompute.active())
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with ours.recompute():
        loss = model(images()).square().sum()
        inside.set()
        assert done.wait(60)
    loss.backward()
    thread.join()
    assert found == [False]
    assert_same(model, other)


MESSAGE = (
    "a tensor of shape {} that recompute() needs for backward was changed in place: it is at version {}, expected version {}. "
    "Modify a copy instead, or do not use recompute()."
)


@pytest.mark.parametrize(("what", "shape"), [("x", (2, 4, 6, 6)), ("gamma", (4,)), ("beta", (4,))])
def test_what_an_output_is_made_of_must_not_change_in_place(what: str, shape: Any) -> None:
    layer: Any = ours.BatchNorm2d(4)
    convolution = nn.Conv2d(4, 4, 3)
    x = torch.randn(2, 4, 6, 6)
    changed = {"x": x, "gamma": layer.weight, "beta": layer.bias}[what]
    with ours.recompute():
        loss = convolution(layer(x)).sum()
    before = changed._version
    with torch.no_grad():
        changed.mul_(2).add_(1)
    with pytest.raises(RuntimeError, match=f"^{re.escape(MESSAGE.format(shape, before + 2, before))}$"):
        loss.backward()


def test_an_output_that_changes_before_it_is_used_is_stored_as_it_was_used() -> None:
    layers: Any = [ours.BatchNorm2d(4) for _ in range(2)]
    convolutions = [nn.Conv2d(4, 4, 3) for _ in range(2)]
    convolutions[1].load_state_dict(convolutions[0].state_dict())
    x = torch.randn(2, 4, 6, 6)
    for layer, convolution, again in zip(layers, convolutions, (True, False), strict=True):
        with ours.recompute() if again else nullcontext():
            loss = convolution(layer(x).mul_(3)).square().sum()
        loss.backward()
    assert_same(layers[0], layers[1])
    assert_same(*convolutions)


def test_an_output_that_changes_after_it_was_used_does_not_change_the_gradient() -> None:
    """PyTorch raises without ``recompute``; with it, backward recomputes the original output."""
    layers: Any = [ours.BatchNorm2d(4) for _ in range(2)]
    convolutions = [nn.Conv2d(4, 4, 3) for _ in range(2)]
    convolutions[1].load_state_dict(convolutions[0].state_dict())
    x = torch.randn(2, 4, 6, 6)
    for layer, convolution, again in zip(layers, convolutions, (True, False), strict=True):
        with ours.recompute() if again else nullcontext():
            y = layer(x)
            loss = convolution(y).square().sum()
        if again:
            y.detach().zero_()
        loss.backward()
    assert_same(layers[0], layers[1])
    assert_same(*convolutions)


def test_another_stored_tensor_that_changes_is_refused() -> None:
    convolution = nn.Conv2d(3, 4, 3)
    x = images()
    with ours.recompute():
        loss = convolution(x).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match=f"^{re.escape(MESSAGE.format((4, 3, 12, 12), 1, 0))}$"):
        loss.backward()
