"""``swap`` replaces a model's PyTorch BatchNorm layers with multibn's; ``unswap`` reverts this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules.lazy import LazyModuleMixin

from . import fusion, refusals
from .compat import BatchNormBase
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer, check_layer, keep_single

_OURS: dict[type[torch.nn.Module], type[Layer]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}


class Swapped(list[str]):
    """The result of ``swap``: a list of the names of the swapped layers, in order.

    Attributes:
        swapped: the same names.
        fused: names of the layers that now return max(y, 0).
        skipped: name -> why ``swap`` did not swap this BatchNorm, or why it did not fuse the layers of this submodule.
    """

    def __init__(self, swapped: list[str], fused: list[str], skipped: dict[str, str]) -> None:
        super().__init__(swapped)
        self.swapped, self.fused, self.skipped = list(swapped), fused, skipped


def swap(model: torch.nn.Module, fuse_relu: bool = False) -> Swapped:
    """Replace every ``torch.nn.BatchNorm1d/2d/3d`` of a model with multibn's layer, in place; return the swapped layers' names.

    Each layer stays the same object with the same parameters, statistics, hooks and mode. Only its class changes, so references
    to the layer (shared modules, optimizers, names in checkpoints) remain valid. ``unswap`` undoes the swap. ``swap`` does not
    change other BatchNorms (subclasses such as SyncBatchNorm, lazy and scripted layers), which may compute something else; the
    result lists them in ``skipped``, with the reason.

    Args:
        fuse_relu: where a ReLU (module, function or method) is the only consumer of a layer's output, the layer returns
            max(y, 0) and the ReLU passes it through: the same numbers, faster. ``swap`` finds these pairs with ``torch.fx``, in
            the whole model or, if ``torch.fx`` cannot trace the model, in each submodule that it can trace. A layer rectifies
            only while the module that calls both runs; called from elsewhere, it returns y. A forward hook on a fused layer
            sees max(y, 0).

    Raises:
        TypeError: model is not a module.
        ValueError: a layer has parameters that the specification forbids, such as eps 0; no layer has been swapped then.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> result = swap(model, fuse_relu=True)
    >>> result, result.fused
    (['1'], ['1'])
    >>> unswap(model)
    ['1']
    """
    _check_model("swap", model)
    found = {name: module for name, module in model.named_modules() if type(module) in _OURS}
    for name, module in found.items():
        try:
            check_layer(module)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from None
    skipped = {name: why for name, module in model.named_modules() if (why := _why_not(module))}
    followed = _followed_by_relu(model, skipped) if fuse_relu else {}
    for name, module in found.items():
        module.__class__ = _OURS[type(module)]
        module.name = name
        keep_single(module)
    for module, pairs in followed.items():
        vars(module)["fuse_relu"] = True
        vars(module)["fused_in"] = tuple(dict.fromkeys(fusion.arm(caller) for caller, _ in pairs))
        vars(module)["before_function"] = any(relu is None for _, relu in pairs)
        for _, relu in pairs:
            if relu is not None:
                relu.__class__ = ReLU
    fused = [name for name, module in model.named_modules() if module in followed]
    return Swapped(list(found), fused, skipped)


def unswap(model: torch.nn.Module) -> list[str]:
    """Undo ``swap`` in place: turn the same objects back into PyTorch's own layers; return the names of the layers changed.

    Call ``unswap`` before tools that match PyTorch's exact classes: fusion of convolution and BatchNorm, quantization,
    ``torch.jit.script``.

    Raises:
        TypeError: the model is not a module.
        ValueError: a layer uses a feature that PyTorch's layer lacks, such as frozen statistics; no layer has changed then.
    """
    _check_model("unswap", model)
    theirs = {cls: own for own, cls in _OURS.items()}
    found = {name: module for name, module in model.named_modules() if type(module) in theirs}
    for name, layer in found.items():
        beyond = [key for key in _BEYOND if getattr(layer, key) != getattr(theirs[type(layer)], key, _BEYOND[key])]
        if beyond:
            raise ValueError(
                f"{name or 'the model'}: PyTorch's layer has no equivalent of "
                f"{', '.join(f'{key}={getattr(layer, key)!r}' for key in beyond)}. "
                f"Set {', '.join(f'{key}={_BEYOND[key]!r}' for key in beyond)} first."
            )
    for layer in found.values():
        layer.__class__ = theirs[type(layer)]
        for key in ("name", "fuse_relu", "fused_in", "before_function", "implementation", "_examined", "_began", *_BEYOND):
            vars(layer).pop(key, None)
    for module in model.modules():
        fusion.disarm(module)
        if type(module) is ReLU:
            module.__class__ = torch.nn.ReLU  # type: ignore[assignment]
    return list(found)


_BEYOND = {"normalize_with": "batch", "update_statistics": True, "moving_variance": "unbiased"}
"""Attribute for a feature that PyTorch's layers lack -> the value at which a layer behaves like PyTorch's."""


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{function} needs a torch.nn.Module, got {type(model).__name__}. Pass a module; for several models, call {function} "
            "once for each."
        )


def _why_not(module: torch.nn.Module) -> str:
    """Return why ``swap`` skips this BatchNorm; empty if it does not, or if the module is not a BatchNorm."""
    cls = type(module)
    if cls in _OURS or isinstance(module, Layer):
        return ""
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", "")
        reason = f"{scripted} was compiled by torch.jit.script; call swap before compiling"
        return reason if scripted.startswith("BatchNorm") else ""
    if isinstance(module, LazyModuleMixin) and isinstance(module, BatchNormBase):
        return f"{cls.__name__} has no parameters yet; swap after the first batch"
    if isinstance(module, torch.nn.SyncBatchNorm):
        return "SyncBatchNorm normalises with statistics of all processes; use multibn_torch.SyncBatchNorm instead"
    if isinstance(module, BatchNormBase):
        return f"{cls.__name__} is a subclass of PyTorch's layer and may compute something else"
    return ""


class ReLU(torch.nn.ReLU):
    """``torch.nn.ReLU`` that passes its input through if a layer with ``fuse_relu`` has already rectified it."""

    def forward(self, input: Tensor) -> Tensor:
        """Return max(input, 0)."""
        if type(input) is fusion.Rectified:
            return torch.relu(input)
        if type(input) is Tensor and not torch.compiler.is_compiling() and fusion.take(input):
            return input
        return super().forward(input)


refusals.register_fusers({**_OURS, torch.nn.ReLU: ReLU})

Pair = tuple[torch.nn.Module, torch.nn.Module | None]
"""The innermost module that calls both a layer and the ReLU after it, and the ReLU; None if that is a function."""


class _Tracer(fx.Tracer):
    """Tracer that records for each node the modules whose forward was running, outermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[torch.nn.Module] = []
        self.callers: dict[fx.Node, tuple[torch.nn.Module, ...]] = {}

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        """Whether ``torch.fx`` records a module as one node; multibn's layers are."""
        return isinstance(m, (Layer, ReLU)) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node."""
        node = super().create_node(*args, **kwargs)
        self.callers[node] = tuple(self.running)
        return node

    def call_module(self, m: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace a call of a module."""
        self.running.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.running.pop()


def _followed_by_relu(model: torch.nn.Module, skipped: dict[str, str]) -> dict[torch.nn.Module, list[Pair]]:
    """Map each layer whose only consumer, in every call, is a ReLU to these ReLUs and the callers of both.

    If ``torch.fx`` cannot trace a submodule, its children are traced one by one; BatchNorm layers that are direct children of it
    are not fused, and ``skipped`` gets the reason.
    """
    relus: dict[torch.nn.Module, list[Pair]] = {}
    alone: set[torch.nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        name, part = waiting.pop()
        if not any(type(module) in (*_OURS, *_OURS.values()) for module in part.modules()):
            continue
        if type(part) in (*_OURS, *_OURS.values()):
            alone.add(part)  # called by a module that torch.fx cannot trace
            continue
        tracer = _Tracer()
        try:
            graph = part.graph if isinstance(part, fx.GraphModule) else tracer.trace(part)
        except Exception as error:
            waiting += [(f"{name}.{child}".lstrip("."), module) for child, module in part.named_children()]
            if any(type(child) in (*_OURS, *_OURS.values()) for child in part.children()):
                skipped[name] = f"torch.fx cannot trace {type(part).__name__}, so its own layers are not fused: {error}"
            continue
        _look(graph, part, tracer.callers, relus, alone)
    return {module: its for module, its in relus.items() if module not in alone}


def _look(
    graph: fx.Graph, part: torch.nn.Module, callers: dict[fx.Node, tuple[torch.nn.Module, ...]],
    relus: dict[torch.nn.Module, list[Pair]], alone: set[torch.nn.Module],
) -> None:  # fmt: skip
    """Add each layer of a graph to ``relus`` if a ReLU is the only consumer of its output, else to ``alone``."""
    modules = dict(part.named_modules())
    for node in graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if module is None or type(module) not in (*_OURS, *_OURS.values()):
            continue
        users = list(node.users)
        user = users[0] if len(users) == 1 else None
        after = modules.get(str(user.target)) if user is not None and user.op == "call_module" else None
        if user is not None and (type(after) in (torch.nn.ReLU, ReLU) or _is_function(user)):
            caller = part
            for one, other in zip(callers.get(node, ()), callers.get(user, ()), strict=False):
                if one is not other:
                    break
                caller = one
            relus.setdefault(module, []).append((caller, after))
        else:
            alone.add(module)


def _is_function(node: fx.Node) -> bool:
    """Return whether a node calls a function or method that computes ReLU."""
    return (node.op == "call_function" and node.target in fusion.FUNCTIONS) or (
        node.op == "call_method" and node.target in fusion.METHODS
    )
