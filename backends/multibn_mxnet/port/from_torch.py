"""Copy the values of a PyTorch model to a Gluon network."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import mxnet as mx
import numpy as np

from multibn.port.errors import PortError
from multibn.port.report import OUTPUTS
from multibn.port.symbol import read_symbol


def from_torch(net: Any, model: Any, *inputs: Any) -> dict[str, Any]:
    """Fill a Gluon network with a PyTorch model's values, matched by both graphs.

    Args:
        net: a HybridBlock, initialized.
        model: a ``torch.nn.Module``.
        inputs: NumPy arrays, float32, inputs of both.

    Returns:
        Name of each Parameter that was set -> its old value, a NumPy array.

    Raises:
        PortError: the two compute different functions, or cannot be matched (``multibn_torch.port.match``); net is then
            unchanged.
    """
    import torch

    (found,) = entry_points(group="multibn.port", name="to_mxnet")  # this package does not import the one for PyTorch
    to_mxnet = found.load()
    arrays = [mx.nd.array(each) for each in inputs]
    net(*arrays)  # infers the shapes that are not known yet
    names = ["data"] if len(inputs) == 1 else [f"data{i}" for i in range(len(inputs))]
    out = net(*[mx.sym.var(name) for name in names])
    symbol = read_symbol((mx.sym.Group(list(out)) if isinstance(out, (list, tuple)) else out).tojson(), net.name)
    parameters = dict(net.collect_params().items())
    before = {name: parameter.data().asnumpy() for name, parameter in parameters.items()}
    filled = to_mxnet(model, symbol, before, {name: each.shape for name, each in zip(names, inputs, strict=True)})
    for name, parameter in parameters.items():
        parameter.set_data(mx.nd.array(filled[name], dtype=before[name].dtype))
    training = model.training
    with torch.no_grad():
        wanted = _list(model.eval()(*[torch.from_numpy(each) for each in inputs]))
    model.train(training)
    got = _list(net(*arrays))
    apart = max(_distance(a.asnumpy(), b.numpy()) for a, b in zip(got, wanted, strict=True))
    if not apart <= OUTPUTS:
        for name, parameter in parameters.items():
            parameter.set_data(mx.nd.array(before[name], dtype=before[name].dtype))
        raise PortError(f"filled, {net.name} would give outputs {apart:.1e} of the largest away. Nothing was changed.")
    return before


def _list(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _distance(got: Any, wanted: Any) -> float:
    return float(np.abs(got - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))
