"""Small checkpoints for the tests of `multibn port`: made by MXNet from a symbol, or written by hand where MXNet is absent."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from multibn.port import Params, save_params

Array = Any


def values(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    """Make random float32 arrays by their names; variances are > 0, gammas not 1."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        if name.endswith(("var", "moving_var", "running_var")):
            array = rng.uniform(0.3, 2, shape)
        elif name.endswith("gamma"):
            array = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("weight"):
            array = rng.standard_normal(shape, np.float32) / math.sqrt(max(math.prod(shape[1:]), 1))
        else:
            array = rng.standard_normal(shape) * 0.3
        found[name] = array.astype(np.float32)
    return found


def node(op: str, name: str, *inputs: int, **attributes: Any) -> dict[str, Any]:
    """A node of a symbol file."""
    made: dict[str, Any] = {"op": op, "name": name, "inputs": [[each, 0, 0] for each in inputs]}
    return made | ({"attrs": {key: str(value) for key, value in attributes.items()}} if attributes else {})


def symbol_text(nodes: list[dict[str, Any]], *heads: int) -> str:
    """A symbol file."""
    return json.dumps(
        {
            "nodes": nodes,
            "arg_nodes": [i for i, each in enumerate(nodes) if each["op"] == "null"],
            "node_row_ptr": list(range(len(nodes) + 1)),
            "heads": [[each, 0, 0] for each in heads or [len(nodes) - 1]],
            "attrs": {"mxnet_version": ["int", 10901]},
        }
    )


def small(
    folder: Path, name: str = "small", channels: int = 4, convolution: Mapping[str, Any] | None = None, **batch_norm: Any
) -> tuple[Path, Path, dict[str, Array]]:
    """Convolution, BatchNorm, ReLU, global pooling, dense: written without MXNet. Attributes go to the BatchNorm as they are."""
    attributes = {"kernel": "(3, 3)", "num_filter": channels, "pad": "(1, 1)", "no_bias": "True"} | dict(convolution or {})
    nodes = [
        node("null", "data"), node("null", "conv_weight"), node("Convolution", "conv", 0, 1, **attributes),
        *[node("null", f"bn_{each}") for each in ("gamma", "beta", "moving_mean", "moving_var")],
        node("BatchNorm", "bn", 2, 3, 4, 5, 6, **batch_norm),
        node("Activation", "relu", 7, act_type="relu"),
        node("Pooling", "pool", 8, global_pool="True", kernel="(7, 7)", pool_type="avg"),
        node("null", "fc_weight"), node("null", "fc_bias"), node("FullyConnected", "fc", 9, 10, 11, num_hidden=5),
    ]  # fmt: skip
    per_channel = {f"bn_{each}": (channels,) for each in ("gamma", "beta", "moving_mean", "moving_var")}
    arrays = values({"conv_weight": (channels, 3, 3, 3), **per_channel, "fc_weight": (5, channels), "fc_bias": (5,)})
    return *write(folder, symbol_text(nodes), arrays, name), arrays


def write(folder: Path, text: str, arrays: Mapping[str, Array], name: str = "small") -> tuple[Path, Path]:
    """Write both files of a checkpoint, with the names of Module."""
    symbol, params = folder / f"{name}-symbol.json", folder / f"{name}-0000.params"
    symbol.write_text(text)
    auxiliary = ("moving_mean", "moving_var", "running_mean", "running_var")
    save_params(params, Params({f"{'aux' if each.endswith(auxiliary) else 'arg'}:{each}": a for each, a in arrays.items()}))
    return symbol, params


def mxnet() -> Any:
    """Return MXNet with fusion of subgraphs off, which gives wrong intermediate values."""
    import pytest

    os.environ["MXNET_SUBGRAPH_BACKEND"] = "NONE"
    return pytest.importorskip("mxnet", reason="MXNet is not installed, and the outputs are compared with its own")


def in_mxnet(symbol: Any, arrays: Mapping[str, Array], inputs: Mapping[str, Array], training: bool = False) -> list[Array]:
    """Return the outputs of MXNet's symbol; absent arguments are labels, which are zeros."""
    mx = mxnet()
    shapes, _, _ = symbol.infer_shape(**{name: value.shape for name, value in inputs.items()})
    given = {**arrays, **inputs}
    arguments = {
        name: mx.nd.array(given.get(name, np.zeros(s, "f4"))) for name, s in zip(symbol.list_arguments(), shapes, strict=True)
    }
    states = {name: mx.nd.array(arrays[name]) for name in symbol.list_auxiliary_states()}
    executor = symbol.bind(mx.cpu(), arguments, aux_states=states, grad_req="null")
    return [each.asnumpy() for each in executor.forward(is_train=training)]


def made_by_mxnet(symbol: Any, shapes: Mapping[str, tuple[int, ...]], labels: tuple[str, ...] = ()) -> dict[str, Array]:
    """Make arrays for every argument and auxiliary state of a symbol except inputs and labels."""
    arguments, _, states = symbol.infer_shape(**shapes)
    every = dict(zip(symbol.list_arguments(), arguments, strict=True)) | dict(
        zip(symbol.list_auxiliary_states(), states, strict=True)
    )
    return values({name: shape for name, shape in every.items() if name not in shapes and name not in labels})
