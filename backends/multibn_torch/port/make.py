"""Make everything that ``multibn port`` writes from the two files of a checkpoint."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from multibn.layer.types import Array
from multibn.port import report as reports
from multibn.port.errors import PortError
from multibn.port.params import parse_params
from multibn.port.symbol import read_symbol

from .builder import Layers
from .importer import Imported, Shapes, read
from .prove import prove

Writes = dict[str, Callable[[Path], None]]


def make(
    symbol: Path,
    params: Path,
    shapes: Shapes | None,
    layers: Layers,
    check: bool,
    python: str | None,
    fold: bool,
    into: str | None,
    command: str,
) -> tuple[dict[str, Any], Writes]:
    """Return the report, and file extension -> function that writes the file. The arguments are those of the command.

    Raises:
        PortError: the checkpoint cannot be ported.
        OSError: a file cannot be read.
    """
    graph_bytes, params_bytes = symbol.read_bytes(), params.read_bytes()
    _check_roles(symbol, graph_bytes, params, params_bytes)
    graph = read_symbol(graph_bytes.decode("utf-8", errors="replace"), str(symbol))
    stored = parse_params(params_bytes, str(params))
    imported = read(graph, stored, shapes, layers, str(symbol))
    model: fx.GraphModule = imported.model
    examples = [_examples(imported.shapes, kind) for kind in range(2)]

    report = reports.frame(command, {"torch": torch.__version__})
    report |= {
        "files": [reports.file_entry(symbol, graph_bytes, "graph"), reports.file_entry(params, params_bytes, "arrays")],
        "mxnet_version": reports.mxnet_version(graph.version),
        "params": {"arrays": len(stored), "versions": reports.versions_of(stored), "unused": []},
        "operators": dict(sorted(imported.operators.items())),
        "inputs": {name: list(shape) for name, shape in imported.shapes.items()},
        "outputs": len(graph.heads),
        "layers": layers,
        "states": dict(imported.states),
        "batch_norms": [_batch_norm(each, imported, layers) for each in imported.batch_norms],
        "notes": imported.notes,
        "check": None,
        "fold": None,
        "into": None,
    }
    if check:
        from .check import compare_with_mxnet

        heads = [graph.nodes[node].name for node, _ in graph.heads]
        report["check"] = compare_with_mxnet(imported, heads, symbol, params, examples, report["batch_norms"], python)
    writes: Writes = {}
    if fold:
        from .fold import fold as folded

        model, report["fold"], report["states"] = folded(imported, examples[0])
        report["notes"] = [*imported.notes, "The folded network is for inference. To train, take one ported without --fold."]
    if into is not None:
        from .match import fill_target

        target, report["into"] = fill_target(into, graph, stored, imported.shapes)
        writes[".into.pt"] = lambda path: torch.save(target.state_dict(), path)
    report["differences"] = reports.differences(report)
    report["verdict"] = "differs" if report["differences"] else "same"
    program = _exported(model, examples[0])
    writes = {
        ".pt2": lambda path: _save_program(program, path),
        ".pt": lambda path: torch.save(model.state_dict(), path),
    } | writes
    writes |= {".report.json": lambda path: _json(report, path), ".report.html": lambda path: _html(report, path)}
    return report, writes


def _examples(shapes: Shapes, kind: int) -> dict[str, Tensor]:
    """Make inputs: standard normal, or uniform from 0 to 255 like pixels."""
    rng = np.random.default_rng(kind)
    found = {}
    for name, shape in shapes.items():
        values: Array = rng.uniform(0, 255, shape) if kind else rng.standard_normal(shape)
        found[name] = torch.from_numpy(values.astype(np.float32))
    return found


def _batch_norm(bn: Any, imported: Imported, layers: Layers) -> dict[str, Any]:
    layer: Any = imported.model.get_submodule(bn.module)
    return reports.batch_norm(bn, layers, prove(bn, layer), layer.momentum)


def _check_roles(symbol: Path, graph: bytes, params: Path, arrays: bytes) -> None:
    if graph.startswith(bytes.fromhex("1201000000000000")):
        raise PortError(
            f"{symbol} holds arrays without a graph, and those say nothing of eps, fix_gamma or the order of layers. "
            "Give the -symbol.json file first; in MXNet, net.export writes both."
        )
    if arrays.lstrip()[:1] == b"{":
        raise PortError(f"{params} is JSON, not arrays. Give the -symbol.json file first, then the .params file.")


def _exported(model: torch.nn.Module, example: Mapping[str, Tensor]) -> Any:
    """Export the model in inference mode, for inputs of these shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's warnings about its own code
        return torch.export.export(model.eval(), tuple(example.values()))


def _save_program(program: Any, path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch.export.save requires its own extension
        torch.export.save(program, file)


def _json(report: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _html(report: Mapping[str, Any], path: Path) -> None:
    from multibn.port.page import render

    path.write_text(render(report), encoding="utf-8")
