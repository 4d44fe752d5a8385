"""A model's graph in a canonical form, for ``match``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from multibn.port.errors import PortError
from multibn_torch.compat import operator_arguments

COMMUTES: Final = ("add", "mul", "maximum", "minimum")
_SAME: Final = ("dropout", "feature_dropout", "clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy")
"""Operators that change no value in inference."""
_SHAPES: Final = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "_unsafe_view", "unflatten")
_NOT_COMPARED: Final = ("momentum", "cudnn_enabled", "training", "inplace", "implicit", "generator", "train")


@dataclass(eq=False)
class Step:
    """A node of a canonical graph.

    Args:
        kind: the operator's name, or "state", "input" or "constant".
        settings: its other arguments, by name.
        inputs: the steps that it uses.
        name: for messages; for a state, its name in the state_dict.
        shape: that of its value.
        stateful: whether it depends on a state.
        momentum: that of a BatchNorm, which is not compared.
        structure: equal for nodes with the same subgraph up to the inputs, in both graphs; set by ``match``.
    """

    kind: str
    settings: tuple[tuple[str, Any], ...]
    inputs: list[Step]
    name: str
    shape: tuple[int, ...] | None
    stateful: bool
    momentum: float | None = None
    structure: int = field(default=-1)

    def nearest(self) -> str:
        """Return the name of a nearby state, for messages."""
        return next((f" ({each.name})" for each in self.inputs if each.kind == "state"), "")


@dataclass(frozen=True)
class Graph:
    """Steps in order, and the outputs."""

    steps: list[Step]
    outputs: list[Step]


def graph_of(model: nn.Module, inputs: Sequence[Tensor], who: str) -> Graph:
    """Return the graph of a model in inference.

    Raises:
        PortError: PyTorch cannot export it; ``who`` is for the message.
    """
    mode = {module: module.training for module in model.modules()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's warnings about its own code
            program = torch.export.export(model.eval(), tuple(inputs))
    except Exception as error:
        raise PortError(f"{who} cannot be traced by torch.export: {' '.join(str(error).split())[:300]}") from error
    finally:
        for module, training in mode.items():
            module.training = training
    return _Reader(program).read()


class _Reader:
    def __init__(self, program: Any) -> None:
        signature = program.graph_signature
        self.states = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = {name: program.constants[target] for name, target in signature.inputs_to_lifted_tensor_constants.items()}
        self.graph: fx.Graph = program.graph
        self.steps: dict[fx.Node, Step] = {}
        self.order: list[Step] = []
        self.made: dict[Any, Step] = {}
        self.count = 0

    def read(self) -> Graph:
        outputs: list[Step] = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.steps[node] = self.add(self._leaf(node))
            elif node.op == "call_function":
                self.steps[node] = self._step(node)
            elif node.op == "output":
                outputs = [self.steps[each] for each in node.args[0]]
        return Graph(self.order, outputs)

    def add(self, step: Step) -> Step:
        self.order.append(step)
        return step

    def _leaf(self, node: fx.Node) -> Step:
        shape = _shape(node)
        if node.name in self.states:
            return Step("state", (("shape", shape),), [], self.states[node.name], shape, True)
        if node.name in self.constants:
            value = self.constants[node.name].detach()
            return Step("constant", (("value", str(value.tolist())), ("shape", shape)), [], node.name, shape, False)
        self.count += 1
        return Step("input", (("number", self.count),), [], node.name, shape, False)

    def _step(self, node: fx.Node) -> Step:
        kind, settings, inputs = self._parts(node)
        if kind in _SAME:
            return inputs[0]
        shape = _shape(node)
        if kind in _SHAPES:
            source = inputs[0].inputs[0] if inputs[0].kind == "shape" else inputs[0]
            return source if source.shape == shape else self._made("shape", {"shape": shape}, [source], node)
        if kind == "mean" and set(settings) >= {"dim", "keepdim"} and inputs[0].shape is not None:
            rank = len(inputs[0].shape)
            if sorted(dim % rank for dim in settings["dim"]) == list(range(2, rank)):
                pooled = (*inputs[0].shape[:2], *[1] * (rank - 2))
                mean = self._made(f"adaptive_avg_pool{rank - 2}d", {"output_size": (1,) * (rank - 2)}, inputs, node, pooled)
                return mean if settings["keepdim"] else self._made("shape", {"shape": shape}, [mean], node)
        momentum = settings.pop("momentum", None)
        for name in _NOT_COMPARED:
            settings.pop(name, None)
        step = self._made(*_canonical(kind, settings, inputs), inputs, node)
        step.momentum = momentum
        return step

    def _made(
        self, kind: str, settings: dict[str, Any], inputs: list[Step], node: fx.Node, shape: tuple[int, ...] | None = None
    ) -> Step:
        key = (kind, tuple(sorted(settings.items())), tuple(map(id, inputs)))
        if key not in self.made:  # the same operation on the same inputs is one step, however often it is computed
            stateful = any(each.stateful for each in inputs)
            self.made[key] = self.add(Step(kind, key[1], inputs, node.name, shape or _shape(node), stateful))
        return self.made[key]

    def _parts(self, node: fx.Node) -> tuple[str, dict[str, Any], list[Step]]:
        """Return name, settings and inputs; a list of inputs is flattened, and its length is a setting."""
        target: Any = node.target
        kind = getattr(target, "overloadpacket", target).__name__
        schema = operator_arguments(target)
        names = [each.name for each in schema] or [str(i) for i in range(len(node.args))]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        defaults = {each.name: each.default_value for each in schema if each.name not in given}
        settings: dict[str, Any] = {}
        inputs: list[Step] = []
        for name, value in {**given, **defaults}.items():
            several = isinstance(value, (list, tuple))
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(each, fx.Node) for each in values):
                inputs += [self.steps[each] for each in values if each is not None]
                if several:
                    settings[name] = len(values)
            else:
                settings[name] = tuple(values) if several else value
        return kind, settings, inputs


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _canonical(kind: str, settings: dict[str, Any], inputs: list[Step]) -> tuple[str, dict[str, Any]]:
    """Normalise equivalent forms: in place or not, 3 for (3, 3), a stride that is the kernel size, clamp for ReLU6."""
    kind = kind.removesuffix("_")
    dims = next((n for n in (1, 2, 3) if kind.endswith(f"{n}d")), None)
    if dims:
        for name, value in settings.items():
            if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], int):
                settings[name] = value * dims
        if "kernel_size" in settings and not settings.get("stride"):
            settings["stride"] = settings["kernel_size"]
    if kind in ("hardtanh", "relu6"):
        bounds = {"min": settings.get("min_val", 0), "max": settings.get("max_val", 6)}
        kind, settings = "clamp", bounds
    rank = len(inputs[0].shape) if inputs and inputs[0].shape is not None else 0
    if rank and isinstance(settings.get("dim"), int):
        settings["dim"] %= rank
    known: dict[type, Callable[[Any], Any]] = {float: lambda v: v, int: float, bool: bool}
    return kind, {name: known.get(type(value), lambda v: v)(value) for name, value in settings.items()}
