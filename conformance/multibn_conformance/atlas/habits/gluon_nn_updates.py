"""Gluon's habits: when its moving statistics move, and which gradient comes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, nd
from mxnet.gluon import nn

X = nd.array(np.random.default_rng(0).normal(3, 2, (6, 3, 4, 5)))
TRAINED: Sequence[dict[str, bool]] = ({},)
"""One backward with its defaults."""


def _block(**options: Any) -> Any:
    block = nn.BatchNorm(in_channels=3, **options)
    block.initialize()
    return block


def _updates(block: Any) -> str:
    """How often the moving mean moved, of one that began at 0 with momentum 0.9."""
    mx.nd.waitall()
    rest = 1 - block.running_mean.data().asnumpy() / X.asnumpy().mean((0, 2, 3))
    return f"{abs(round(float(np.log(rest).mean() / np.log(0.9)), 3)):g}"


def _recorded(block: Any, x: Any = X, train_mode: bool = True) -> Any:
    x.attach_grad()
    with autograd.record(train_mode=train_mode):
        return block(x)


def _trained(block: Any, backwards: Sequence[dict[str, bool]] = TRAINED, twice: bool = False, x: Any = X) -> str:
    """Updates of one that is recorded, as often as given differentiated."""
    y = _recorded(lambda x: block(x) + block(x), x) if twice else _recorded(block, x)
    for options in backwards:
        y.backward(**options)
    return _updates(block)


def updates_without_backward() -> object:
    """record() without a backward: updates."""
    return _trained(_block(), ())


def updates_forward_twice() -> object:
    """record(), two forwards, backward of the last: updates."""
    block = _block()
    _trained(block, ())
    return _trained(block)


def updates_layer_twice() -> object:
    """The layer twice in one graph, one backward: updates of its moving mean, the second input being the first again."""
    return _trained(_block(), twice=True)


def updates_backward_twice() -> object:
    """backward(retain_graph=True), then again: updates."""
    return _trained(_block(), ({"retain_graph": True}, {}))


def updates_backward_of_inference() -> object:
    """record(), backward(train_mode=False): updates."""
    return _trained(_block(), ({"train_mode": False},))


def _all(make: Any = _block, x: Any = X) -> str:
    kinds: Any = ((), TRAINED, ({"retain_graph": True}, {}), ({"train_mode": False},))
    return ", ".join([*(_trained(make(), kind, x=x) for kind in kinds), _trained(make(), twice=True, x=x)])


def updates_of_all() -> object:
    """Updates without a backward, with one, with retain_graph=True and another, with train_mode=False, with the layer twice."""
    return _all()


def updates_of_all_hybridized() -> object:
    """The same, hybridized."""

    def make() -> Any:
        block = _block()
        block.hybridize()
        return block

    return _all(make)


def updates_of_all_np() -> object:
    """The same under npx.set_np()."""
    with mx.util.np_shape(True), mx.util.np_array(True):
        return _all(x=mx.np.array(X.asnumpy()))


def updates_of_all_native() -> object:
    """The same without oneDNN."""
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import gluon_nn_updates as h; print(h.updates_of_all())"
    )
    settings = {**os.environ, "MXNET_MKLDNN_ENABLED": "0"}
    told = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    return told.stdout.strip()


def _not_recorded(*modes: AbstractContextManager[Any]) -> str:
    """Updates of a forward in these modes, and what it normalises with."""
    block = _block()
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        y = block(X).asnumpy()
    return f"{_updates(block)}; {'the batch' if abs(y.mean()) < 1e-4 else 'the moving statistics'}"


def updates_train_mode_unrecorded() -> object:
    """train_mode() without record(): updates; what it normalises with."""
    return _not_recorded(autograd.train_mode())


def updates_pause_in_training() -> object:
    """pause(train_mode=True) within record(): the same."""
    return _not_recorded(autograd.record(), autograd.pause(train_mode=True))


def updates_pause() -> object:
    """pause() within record(): the same."""
    return _not_recorded(autograd.record(), autograd.pause())


def updates_unrecorded() -> object:
    """None of these: the same."""
    return _not_recorded()


def updates_detached() -> object:
    """record(), the output detached, a loss through beta: updates."""
    block = _block()
    with autograd.record():
        loss = block(X).detach().sum() + block.beta.data().sum()
    loss.backward()
    return _updates(block)


def updates_grad_of_beta() -> object:
    """record(), autograd.grad with respect to beta alone: updates."""
    block = _block()
    with autograd.record():
        autograd.grad(block(X), [block.beta.data()])
    return _updates(block)


def updates_frozen() -> object:
    """grad_req="null" on all its parameters: updates in a step."""
    block = _block()
    block.collect_params().setattr("grad_req", "null")
    return _trained(block)


def updates_global_stats() -> object:
    """use_global_stats=True: updates in a step; whether gamma gets a gradient."""
    block = _block(use_global_stats=True)
    return f"{_trained(block)}; {'yes' if np.abs(block.gamma.grad().asnumpy()).min() > 0 else 'no'}"


def updates_sync() -> object:
    """contrib.SyncBatchNorm on one device: updates after a forward; after its backward."""
    from mxnet.gluon.contrib.nn import SyncBatchNorm

    block = SyncBatchNorm(in_channels=3, num_devices=1)
    block.initialize()
    return f"{_trained(block, ())}; {_trained(block)}"


def updates_inference() -> object:
    """record(train_mode=False), backward(train_mode=False): updates; the gradient of which formula."""
    block = _block()
    _recorded(block, X, train_mode=False).backward(train_mode=False)
    return f"{_updates(block)}; {_formula(forward=False, backward=False)}"


def updates_inference_backward() -> object:
    """record(train_mode=False), plain backward(): largest relative change of the moving statistics, loaded 5 and 9."""
    block = _block()
    block.running_mean.set_data(nd.full(3, 5))
    block.running_var.set_data(nd.full(3, 9))
    _recorded(block, X, train_mode=False).backward()
    nd.waitall()
    loaded = ((block.running_mean, 5), (block.running_var, 9))
    return max(float(np.abs(each.data().asnumpy() / value - 1).max()) for each, value in loaded)


def _formula(forward: bool, backward: bool) -> str:
    """Of the gradient, for a forward and a backward in training or in inference, beside loaded statistics 0 and 1."""
    x = X.asnumpy().astype(np.float64)
    dy = np.random.default_rng(1).normal(size=x.shape)
    _recorded(_block(epsilon=1e-5), X, train_mode=forward).backward(nd.array(dy), train_mode=backward)
    found = {}
    for name, mean, var in (
        ("batch", x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)),
        ("moving", 0, np.ones((1, 3, 1, 1))),
    ):
        scale = 1 / np.sqrt(var + 1e-5)
        xhat = (x - mean) * scale
        sums = [(dy * each).mean((0, 2, 3), keepdims=True) for each in (np.ones_like(x), xhat)]
        found[f"training, at the {name} statistics"] = scale * (dy - sums[0] - xhat * sums[1])
        found[f"inference, at the {name} statistics"] = np.broadcast_to(scale * dy, x.shape)
    return min(found, key=lambda name: float(np.abs(X.grad.asnumpy() - found[name]).max()))


def gradient_after_inference() -> object:
    """record(train_mode=False), plain backward(): the gradient of which formula."""
    return _formula(forward=False, backward=True)


def gradient_for_inference() -> object:
    """record(), backward(train_mode=False): the gradient of which formula."""
    return _formula(forward=True, backward=False)
