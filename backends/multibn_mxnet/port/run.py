"""Run a checkpoint in MXNet, in a separate process: ``python run.py FOLDER``. Needs MXNet and NumPy only.

FOLDER/task.json names the files and the intermediate values to return; FOLDER/inputs-I.npz are the inputs of each run. The
answers are FOLDER/outputs-I.npz (``output0``, ..., ``inner0``, ...) and FOLDER/versions.json.

MXNet's fusion of subgraphs is off, since MXNet 1.9.1 returns wrong intermediate values with it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["MXNET_SUBGRAPH_BACKEND"] = "NONE"
os.environ["DMLC_LOG_STACK_TRACE_DEPTH"] = "0"
warnings.filterwarnings("ignore")  # MXNet 1.9.1 uses functions that NumPy has deprecated

import mxnet as mx  # noqa: E402
import numpy as np  # noqa: E402


def main(folder: Path) -> None:
    """Run the task of a folder."""
    task = json.loads((folder / "task.json").read_text())
    symbol = mx.sym.load(task["symbol"])
    inner = symbol.get_internals()
    wanted = mx.sym.Group([symbol, *[inner[f"{name}_output"] for name in task["inner"]]])
    stored = {name.rpartition(":")[2]: array for name, array in mx.nd.load(task["params"]).items()}
    for run in range(task["runs"]):
        with np.load(folder / f"inputs-{run}.npz") as inputs:
            found = _run(wanted, stored, dict(inputs))
        names = [f"output{i}" for i in range(len(symbol))] + [f"inner{i}" for i in range(len(task["inner"]))]
        np.savez(folder / f"outputs-{run}.npz", **dict(zip(names, found, strict=True)))
    (folder / "versions.json").write_text(json.dumps({"mxnet": mx.__version__, "numpy": np.__version__}))


def _run(wanted: Any, stored: dict[str, Any], inputs: dict[str, Any]) -> list[Any]:
    """Return the outputs in inference; labels, which output layers do not use there, are zeros."""
    shapes, _, _ = wanted.infer_shape(**{name: value.shape for name, value in inputs.items()})
    arguments = {}
    for name, shape in zip(wanted.list_arguments(), shapes, strict=True):
        value = inputs.get(name, stored.get(name))
        arguments[name] = mx.nd.zeros(shape) if value is None else mx.nd.array(value, dtype="float32")
    states = {name: stored[name].astype("float32") for name in wanted.list_auxiliary_states()}
    executor = wanted.bind(mx.cpu(), arguments, aux_states=states, grad_req="null")
    return [output.asnumpy() for output in executor.forward(is_train=False)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
