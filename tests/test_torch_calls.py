"""Random sequences of public calls, compared with PyTorch's own layer: the same results, or an error and an unchanged state."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

pytest.importorskip("hypothesis", reason="needs Hypothesis: pip install 'multibn[conformance]'")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import multibn_torch as ours

C = 3
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
HALF = {"float16", "bfloat16", "half"}

CALLS = st.one_of(
    st.tuples(st.sampled_from(["to", "type", "load", "forward"]), st.sampled_from(list(TYPES))),
    st.tuples(st.sampled_from(["half", "bfloat16", "float", "double", "to_empty", "share_memory", "deepcopy"]), st.none()),
    st.tuples(st.sampled_from(["requires_grad_", "train"]), st.booleans()),
    st.tuples(st.sampled_from(["backward", "forward"]), st.just("float32")),
)


class Program:
    """A layer, and the batch whose backward has not run yet."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.waiting: Any = None

    def call(self, name: str, argument: Any, seed: int) -> dict[str, Any]:
        """Make a call; return its outcome."""
        layer, generator = self.layer, torch.Generator().manual_seed(seed)
        if name == "forward":
            x = torch.randn(4, C, 2, 2, generator=generator).add(0.3).to(TYPES[argument]).requires_grad_()
            self.waiting = None
            y = layer(x)
            self.waiting = x, y
            return {"y": y}
        if name == "backward":
            if self.waiting is None:
                return {}
            x, y = self.waiting
            self.waiting = None
            layer.zero_grad()
            y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
            return {"dx": x.grad, **{f"d{key}": p.grad for key, p in layer.named_parameters()}}
        if name == "load":
            state = nn.BatchNorm2d(C).state_dict()
            state = {key: torch.rand(C, generator=generator) + 0.5 if t.dim() else t for key, t in state.items()}
            layer.load_state_dict({k: t.to(TYPES[argument]) if t.dim() else t for k, t in state.items()}, assign=True)
        elif name == "to_empty":
            layer.to_empty(device="cpu")
            layer.reset_parameters()
        elif name == "deepcopy":
            self.layer, self.waiting = copy.deepcopy(layer), None
        elif name in ("to", "type"):
            getattr(layer, name)(TYPES[argument])
        else:
            getattr(layer, name)(*() if argument is None else (argument,))
        return {}


def state(layer: Any) -> dict[str, Any]:
    return {name: t.detach().clone() for name, t in layer.state_dict().items()}


def twin(layer: Any) -> Any:
    """Make PyTorch's own layer with the same state."""
    own = nn.BatchNorm2d(C).train(layer.training)
    own.load_state_dict(state(layer), assign=True)
    for p, mine in zip(own.parameters(), layer.parameters(), strict=True):
        p.requires_grad_(mine.requires_grad)
    return own


def attempt(program: Program, *call: Any) -> Any:
    try:
        return program.call(*call)
    except Exception as error:
        return error


def close(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None or found[name] is None:
            assert value is found[name], name
        else:
            a, b = found[name].detach().double(), value.detach().double()
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def goes_with(layer: Any, kind: str) -> bool:
    """Return whether the layer's state allows input of a type (BN-10)."""
    needed = torch.float64 if kind == "float64" else torch.float32
    return all(t.dtype is needed for t in layer.state_dict().values() if t.dim())


@settings(max_examples=300, deadline=None)
@given(st.lists(CALLS, min_size=1, max_size=12))
def test_any_sequence_of_calls(calls: list[tuple[str, Any]]) -> None:
    mine, own = Program(ours.BatchNorm2d(C)), Program(nn.BatchNorm2d(C))
    rough = False  # since a forward in half precision, whose batch waits for its backward
    for seed, (name, argument) in enumerate(calls):
        before = state(mine.layer)
        may_not_raise = name != "backward" and (name != "forward" or goes_with(mine.layer, argument))
        found, wanted = attempt(mine, name, argument, seed), attempt(own, name, argument, seed)
        half = bool({name, argument} & HALF)
        rough = half if name == "forward" else rough or half
        if isinstance(found, Exception):
            assert not may_not_raise, found
            after = state(mine.layer)
            assert all(t.dtype is after[key].dtype and torch.equal(t, after[key]) for key, t in before.items())
        elif not isinstance(wanted, Exception) and found.keys() == wanted.keys():
            close(found, wanted, 3e-2 if rough else 1e-4)
            close(state(mine.layer), state(own.layer), 3e-2 if half else 1e-4)
        if half or isinstance(found, Exception) or isinstance(wanted, Exception):  # the own layer rounds its state, or has none
            own = Program(twin(mine.layer))
        if name in ("half", "bfloat16"):
            assert {t.dtype for t in mine.layer.state_dict().values() if t.dim()} == {torch.float32}
