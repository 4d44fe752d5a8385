"""Match the arrays of two models by walking both graphs from their outputs, and copy the values.

Names and the order of registration are ignored. If two operands of an addition have the same structure up to the inputs, they
cannot be told apart, and the match is refused.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from multibn.layer.types import Array
from multibn.port.errors import PortError
from multibn.port.params import Params
from multibn.port.symbol import Symbol

from .check import distance
from .graphs import COMMUTES, Graph, Step, graph_of
from .importer import Shapes, read

DOUBLE: Final = 1e-9
"""Allowed difference of outputs with equal states, both in float64, as a fraction of the largest."""


@dataclass(frozen=True)
class Match:
    """Pairs: name in the target's state_dict -> name in the source's. Notes: differences in what is not compared."""

    pairs: dict[str, str]
    notes: list[str]


def match(source: nn.Module, target: nn.Module, inputs: Sequence[Tensor]) -> Match:
    """Match the states of two models that compute the same function.

    Args:
        source, target: in any mode; inference is compared.
        inputs: inputs of both.

    Raises:
        PortError: an operator or a setting such as eps differs, two operands cannot be told apart, or a state is not used.
    """
    ours, theirs = graph_of(source, inputs, "the source"), graph_of(target, inputs, "the target")
    _number((ours, theirs))
    found = _Walk().walk(ours, theirs)
    for who, model, names in (("source", source, set(found.pairs.values())), ("target", target, set(found.pairs))):
        states = model.state_dict(keep_vars=True)
        held = {id(states[name]) for name in names}
        left = [name for name, value in states.items() if id(value) not in held and not name.endswith("num_batches_tracked")]
        if left:
            raise PortError(f"{len(left)} states of the {who} take no part in its outputs: {', '.join(left[:4])}.")
    order = [name for name in target.state_dict() if name in found.pairs]
    return Match({name: found.pairs[name] for name in order}, found.notes)


def fill(target: nn.Module, source: nn.Module, inputs: Sequence[Tensor]) -> tuple[Match, float]:
    """Copy the source's values to the target, and return the remaining difference of their outputs in float64.

    Raises:
        PortError: as for ``match``, or the outputs differ; the target is then unchanged.
    """
    found = match(source, target, inputs)
    values, trial = source.state_dict(), copy.deepcopy(target).double().eval()
    state = trial.state_dict()
    with torch.no_grad():
        for name, its in found.pairs.items():
            state[name].copy_(values[its])
        double = [value.double() for value in inputs]
        got, wanted = _list(trial(*double)), _list(copy.deepcopy(source).double().eval()(*double))
    apart = max(distance(a.numpy(), b.numpy()) for a, b in zip(got, wanted, strict=True))
    if not apart <= DOUBLE:
        raise PortError(
            f"filled, the outputs would be {apart:.1e} of the largest apart in float64; at most {DOUBLE:g} is rounding."
        )
    state = target.state_dict()
    with torch.no_grad():
        for name, its in found.pairs.items():
            state[name].copy_(values[its])
    return found, apart


def fill_target(where: str, symbol: Symbol, arrays: Mapping[str, Array], shapes: Shapes) -> tuple[nn.Module, dict[str, Any]]:
    """Fill the model that ``module:make`` makes with a checkpoint; return the model and its entry in the report.

    Raises:
        PortError: the function does not exist, or as for ``fill``.
    """
    target = _made(where)
    imported = read(symbol, arrays, shapes, "torch")
    found, apart = fill(target, imported.model, _inputs(shapes))
    pairs = {name: imported.states[its] for name, its in found.pairs.items()}
    fixed = {f"{bn.module}.weight": bn.name for bn in imported.batch_norms if bn.fix_gamma}
    for name, its in found.pairs.items():
        if its in fixed and target.get_parameter(name).requires_grad:
            found.notes.append(f"{name} is 1, as fix_gamma of {fixed[its]} asks, and learns in your model; in MXNet it did not.")
    return target, {"target": where, "pairs": pairs, "notes": found.notes, "outputs": apart}


def to_mxnet(model: nn.Module, symbol: Symbol, arrays: Mapping[str, Array], shapes: Shapes) -> Params:
    """Return the arrays of an MXNet graph with the values of a PyTorch model; MXNet is not needed.

    Args:
        model: the PyTorch model.
        symbol: the MXNet graph.
        arrays: the current arrays of that graph; their names, types and layouts are kept.
        shapes: of the inputs.

    Raises:
        PortError: as for ``fill``, or a gamma other than 1 is for a layer with fix_gamma, or a value does not fit the array's
            type.
    """
    imported = read(symbol, arrays, shapes, "torch")
    trial = copy.deepcopy(imported.model)
    found = match(model, trial, _inputs(shapes))
    values = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    fixed = {f"{bn.module}.weight": bn for bn in imported.batch_norms if bn.fix_gamma}
    for name, its in found.pairs.items():
        if name in fixed and not (values[its] == 1).all():
            raise PortError(
                f"{its} is not 1 everywhere, and BatchNorm {fixed[name].name!r} has fix_gamma=True, which ignores it. "
                "Build the network with scale=True (fix_gamma=False)."
            )
    fill(trial, model, _inputs(shapes))
    layouts, named = (arrays.layouts, arrays.named) if isinstance(arrays, Params) else ({}, True)
    filled = Params(arrays, layouts, named)
    full = {name.removeprefix("arg:").removeprefix("aux:"): name for name in arrays}
    for name, its in found.pairs.items():
        array = full[imported.states[name]]
        new = values[its].reshape(arrays[array].shape).astype(arrays[array].dtype)
        if not np.array_equal(new.reshape(values[its].shape).astype(values[its].dtype), values[its]):
            raise PortError(f"{array} has type {arrays[array].dtype}, which does not hold the values of {its}.")
        filled[array] = new
    return filled


class _Walk:
    """Walk both graphs from their outputs."""

    def __init__(self) -> None:
        self.pairs: dict[str, str] = {}
        self.notes: list[str] = []
        self.forth: dict[Step, Step] = {}
        self.back: dict[Step, Step] = {}

    def walk(self, source: Graph, target: Graph) -> Match:
        if len(source.outputs) != len(target.outputs):
            raise PortError(f"the source has {len(source.outputs)} outputs, the target {len(target.outputs)}.")
        todo = list(zip(source.outputs, target.outputs, strict=True))
        unclear: list[tuple[Step, Step]] = []
        while todo or unclear:
            if not todo:
                todo = self._resolved(unclear)
            a, b = todo.pop()
            if self._met(a, b):
                continue
            if a.structure != b.structure:
                self._explain(a, b)
            if a.kind == "state":
                self.pairs[b.name] = a.name
            if a.momentum != b.momentum:
                names = (a.inputs[1].name, b.inputs[1].name)
                self.notes.append(
                    f"momentum: {a.momentum} at {names[0]}, {b.momentum} at {names[1]}; it counts in training alone."
                )
            if a.kind in COMMUTES and len(a.inputs) == 2 and self._unclear(a):
                unclear.append((a, b))
                continue
            todo += zip(a.inputs, self._in_order(a, b), strict=True)
        return Match(self.pairs, self.notes)

    def _met(self, a: Step, b: Step) -> bool:
        """Return whether the pair was visited before; raise if one of the two is paired with another."""
        if a not in self.forth and b not in self.back:
            self.forth[a], self.back[b] = b, a
            return False
        if self.forth.get(a) is not b and (a.stateful or b.stateful):
            other = self.forth[a] if a in self.forth else self.back[b]
            raise PortError(f"{a.name}{a.nearest()} meets {b.name}{b.nearest()}, and one of them {other.name} as well.")
        return True

    def _unclear(self, a: Step) -> bool:
        left, right = a.inputs
        return left is not right and left.structure == right.structure and (left.stateful or right.stateful)

    def _in_order(self, a: Step, b: Step) -> list[Step]:
        swapped = len(b.inputs) == 2 and a.kind in COMMUTES and a.inputs[0].structure != b.inputs[0].structure
        return b.inputs[::-1] if swapped else b.inputs

    def _resolved(self, unclear: list[tuple[Step, Step]]) -> list[tuple[Step, Step]]:
        """Decide pairs of operands with the same structure by the rest of the walk."""
        for i, (a, b) in enumerate(unclear):
            for j, operand in enumerate(a.inputs):
                if self.forth.get(operand) in b.inputs:
                    k = b.inputs.index(self.forth[operand])
                    del unclear[i]
                    return [(operand, b.inputs[k]), (a.inputs[1 - j], b.inputs[1 - k])]
        a, _ = unclear[0]
        states = [state for each in a.inputs if (state := _a_state(each))]
        raise PortError(
            f"the operands of {a.name} look the same down to the inputs, so nothing says which is which: {' and '.join(states)}."
        )

    def _explain(self, a: Step, b: Step) -> None:
        """Raise PortError for the first difference, starting at the outputs."""
        while True:
            if a.kind == "state" and b.kind == "state":
                raise PortError(f"{a.name} has shape {a.shape}, {b.name} has shape {b.shape}.")
            if a.kind != b.kind or a.settings != b.settings or len(a.inputs) != len(b.inputs):
                ours, theirs = dict(a.settings), dict(b.settings)
                keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
                what = "; ".join(f"{key}={ours.get(key)} against {theirs.get(key)}" for key in keys)
                if a.kind != b.kind:
                    what = f"{a.kind} against {b.kind}"
                what = what or f"{len(a.inputs)} inputs against {len(b.inputs)}"
                raise PortError(f"{a.name}{a.nearest()} and {b.name}{b.nearest()} differ: {what}.")
            pairs = list(zip(a.inputs, b.inputs, strict=True))
            if a.kind in COMMUTES and len(pairs) == 2:
                swapped = list(zip(a.inputs, b.inputs[::-1], strict=True))
                pairs = max(
                    pairs, swapped, key=lambda each: sum(2 * (p.structure == q.structure) + (p.kind == q.kind) for p, q in each)
                )
            a, b = next((p, q) for p, q in pairs if p.structure != q.structure)


def _a_state(step: Step) -> str | None:
    todo = [step]
    while todo:
        each = todo.pop()
        if each.kind == "state":
            return each.name
        todo += [its for its in reversed(each.inputs) if its.stateful]
    return None


def _number(graphs: Sequence[Graph]) -> None:
    """Assign equal numbers to nodes with the same subgraph up to the inputs."""
    numbers: dict[Any, int] = {}
    for graph in graphs:
        for step in graph.steps:
            inputs = [each.structure for each in step.inputs]
            key = (step.kind, step.settings, tuple(sorted(inputs) if step.kind in COMMUTES else inputs))
            step.structure = numbers.setdefault(key, len(numbers))


def _made(where: str) -> nn.Module:
    module_name, _, make = where.partition(":")
    sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module_name), make)()
    except Exception as error:
        raise PortError(
            f"--into {where}: {type(error).__name__}: {error}. Give MODULE:MAKE, a function that returns a model."
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise PortError(f"--into {where}: it returned {type(model).__name__}, not a torch.nn.Module.")
    return model


def _inputs(shapes: Shapes) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes.values()]


def _list(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]
