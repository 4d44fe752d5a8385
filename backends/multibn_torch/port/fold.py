"""Fold each BatchNorm into the convolution or dense layer before it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn

from multibn.port.batchnorm import StoredBatchNorm

from .check import distance
from .importer import Imported

_TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *_TRANSPOSED)


def fold(imported: Imported, example: Mapping[str, Tensor]) -> tuple[fx.GraphModule, dict[str, Any], dict[str, str]]:
    """Return the folded network, in inference mode, its entry in the report, and the source arrays of each name in its state.

    A weight times the layer's gain is computed in float64 and rounded once, and so is the bias, (bias - mean)*gain + beta. The
    error of each is measured on the example: the folded layer against the two, all in float64, as a fraction of the largest
        output.
    """
    model, states = copy.deepcopy(imported.model), dict(imported.states)
    by_module = {bn.module: bn for bn in imported.batch_norms}
    layers: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    merged: dict[str, nn.Module] = {}  # name of the layer before -> the folded layer
    folded: dict[str, str] = {}  # name of the layer before -> name of its BatchNorm
    for node in [node for node in model.graph.nodes if node.op == "call_module" and node.target in by_module]:
        bn, before = by_module[node.target], node.args[0]
        if (reason := _obstacle(model, node)) is not None:
            kept.append({"name": bn.name, "reason": reason})
            continue
        layer: Any = model.get_submodule(before.target)
        merged[before.target], folded[before.target] = layer, node.target
        _merge(layer, bn)
        node.replace_all_uses_with(before)
        model.graph.erase_node(node)
        layers.append({"name": bn.name, "into": before.target, "error": 0.0})
        states[f"{before.target}.weight"] += f" folded with {bn.name}"
        states[f"{before.target}.bias"] = f"{states.get(f'{before.target}.bias', 'no bias')} folded with {bn.name}"
    model.delete_all_unused_submodules()
    model.recompile()
    errors = _errors(imported.model, merged, folded, example)
    for each in layers:
        each["error"] = errors[each["into"]]
    with torch.no_grad():
        pairs = [(_list(model(*example.values())), _list(imported.model(*example.values())))]
    outputs = max(distance(a.numpy(), b.numpy()) for got, wanted in pairs for a, b in zip(got, wanted, strict=True))
    alive = model.state_dict()
    return (
        model,
        {"layers": layers, "kept": kept, "outputs": outputs},
        {name: its for name, its in states.items() if name in alive},
    )


def _obstacle(model: fx.GraphModule, node: fx.Node) -> str | None:
    """Return why a BatchNorm cannot be folded, or None."""
    before = node.args[0]
    assert isinstance(before, fx.Node)
    layer = model.get_submodule(str(before.target)) if before.op == "call_module" else None
    if not isinstance(layer, _FOLDS):
        return f"it follows {type(layer).__name__ if layer else before.name}, not a convolution or dense layer"
    if len(before.users) > 1:
        return f"the output of {before.target} goes elsewhere too"
    calls = Counter(each.target for each in model.graph.nodes if each.op == "call_module")
    if calls[before.target] > 1 or calls[node.target] > 1:
        return "one of the two layers is called more than once"
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if any(uses[id(parameter)] > 1 for parameter in layer.parameters()):
        return f"{before.target} shares its arrays with another layer"
    return None


def _merge(layer: Any, bn: StoredBatchNorm) -> None:
    beta, mean = (array.astype(np.float64) for array in bn.arrays[1:3])
    weight = layer.weight.detach().double().numpy()
    if isinstance(layer, _TRANSPOSED):  # (C_in, C_out/groups, ...): the channels of each group lie on axis 1
        groups = bn.gain.reshape(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        weight = (weight.reshape(layer.groups, -1, *weight.shape[1:]) * groups).reshape(weight.shape)
    else:
        weight = weight * bn.gain.reshape(-1, *[1] * (weight.ndim - 1))
    bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
    layer.weight = nn.Parameter(torch.from_numpy(weight.astype(np.float32)))
    layer.bias = nn.Parameter(torch.from_numpy(((bias - mean) * bn.gain + beta).astype(np.float32)))


def _errors(
    original: fx.GraphModule, merged: Mapping[str, nn.Module], folded: Mapping[str, str], example: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the error of each folded layer on its input in the network."""
    found: dict[str, float] = {}
    hooks = []

    def measure(name: str, layer: nn.Module, x: Tensor) -> None:
        norm = original.get_submodule(folded[name])
        with torch.no_grad():
            wanted = _double(norm)(_double(layer).forward(x.double()))  # without the hook that is running
            found[name] = distance(_double(merged[name])(x.double()).numpy(), wanted.numpy())

    for name in merged:
        layer = original.get_submodule(name)
        hooks.append(layer.register_forward_pre_hook(lambda layer, x, name=name: measure(name, layer, x[0])))
    try:
        with torch.no_grad():
            original(*example.values())
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _double(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).double().eval()


def _list(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]
