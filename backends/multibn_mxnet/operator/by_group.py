"""The operator on CPU for a layer that shares its batch with other processes: see ``multibn.sync.passes``.

MXNet runs independent layers concurrently, and their backwards in any order. So each layer has a channel of its own.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from mxnet.base import MXNetError

from multibn.sync import passes
from multibn.sync.group import SyncError
from multibn.sync.passes import Peers, Statistics, SyncSettings
from multibn_mxnet.compat import ADD, NULL
from multibn_mxnet.description import Description, type_name

from . import by_kernel
from .by_kernel import view

_peers: dict[int, Peers] = {}
_registering = threading.Lock()

messages: dict[int, str] = {}
"""``Description.peers`` -> message of the last failed pass, because MXNet raises with a message of its own."""


def register(peers: Peers) -> int:
    """Register the peers of a layer; return the id, from 1 on, by which graphs in this process refer to them."""
    with _registering:
        _peers[len(_peers) + 1] = peers
        return len(_peers)


def forward(
    layer: Description,
    x: Any,
    parameters: dict[str, Any],
    states: list[Any],
    y: Any,
    saved: Any,
    wanted: list[int],
    training: bool,
) -> None:
    """``by_kernel.forward`` with the statistics of all ranks; the last row of saved holds their number of values plus 1."""
    if not layer.spec.uses_batch(training):
        by_kernel.forward(layer, x, parameters, states, y, saved, wanted, training)
        return
    try:
        values, its_y, gamma, beta, mean, var, batches, its_saved = by_kernel.views(
            layer, x, parameters, states, y, saved, wanted
        )
        by_kernel.check_apart(running_mean=mean, running_var=var, gamma=gamma, beta=beta, x=values)
    except MXNetError as error:
        refuse(layer, layer.by_channel(x.shape)[1], x, str(error))
        raise
    how = _how(layer, int(batches[0]))
    batch = _said(layer, lambda: passes.describe(values, _of(layer), how, True, moving=(mean, var)))
    if batch.m and how.update:
        passes.move(batch, mean, var)
        batches += 1
    its_saved[:2], its_saved[2] = batch.saved, batch.m + 1 if how.use_batch else 0
    out = np.empty_like(values) if wanted[0] in (NULL, ADD) else its_y
    passes.normalise(values, out, gamma, beta, batch.saved)
    if wanted[0] == ADD:
        by_kernel.add(its_y, out)


def backward(
    layer: Description, dy: Any, x: Any, parameters: dict[str, Any], saved: Any, gradients: dict[str, Any], wanted: dict[str, int]
) -> None:
    """``by_kernel.backward`` with the sums of all ranks for dx; the gradients of gamma and beta are this rank's own (SY-06)."""
    shape, its_type = layer.by_channel(x.shape), type_name(x)
    its_saved = view("saved", saved, "float64", (3, shape[1]))
    if not its_saved[2].any():
        by_kernel.backward(layer, dy, x, parameters, saved, gradients, wanted)
        return
    values, dys = view("x", x, its_type, shape), view("the head gradient", dy, its_type, shape, x)
    targets = by_kernel.targets(layer, x, gradients, wanted)
    m, nothing = int(its_saved[2, 0]) - 1, np.zeros(shape[1])
    batch = Statistics(m, its_saved[0], nothing, its_saved[:2], _how(layer, 0))
    gamma = by_kernel.vector(layer, parameters, "gamma", x)
    found = _said(layer, lambda: passes.gradients(values, dys, gamma, batch, _of(layer), True))
    assert found.means is not None
    if wanted["x"] != NULL:
        direct = wanted["x"] != ADD
        dx = targets["x"] if direct else np.empty(shape, values.dtype)
        passes.propagate(values, dys, dx, found.means, batch)
        if not direct:
            by_kernel.add(targets["x"], dx)
    by_kernel.write_sums(layer, targets, wanted, {"gamma": found.dgamma, "beta": found.dbeta})


def refuse(layer: Description, channels: int, x: Any, problem: str) -> None:
    """Tell the other ranks that this rank refuses its input (SY-08)."""
    passes.refuse(_of(layer), channels, type_name(x), MXNetError(problem), _how(layer, 0))


def _of(layer: Description) -> Peers:
    if layer.peers not in _peers:
        raise MXNetError(
            "this graph was made in another process: a SyncBatchNorm in it can be used in inference, not in training. Build the "
            "network anew, with a group, and load its parameters."
        )
    return _peers[layer.peers]


def _how(layer: Description, batches: int) -> SyncSettings:
    spec = layer.spec
    update = spec.update_statistics
    old = spec.weight_of_old(batches) if update else 0.0
    return SyncSettings(spec.eps, old, spec.moving_variance == "unbiased", spec.normalize_with == "batch", update)


def _said(layer: Description, function: Any) -> Any:
    """Call a pass and return the result; raise an error as MXNetError, and keep the message in ``messages``."""
    try:
        return function()
    except (SyncError, ValueError) as error:
        messages[layer.peers] = str(error)
        raise MXNetError(str(error)) from None
