"""Run the checkpoint in MXNet too, and compare every output and every BatchNorm."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from multibn.port.errors import PortError
from multibn.port.report import FAR
from multibn.port.report import finite as finite_number

from .importer import Imported

INPUTS: Final = ("standard normal values", "values uniform from 0 to 255")
_SECONDS: Final = 600


def compare_with_mxnet(
    imported: Imported,
    heads: Sequence[str],
    symbol: Path,
    params: Path,
    examples: Sequence[Mapping[str, Tensor]],
    batch_norms: Sequence[dict[str, Any]],
    python: str | None,
) -> dict[str, Any]:
    """Return the differences of PyTorch from MXNet, as fractions of MXNet's largest value; write each BatchNorm's to its
    "measured".

    Args:
        imported: the port.
        heads: names of the outputs.
        symbol, params: the files, which MXNet reads itself.
        examples: the inputs of each run.
        batch_norms: their entries in the report.
        python: the interpreter that has MXNet; None for this one.

    Raises:
        PortError: MXNet cannot be run there, or cannot run the checkpoint.
    """
    names = [bn.name for bn in imported.batch_norms]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for run, example in enumerate(examples):
            np.savez(folder / f"inputs-{run}.npz", **{name: value.numpy() for name, value in example.items()})
        task = {"symbol": str(symbol.resolve()), "params": str(params.resolve()), "inner": names, "runs": len(examples)}
        (folder / "task.json").write_text(json.dumps(task))
        versions = _in_mxnet(folder, python)
        theirs = [dict(np.load(folder / f"outputs-{run}.npz")) for run in range(len(examples))]
    ours = [_outputs(imported, example) for example in examples]
    for i, entry in enumerate(batch_norms):
        entry["measured"] = max(distance(b[entry["name"]], a[f"inner{i}"]) for a, b in zip(theirs, ours, strict=True))
    outputs = [
        {"name": head, "errors": [distance(b["outputs"][i], a[f"output{i}"]) for a, b in zip(theirs, ours, strict=True)]}
        for i, head in enumerate(heads)
    ]
    return {"by": f"MXNet {versions['mxnet']}", "versions": versions, "inputs": list(INPUTS[: len(examples)]), "outputs": outputs}


def distance(got: Any, wanted: Any) -> float:
    """Return the largest difference as a fraction of the largest expected value; FAR if shapes or non-finite values differ."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    finite = np.isfinite(wanted)
    if got.shape != wanted.shape or not np.array_equal(got[~finite], wanted[~finite], equal_nan=True):
        return FAR
    largest = max(float(np.abs(wanted[finite]).max(initial=0)), 1e-30)
    return finite_number(float(np.abs(got[finite] - wanted[finite]).max(initial=0)) / largest)


def _outputs(imported: Imported, example: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the outputs of the network, and of each BatchNorm by its name in MXNet."""
    found: dict[str, Any] = {}
    names = {imported.model.get_submodule(bn.module): bn.name for bn in imported.batch_norms}

    def keep(layer: torch.nn.Module, _: Any, y: Tensor) -> None:
        found.setdefault(names[layer], y.numpy())

    hooks = [layer.register_forward_hook(keep) for layer in names]
    try:
        with torch.no_grad():
            out = imported.model(*example.values())
    finally:
        for hook in hooks:
            hook.remove()
    return {**found, "outputs": [each.numpy() for each in (out if isinstance(out, tuple) else (out,))]}


def _in_mxnet(folder: Path, python: str | None) -> dict[str, str]:
    spec = find_spec("multibn_mxnet")
    assert spec is not None
    assert spec.origin is not None
    script = Path(spec.origin).parent / "port" / "run.py"
    try:
        done = subprocess.run(
            [python or sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except OSError as error:
        raise PortError(f"--python: {python} cannot be started: {error.strerror}.") from None
    except subprocess.TimeoutExpired:
        raise PortError(f"MXNet did not finish in {_SECONDS} s. Leave --check out, or give smaller inputs.") from None
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if "Error: " in line]
        last = said[-1].rstrip(".") if said else f"exit status {done.returncode}"
        if "No module named 'mxnet'" in done.stderr:
            last = "MXNet is not installed there: pip install 'multibn[mxnet]', or give --python an interpreter that has it"
        raise PortError(f"--check could not run the checkpoint in MXNet: {last}.")
    versions: dict[str, str] = json.loads((folder / "versions.json").read_text())
    return versions
