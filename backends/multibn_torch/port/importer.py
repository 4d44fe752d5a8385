"""Convert an MXNet checkpoint to a PyTorch module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
from torch import fx

from multibn.layer.types import Array
from multibn.port.batchnorm import ARRAYS, StoredBatchNorm
from multibn.port.errors import PortError, refuse
from multibn.port.operators import Call, calls
from multibn.port.params import load_params
from multibn.port.symbol import Symbol, read_symbol

from .builder import Builder, Layers
from .operators import OPERATORS

Shapes = Mapping[str, tuple[int, ...]]
_SIDES: Final = (224, 112, 128, 299, 96, 64, 48, 32, 28, 24, 12, 320, 640)
"""Heights and widths to try if the shape of the input is not given."""


@dataclass(frozen=True)
class Imported:
    """A checkpoint as a PyTorch module.

    Args:
        model: the module, in inference mode; trainable.
        batch_norms: every BatchNorm, in the order of the graph.
        shapes: of the inputs, in order.
        calls: the calls of the graph.
        states: names in the state_dict -> names of the arrays in the file.
        modules: names of nodes -> names of modules.
        notes: differences in training, apart from the BatchNorms.
        version: of the MXNet that wrote the graph, such as 10901, or None.
        arrays: the file's, by name without "arg:" or "aux:", float32.
        operators: name in the file -> number of occurrences.
    """

    model: fx.GraphModule
    batch_norms: list[StoredBatchNorm]
    shapes: Shapes
    states: Mapping[str, str]
    modules: Mapping[str, str]
    notes: list[str]
    version: int | None
    arrays: Mapping[str, Array]
    operators: Mapping[str, int]


def from_mxnet(
    symbol: str | Path, params: str | Path | Mapping[str, Array], shapes: Shapes | None = None, layers: Layers = "multibn"
) -> fx.GraphModule:
    """Return an MXNet checkpoint as a PyTorch module, in inference mode and trainable. MXNet is not needed.

    Args:
        symbol: the ``-symbol.json`` file, of Module, ``HybridBlock.export`` or ``SymbolBlock``.
        params: the ``.params`` file, or its arrays by name, with or without "arg:" and "aux:".
        shapes: of the inputs, such as ``{"data": (1, 3, 112, 112)}``. None uses the shapes in the file, or finds an image size
            that fits; the module accepts all other sizes that the network does.
        layers: "multibn": BatchNorm as it was in MXNet (biased moving variance, use_global_stats); "torch": PyTorch's own.

    Raises:
        PortError: names everything that cannot be ported.
        OSError: a file cannot be read.
    """
    arrays = load_params(params) if isinstance(params, (str, Path)) else params
    graph = read_symbol(Path(symbol).read_text(encoding="utf-8", errors="replace"), str(symbol))
    return read(graph, arrays, shapes, layers, str(symbol)).model


def read(
    symbol: Symbol, arrays: Mapping[str, Array], shapes: Shapes | None, layers: Layers = "multibn", name: str = "the symbol"
) -> Imported:
    """Like ``from_mxnet``, with the details for a report; ``name`` is for messages."""
    if layers not in get_args(Layers):
        raise ValueError(f"layers must be {' or '.join(map(repr, get_args(Layers)))}, got {layers!r}.")
    its_calls = calls(symbol, name)
    single = _single(arrays, name)
    inputs = _inputs(symbol, its_calls, single, name)
    if shapes is None:
        shapes = _found_shapes(symbol, its_calls, single, inputs, layers, name)
    if set(shapes) != set(inputs):
        raise PortError(
            f"{name}: the inputs are {', '.join(inputs) or 'none'}; shapes were given for {', '.join(shapes) or 'none'}. "
            f"Give a shape for each input, such as {inputs[0] if inputs else 'data'}=1,3,224,224."
        )
    return _built(symbol, its_calls, single, {each: tuple(shapes[each]) for each in inputs}, layers, name)


def _built(
    symbol: Symbol, its_calls: list[Call], arrays: Mapping[str, Array], shapes: Shapes, layers: Layers, name: str
) -> Imported:
    for each, shape in shapes.items():
        if not shape or any(size < 1 for size in shape):
            raise PortError(f"{name}: the shape of {each} must have sizes of 1 and more, got {shape}.")
    builder = Builder(symbol, arrays, shapes, layers)
    for call in its_calls:
        try:
            outputs = OPERATORS[call.op](builder, call)
        except Exception as error:  # PyTorch raises various exceptions for sizes that do not fit
            raise PortError(f"{name} cannot be ported: {call.node}: {_one_line(error)}") from error
        builder.set(call, outputs if isinstance(outputs, list) else [outputs])
    model = builder.finish(symbol.heads)
    return Imported(
        model, builder.batch_norms, shapes, builder.states, builder.modules, builder.notes, symbol.version, arrays,
        Counter(call.node.op for call in its_calls),
    )  # fmt: skip


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _single(arrays: Mapping[str, Array], name: str) -> dict[str, Array]:
    """Return the arrays by their names without prefix, as float32 if that keeps every value."""
    found: dict[str, Array] = {}
    problems = []
    for full, array in arrays.items():
        bare = full.removeprefix("arg:").removeprefix("aux:")
        if bare in found:
            problems.append(f"the array {bare!r} is there twice.")
        if array.dtype.kind != "f":
            problems.append(f"the array {bare!r} has type {array.dtype}; floating point is ported.")
            continue
        with np.errstate(over="ignore"):
            found[bare] = array.astype(np.float32)
        if not np.isfinite(array).all():
            problems.append(f"the array {bare!r} holds NaN or Inf.")
        elif (found[bare] != array).any():
            problems.append(f"the array {bare!r} has type {array.dtype} and values that float32 does not hold.")
    refuse(problems, f"{name}: the arrays cannot be ported")
    return found


def _inputs(symbol: Symbol, its_calls: list[Call], arrays: Mapping[str, Array], name: str) -> list[str]:
    """Return the names of the graph's inputs; raise PortError for missing or unused arrays."""
    used = {node for call in its_calls for node, _ in call.inputs} | {node for node, _ in symbol.heads}
    leaves = [symbol.nodes[i].name for i in sorted(used) if symbol.nodes[i].op == "null"]
    twice = sorted(each for each, count in Counter(leaves).items() if count > 1)
    refuse([f"the name {each!r} is there twice." for each in twice], f"{name} cannot be ported")
    needed: set[str] = set()
    for call in its_calls:
        if call.op in ("BatchNorm", "_contrib_SyncBatchNorm"):
            its = [symbol.nodes[i].name for i, _ in call.inputs[1:]]
            needed.update(its, (f"{call.node.name}_{each}" for each in ARRAYS[len(its) :]))
        elif call.op in ("Convolution", "Deconvolution", "FullyConnected", "LeakyReLU"):
            needed.update(symbol.nodes[i].name for i, _ in call.inputs[1:])
    missing = sorted(needed - set(arrays))
    unused = sorted(set(arrays) - needed - set(leaves))
    if missing and unused and any("." in each for each in unused) and not any("." in each for each in missing):
        raise PortError(
            f"{name}: the file's names, such as {unused[0]!r}, are those of save_parameters, and the graph's are not, such as "
            f"{missing[0]!r}. Their order proves nothing. In MXNet: net.load_parameters(...), net.export(...); port that."
        )
    problems = [f"the array {each!r} is missing." for each in missing]
    problems += [f"the array {each!r} is not used by the graph." for each in unused]
    refuse(problems, f"{name}: graph and arrays do not belong together")
    return [each for each in leaves if each not in arrays]


def _found_shapes(
    symbol: Symbol, its_calls: list[Call], arrays: Mapping[str, Array], inputs: list[str], layers: Layers, name: str
) -> Shapes:
    """Return the shape of the only input in the file, or the first that fits."""
    wanted = "Give the shapes of the inputs, such as {'data': (1, 3, 224, 224)}, data=1,3,224,224 on the command line."
    if len(inputs) != 1:
        raise PortError(f"{name}: the graph has {len(inputs)} inputs: {', '.join(inputs)}. {wanted}")
    errors = {}
    for shape in _candidates(symbol, its_calls, arrays, inputs[0]):
        try:
            _built(symbol, its_calls, arrays, {inputs[0]: shape}, layers, name)
        except PortError as error:
            errors[str(error)] = error
        else:
            return {inputs[0]: shape}
    if len(errors) == 1:  # the shape is not the cause
        raise next(iter(errors.values()))
    why = f" The last one tried: {list(errors)[-1]}" if errors else ""
    raise PortError(f"{name}: the shape of {inputs[0]!r} cannot be told from the graph. {wanted}{why}")


def _candidates(symbol: Symbol, its_calls: list[Call], arrays: Mapping[str, Array], name: str) -> list[tuple[int, ...]]:
    """Return possible shapes of an input: with the channels of its first layer, and a common image size."""
    index = next(i for i, node in enumerate(symbol.nodes) if node.op == "null" and node.name == name)
    written = symbol.nodes[index].hidden.get("shape", "")
    if re.fullmatch(r"[(\[][1-9]\d*L?(, ?[1-9]\d*L?)*,?[)\]]", written):
        return [tuple(map(int, re.findall(r"\d+", written)))]
    for call in its_calls:
        if call.op in ("Convolution", "FullyConnected") and _reaches(its_calls, index, call.inputs[0][0]):
            weight = arrays[symbol.nodes[call.inputs[1][0]].name]
            if call.op == "FullyConnected":
                return [(2, weight.shape[-1])]
            channels = weight.shape[min(1, weight.ndim - 1)] * call.settings["num_group"]
            return [(2, channels, *[side] * len(call.settings["kernel"])) for side in _SIDES]
    return []


def _reaches(its_calls: list[Call], source: int, target: int) -> bool:
    """Return whether a node is the source, or derives from it by operators that keep the number of channels."""
    by_index = {call.index: call for call in its_calls}
    while target != source:
        call = by_index.get(target)
        if call is None or not (call.op.endswith("_scalar") or call.op in ("BatchNorm", "_copy", "Cast", "Activation", "clip")):
            return False
        target = call.inputs[0][0]
    return True


def bits(a: Any, b: Any) -> bool:
    """Return whether two float32 arrays have the same shape and bits."""
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    return bool(a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32)))
