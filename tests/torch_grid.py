"""The cells of the grid for PyTorch: each argument x each kind of wrongness, before forward or between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree

import multibn_torch as ours

STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SHAPE, C = (8, 16, 4, 4), 16


class Plain(torch.Tensor):
    """A subclass with ordinary memory."""


class Wrapper(torch.Tensor):
    """A subclass that wraps a tensor and has no memory of its own."""

    @staticmethod
    def __new__(cls, t: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, strides=t.stride(), dtype=t.dtype)

    def __init__(self, t: Any) -> None:
        self.held = t

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        bare = _pytree.tree_map_only(Wrapper, lambda w: w.held, (args, kwargs or {}))
        return _pytree.tree_map_only(torch.Tensor, Wrapper, function(*bare[0], **bare[1]))


def dead(t: Any) -> Any:
    """Return a wrapper of ``torch.func`` after its transform has ended."""
    kept: list[Any] = []

    def total(a: Any) -> Any:
        kept.append(a)
        return a.sum()

    torch.func.grad(total)(t)
    return kept[0]


def freed(t: Any) -> Any:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Any) -> Any:
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes // 2)
    return t


def freed_view(t: Any) -> Any:
    flat = torch.cat([torch.zeros(3, dtype=t.dtype), t.flatten()])
    view = flat[3:].view(t.shape)
    flat.untyped_storage().resize_(0)
    return view


def fake(t: Any) -> Any:
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


def strided(t: Any) -> Any:
    return t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t


def read_only(t: Any) -> Any:
    array = t.numpy().copy()
    array.flags.writeable = False
    return torch.from_numpy(array)


def misaligned(t: Any) -> Any:
    memory = bytearray(1) + t.numpy().tobytes()
    return torch.from_numpy(np.frombuffer(memory, t.numpy().dtype, offset=1).reshape(t.shape))


def inference(t: Any) -> Any:
    with torch.inference_mode():
        return t.clone()


WRONG: dict[str, Callable[[Any], Any]] = {
    "None": lambda t: None,
    "a number": lambda t: 3.0,
    "a list": lambda t: [1.0, 2.0],
    "an array": lambda t: t.numpy(),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float32": lambda t: t.float(),
    "int32": lambda t: t.int(),
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t.bool(),
    "complex64": lambda t: t.to(torch.complex64),
    "short": lambda t: t.flatten()[1:],
    "fewer": lambda t: t[:4] if t.dim() else t[None][:0],
    "more": lambda t: torch.cat([t, t]) if t.dim() else t.repeat(2),
    "empty": lambda t: t.flatten()[:0],
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t.flatten(0, 1) if t.dim() > 1 else t.sum(),
    "square": lambda t: t.view(4, 4) if t.numel() == 16 else t.flatten(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.view(-1, 4).to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "strided": strided,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t.expand(2),
    "reversed axes": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "negative bit": lambda t: torch._neg_view(-t),
    "imaginary part of a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape),
    "subclass": lambda t: t.as_subclass(Plain),
    "wrapper": Wrapper,
    "fake": fake,
    "functional": lambda t: torch._to_functional_tensor(t),
    "outlived its transform": dead,
    "freed": freed,
    "freed view": freed_view,
    "storage too small": shrunk,
    "copy on write": lambda t: torch._lazy_clone(t),
    "of an array": lambda t: torch.from_numpy(t.numpy().copy()),
    "of a read-only array": read_only,
    "misaligned": misaligned,
    "inference tensor": inference,
    "requires gradients": lambda t: t.clone().requires_grad_(),
}


def setting() -> tuple[Any, Any, dict[str, Any]]:
    """x, dy and a state, of the same values each time."""
    torch.manual_seed(0)
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    values = {name: torch.rand(C) + 0.5 for name in STATE[:4]}
    return x, dy, {**values, "num_batches_tracked": torch.tensor(3)}


def put(layer: Any, name: str, value: Any) -> None:
    """Assign without ``nn.Module``'s checks, as sharding and other libraries do."""
    if name in layer._parameters:
        tensor = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and not value.is_inference()
        value = torch.nn.Parameter(value) if tensor and value.is_floating_point() else value
        layer._parameters[name] = value
    else:
        layer._buffers[name] = value


def outcome(cls: Any, argument: str, wrong: Callable[[Any], Any] | None, when: str) -> tuple[str, Any]:
    """("raised in forward", whether the state is as it was), ("raised in backward", None) or ("results", them)."""
    x, dy, state = setting()
    layer = cls(C)
    for name, value in state.items():
        put(layer, name, value)
    layer.train(when != "inference")
    if when == "second step":
        layer(x)
    given = {"x": x, "dy": dy}
    if wrong is not None and when != "between":
        if argument in given:
            given[argument] = wrong(given[argument])
        else:
            put(layer, argument, wrong(state[argument]))
    leaf = given["x"]
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and not leaf.is_inference() and leaf.is_leaf:
        leaf.requires_grad_()
    before = {name: getattr(layer, name) for name in STATE}
    before = {name: t.detach().clone() for name, t in before.items() if name != argument and t is not None}
    try:
        y = layer(leaf)
    except Exception:
        return "raised in forward", all(torch.equal(t, getattr(layer, name)) for name, t in before.items())
    try:
        if wrong is not None and when == "between":
            t = leaf if argument == "x" else getattr(layer, argument)
            t.data = wrong(t.detach())
        if y.requires_grad:
            y.backward(given["dy"])
    except Exception:
        return "raised in backward", None
    found = {"y": y, "dx": getattr(leaf, "grad", None)}
    found |= {name: getattr(layer, name) for name in STATE if name != argument}
    found |= {f"gradient of {name}": getattr(getattr(layer, name), "grad", None) for name in ("weight", "bias")}
    return "results", {name: numbers(t) for name, t in found.items()}


def numbers(t: Any) -> Any:
    if not isinstance(t, torch.Tensor):
        return t
    t = t.held if isinstance(t, Wrapper) else t
    if torch._is_functional_tensor(t):
        t = torch._from_functional_tensor(t)
    try:
        return torch.empty(t.shape, dtype=torch.float64).copy_(
            t.detach().to_dense() if t.layout is not torch.strided else t.detach()
        )
    except Exception as error:  # of a fake tensor, or one on meta
        return type(error).__name__


def same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    return type(a) is type(b) and (a is None or isinstance(a, (str, float)))


def judge(argument: str, wrong: str, when: str, ask_own: bool = True) -> str:
    """Our layer must raise, or agree with PyTorch's own; if that raises, agree with its results for the right argument."""
    try:
        make = WRONG[wrong]
        x, dy, state = setting()
        make({"x": x, "dy": dy, **state}[argument])
    except Exception:
        return "raised"  # PyTorch cannot even make it
    mine, found = outcome(ours.BatchNorm2d, argument, make, when)
    if mine == "raised in forward" and not found:
        return "wrong: the state has changed although forward raised"
    if mine != "results":
        return "raised"
    print("own", flush=True)  # whose crash is not ours
    own, wanted = outcome(torch.nn.BatchNorm2d, argument, make, when) if ask_own else ("crashed", None)
    if own != "results":
        own, wanted = outcome(torch.nn.BatchNorm2d, argument, None, when)
    assert wanted is not None
    assert found is not None
    tolerance = 2e-2 if "16" in wrong else 1e-4
    differ = [name for name in wanted if not same(found[name], wanted[name], tolerance)]
    return f"wrong: {', '.join(differ)}" if differ else "agreed"


LOST = {("x", wrong, "between") for wrong in ("functional", "outlived its transform")}
"""PyTorch's autograd engine crashes on a leaf that has become one of these, whatever function it went through."""

CELLS: dict[str, Callable[[bool], str]] = {
    f"{argument}, {wrong}, {when}": partial(judge, argument, wrong, when)
    for when, arguments in {
        "training": ("x", "dy", *STATE),
        "inference": ("x", "dy", *STATE),
        "second step": STATE,
        "between": ("x", "weight", "bias", "running_mean", "running_var"),
    }.items()
    for argument in arguments
    for wrong in WRONG
    if (argument, wrong, when) not in LOST
}
