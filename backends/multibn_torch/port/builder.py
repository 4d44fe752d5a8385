"""Build a ``torch.fx`` graph that contains the arrays of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, fx, nn

from multibn.layer.types import Array
from multibn.port.batchnorm import ARRAYS, StoredBatchNorm
from multibn.port.errors import PortError
from multibn.port.operators import Call
from multibn.port.symbol import Symbol
from multibn_torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

Layers = Literal["multibn", "torch"]
LAYERS: Final[dict[str, dict[int, Any]]] = {
    "multibn": {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d},
    "torch": {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d},
}
LARGEST: Final = 2**28
"""Largest number of values of an intermediate tensor; a graph with a larger one comes from a damaged file."""


@dataclass(frozen=True)
class Value:
    """A value of the graph: its node, and a meta tensor of its shape (several for ``split``)."""

    node: fx.Node
    meta: Any


class Builder:
    """A graph under construction.

    Args:
        symbol: the graph of MXNet.
        arrays: every stored array by its name without "arg:" or "aux:", float32.
        shapes: of the inputs.
        layers: whose BatchNorm layers to use.
    """

    def __init__(
        self, symbol: Symbol, arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], layers: Layers
    ) -> None:
        self.symbol, self.arrays, self.layers = symbol, arrays, layers
        self.root, self.graph = nn.Module(), fx.Graph()
        self.batch_norms: list[StoredBatchNorm] = []
        self.notes: list[str] = []
        self.modules: dict[str, str] = {}  # name of a node -> name of its module
        self.states: dict[str, str] = {}  # name in the state_dict -> name of the array
        self._taken = set(dir(self.root))
        self._values: dict[tuple[int, int], Value] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._statistics: dict[str, StoredBatchNorm] = {}
        for i, node in enumerate(symbol.nodes):
            if node.op == "null" and node.name in shapes:
                meta = torch.empty(shapes[node.name], device="meta")
                self._values[i, 0] = Value(self.graph.placeholder(self._free(node.name)), meta)

    def value(self, reference: tuple[int, int]) -> Value:
        """Return the value of a node; a stored array becomes a parameter of the root module."""
        if reference not in self._values:
            name = self._stored(reference)
            target = self._free(name)
            self.root.register_parameter(target, self._parameter(name, self.arrays[name].shape))
            self.states[target] = name
            self._values[reference] = Value(self.graph.get_attr(target), torch.empty(self.arrays[name].shape, device="meta"))
        return self._values[reference]

    def shape(self, value: Value) -> tuple[int, ...]:
        """Return the shape of a value."""
        return tuple(value.meta.shape)

    def size(self, reference: tuple[int, int]) -> int:
        """Return the number of values of a stored array."""
        return int(self.arrays[self._stored(reference)].size)

    def set(self, call: Call, outputs: list[Value]) -> None:
        """Record the value of a call."""
        for i, value in enumerate(outputs):
            self._values[call.index, i] = value

    def call(self, function: Callable[..., Any], *arguments: Any) -> Value:
        """Add a call of a function; arguments that are Values become the graph's nodes."""
        node = self.graph.call_function(function, tuple(_map(arguments, lambda value: value.node)))
        return self._checked(node, function(*_map(arguments, lambda value: value.meta)))

    def layer(self, call: Call, module: nn.Module, x: Value) -> Value:
        """Add a module of the call's name, applied to x; its parameters, given on the meta device, become the call's arrays in
        order.
        """
        meta = module.eval()(x.meta)
        name = self._free(call.node.name)
        for (parameter, old), reference in zip(list(module.named_parameters()), call.inputs[1:], strict=True):
            array = self._stored(reference)
            setattr(module, parameter, self._parameter(array, tuple(old.shape)))
            self.states[f"{name}.{parameter}"] = array
        return self._module(call, name, module, x, meta)

    def batch_norm(self, call: Call) -> Value:
        """Add a BatchNorm; if another has the same four arrays, that module is called again.

        Raises:
            PortError: the layer cannot be ported.
        """
        x, names = self.value(call.inputs[0]), self._batch_norm_names(call)
        name, rank = self._free(call.node.name), len(self.shape(x))
        bn = StoredBatchNorm.of(call, name, names, [self.arrays[each] for each in names], rank)
        problems = bn.problems()
        if not problems and self.shape(x)[1] != bn.channels:
            problems = [f"{call.node}: its arrays have {bn.channels} values, its input {self.shape(x)[1]} channels."]
        if problems:
            raise PortError(" ".join(problems).replace(f"{call.node}: ", ""))
        first = next((self._statistics[each] for each in names if each in self._statistics), None)
        if first is not None:
            if (first.names, first.spec, first.rank, first.momentum) != (names, bn.spec, rank, bn.momentum):
                raise PortError(f"it shares arrays with BatchNorm {first.name!r}, but not all of them in the same way")
            return self._checked(self.graph.call_module(first.module, (x.node,)), x.meta)
        self._statistics.update(dict.fromkeys(names, bn))
        for each in names[2:]:
            if each in self._parameters:
                self._parameter(each, ())
        self.batch_norms.append(bn)
        states = ("weight", "bias", "running_mean", "running_var")
        self.states.update({f"{name}.{state}": array for state, array in zip(states, names, strict=True)})
        return self._module(call, name, self._batch_norm(bn), x, x.meta)

    def finish(self, heads: Iterable[tuple[int, int]]) -> fx.GraphModule:
        """Return the module, in inference mode; several outputs are returned as a tuple."""
        outputs = [self.value(head).node for head in heads]
        self.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph).eval()

    def _batch_norm(self, bn: StoredBatchNorm) -> nn.Module:
        gamma, beta, mean, var = bn.names
        layer: Any = LAYERS[self.layers][bn.rank](bn.channels, eps=bn.eps, momentum=new_weight(bn.momentum))
        shape = (bn.channels,)
        layer.weight = nn.Parameter(torch.ones(shape), False) if bn.fix_gamma else self._parameter(gamma, shape)
        layer.bias = self._parameter(beta, shape)
        layer.running_mean, layer.running_var = torch.tensor(self.arrays[mean]), torch.tensor(self.arrays[var])
        if self.layers == "multibn":
            layer.moving_variance = "biased"
            layer.name = bn.module
            if bn.use_global_stats:
                layer.normalize_with, layer.update_statistics = "moving", False
        return layer  # type: ignore[no-any-return]

    def _batch_norm_names(self, call: Call) -> tuple[str, ...]:
        names = [self._stored(reference) for reference in call.inputs[1:]]
        # before 0.9 the moving statistics were not in the graph
        names += [f"{call.node.name}_{each}" for each in ARRAYS[len(names) :]]
        return tuple(names)

    def _stored(self, reference: tuple[int, int]) -> str:
        node = self.symbol.nodes[reference[0]]
        if node.op != "null" or node.name not in self.arrays:
            raise PortError(f"{node.name!r} must be a stored array here")
        return node.name

    def _parameter(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        """Return the parameter of an array, the same for all its uses."""
        bn = self._statistics.get(name)
        if bn is not None and name in bn.names[2:]:
            raise PortError(f"{name!r} is a moving statistic of BatchNorm {bn.name!r}, and used elsewhere too")
        array = self.arrays[name]
        if array.shape != shape and not (array.size == shape[0] and len(shape) == 1):
            raise PortError(f"{name!r} has shape {array.shape}; its attributes and its input ask for {shape}")
        if name not in self._parameters:
            self._parameters[name] = nn.Parameter(torch.tensor(array.reshape(shape)))
        if self._parameters[name].shape != shape:
            raise PortError(f"{name!r} is used elsewhere in another shape, {tuple(self._parameters[name].shape)}, here {shape}")
        return self._parameters[name]

    def _module(self, call: Call, name: str, module: nn.Module, x: Value, meta: Any) -> Value:
        self.modules[call.node.name] = name
        self.root.add_module(name, module)
        return self._checked(self.graph.call_module(name, (x.node,)), meta)

    def _checked(self, node: fx.Node, meta: Any) -> Value:
        for each in meta if isinstance(meta, tuple) else (meta,):
            if not isinstance(each, Tensor) or each.numel() > LARGEST or each.numel() == 0:
                what = f"a result of shape {tuple(each.shape)}" if isinstance(each, Tensor) else "no tensor"
                raise PortError(f"it has {what}; a tensor of 1 to {LARGEST} values was expected")
        return Value(node, meta)

    def _free(self, name: str) -> str:
        """Return an unused Python name."""
        name = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
        name = f"_{name}" if name[0].isdigit() else name
        while name in self._taken or hasattr(fx.GraphModule, name):
            name += "_"
        self._taken.add(name)
        return name


def new_weight(old: float) -> float:
    """Return PyTorch's momentum for MXNet's: 1 minus it is exactly MXNet's, and it is a short decimal if possible."""
    plain = round(1 - old, 12)
    return plain if 1 - plain == old else 1 - old


def _map(arguments: Any, of: Callable[[Value], Any]) -> list[Any]:
    return [of(each) if isinstance(each, Value) else _map(each, of) if isinstance(each, list) else each for each in arguments]
