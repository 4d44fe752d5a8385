"""Gluon's habits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, nd
from mxnet.gluon import nn

X = nd.array(np.random.default_rng(0).normal(3, 2, (6, 3, 4, 5)))


def _block(**options: Any) -> Any:
    block = nn.BatchNorm(in_channels=3, **options)
    block.initialize()
    return block


def _updates(block: Any) -> str:
    """How often the moving mean moved, of one that began at 0 with momentum 0.9."""
    rest = 1 - block.running_mean.data().asnumpy() / X.asnumpy().mean((0, 2, 3))
    return f"{abs(round(float(np.log(rest).mean() / np.log(0.9)), 3)):g}"


def _recorded(block: Any, x: Any = X, train_mode: bool = True) -> Any:
    x.attach_grad()
    with autograd.record(train_mode=train_mode):
        return block(x)


def updates_without_backward() -> object:
    """record() without a backward: updates."""
    block = _block()
    _recorded(block).asnumpy()
    return _updates(block)


def updates_forward_twice() -> object:
    """record(), two forwards, backward of the last: updates."""
    block = _block()
    _recorded(block).asnumpy()
    _recorded(block).backward()
    nd.waitall()
    return _updates(block)


def updates_layer_twice() -> object:
    """The layer twice in one graph, one backward: updates of its moving mean, the second input being the first again."""
    block = _block()
    X.attach_grad()
    with autograd.record():
        y = block(X) + block(X)
    y.backward()
    nd.waitall()
    return _updates(block)


def updates_backward_twice() -> object:
    """backward(retain_graph=True), then again: updates."""
    block = _block()
    y = _recorded(block)
    y.backward(retain_graph=True)
    y.backward()
    nd.waitall()
    return _updates(block)


def updates_backward_of_inference() -> object:
    """record(), backward(train_mode=False): updates."""
    block = _block()
    _recorded(block).backward(train_mode=False)
    nd.waitall()
    return _updates(block)


def updates_train_mode_unrecorded() -> object:
    """train_mode() without record(): updates; what it normalises with."""
    block = _block()
    with autograd.train_mode():
        y = block(X).asnumpy()
    return f"{_updates(block)}; {'the batch' if abs(y.mean()) < 1e-4 else 'the moving statistics'}"


def updates_detached() -> object:
    """record(), the output detached, a loss through beta: updates."""
    block = _block()
    with autograd.record():
        loss = block(X).detach().sum() + block.beta.data().sum()
    loss.backward()
    nd.waitall()
    return _updates(block)


def updates_frozen() -> object:
    """grad_req="null" on all its parameters: updates in a step."""
    block = _block()
    block.collect_params().setattr("grad_req", "null")
    _recorded(block).backward()
    nd.waitall()
    return _updates(block)


def updates_global_stats() -> object:
    """use_global_stats=True: updates in a step; whether gamma gets a gradient."""
    block = _block(use_global_stats=True)
    _recorded(block).backward()
    nd.waitall()
    return f"{_updates(block)}; {'yes' if np.abs(block.gamma.grad().asnumpy()).min() > 0 else 'no'}"


def gradient_after_inference() -> object:
    """record(train_mode=False), plain backward(): the gradient of which formula, at the moving statistics."""
    block = _block(epsilon=1e-5)
    x = X.asnumpy().astype(np.float64)
    dy = np.random.default_rng(1).normal(size=x.shape)
    y = _recorded(block, X, train_mode=False)
    y.backward(nd.array(dy))
    got, m = X.grad.asnumpy(), x.size / 3
    scale = 1 / np.sqrt(1 + 1e-5)
    xhat = x * scale
    sums = dy.sum((0, 2, 3), keepdims=True) / m, (dy * xhat).sum((0, 2, 3), keepdims=True) / m
    train, infer = scale * (dy - sums[0] - xhat * sums[1]), scale * dy
    return "training" if np.abs(got - train).max() < np.abs(got - infer).max() else "inference"


def gamma_overwritten_in_inference() -> object:
    """scale=False, gamma 2 before a forward in inference: gamma after it."""
    block = _block(scale=False)
    block.gamma.set_data(nd.full(3, 2))
    block(X).asnumpy()
    return float(block.gamma.data().asnumpy()[0])


def center_false_adds_beta() -> object:
    """center=False, beta 5: the mean of the output in inference of zeros."""
    block = _block(center=False)
    block.beta.set_data(nd.full(3, 5))
    return float(block(X * 0).asnumpy().mean())


def defaults() -> object:
    """Defaults, in its own words."""
    block = _block()
    return f"epsilon {block._kwargs['eps']:g}, momentum {block._kwargs['momentum']:g}, axis {block._kwargs['axis']}"


def eps_zero() -> object:
    """eps=0 and eps=-1e-6."""
    for eps in (0.0, -1e-6):
        _block(epsilon=eps)(X).asnumpy()
    return "accepted"


def momentum_out_of_range() -> object:
    """momentum -1 and 2."""
    for momentum in (-1.0, 2.0):
        _recorded(_block(momentum=momentum)).backward()
    nd.waitall()
    return "accepted"


def eps_zero_constant() -> object:
    """eps=0 and a constant channel in training: whether the output is NaN; the moving variance after a step."""
    block = _block(epsilon=0.0)
    x = nd.ones((6, 3, 4, 5))
    y = _recorded(block, x)
    y.backward()
    return f"{'yes' if np.isnan(y.asnumpy()).all() else 'no'}; {block.running_var.data().asnumpy()[0]:g}"


def eps_zero_constant_native() -> object:
    """The same without oneDNN."""
    code = "import importlib.util as u; s = u.spec_from_file_location('h', " + repr(__file__) + "); h = u.module_from_spec(s); "
    code += "s.loader.exec_module(h); print(h.eps_zero_constant())"
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MXNET_MKLDNN_ENABLED": "0"}, capture_output=True, text=True
    )
    return told.stdout.strip()


def stored_variance() -> object:
    """A variance of 4e-12 with eps 1e-5 and momentum 0: relative error of what is stored."""
    block = _block(momentum=0.0)
    x = np.random.default_rng(2).normal(0, 2e-6, (64, 3, 4, 4)).astype(np.float32)
    _recorded(block, nd.array(x)).backward()
    nd.waitall()
    var = x.astype(np.float64).var((0, 2, 3))
    return float(np.abs(block.running_var.data().asnumpy() / var - 1).max())


def stored_variance_of_a_constant() -> object:
    """A constant channel with momentum 0: whether the stored variance is below 0."""
    block = _block(momentum=0.0)
    _recorded(block, nd.ones((6, 3, 4, 5))).backward()
    nd.waitall()
    return bool(block.running_var.data().asnumpy().min() < 0)


def empty_batch_np() -> object:
    """An empty batch under npx.set_np(): the moving mean after a step."""
    with mx.util.np_shape(True), mx.util.np_array(True):
        block = nn.BatchNorm(in_channels=3)
        block.initialize()
        x = mx.np.ones((0, 3, 4, 5))
        x.attach_grad()
        with autograd.record():
            y = block(x)
        y.backward()
        return float(block.running_mean.data().asnumpy()[0])


def relu_under_np() -> object:
    """BatchNormReLU under npx.set_np(): whether its output is below 0 somewhere."""
    with mx.util.np_shape(True), mx.util.np_array(True):
        block = nn.BatchNormReLU(in_channels=3)
        block.initialize()
        with autograd.train_mode():
            return bool(block(mx.np.array(X.asnumpy())).asnumpy().min() < 0)


def relu() -> object:
    """BatchNormReLU without it: whether its output is below 0 somewhere."""
    block = nn.BatchNormReLU(in_channels=3)
    block.initialize()
    with autograd.train_mode():
        return bool(block(X).asnumpy().min() < 0)


def cast_half() -> object:
    """cast("float16"): types of gamma and of the moving statistics."""
    block = _block()
    block.cast("float16")
    return f"{block.gamma.data().dtype.__name__}, {block.running_var.data().dtype.__name__}"


def axes() -> object:
    """Axes that it takes for an input of rank 4: of -5 to 4, all that work."""
    taken = []
    for axis in range(-5, 5):
        try:
            block = nn.BatchNorm(axis=axis)
            block.initialize()
            block(X).asnumpy()
            taken.append(axis)
        except (mx.MXNetError, ValueError, IndexError):
            pass
    return ", ".join(map(str, taken))


def ranks() -> object:
    """Ranks that it takes with axis -1."""
    taken = []
    for rank in range(1, 7):
        try:
            block = nn.BatchNorm(axis=-1)
            block.initialize()
            block(nd.ones((4, 3, 2, 2, 2, 2)[:rank])).asnumpy()
            taken.append(rank)
        except mx.MXNetError:
            pass
    return ", ".join(map(str, taken))


def names() -> object:
    """Names in a file of save_parameters()."""
    block = _block()
    with tempfile.TemporaryDirectory() as folder:
        block.save_parameters(os.path.join(folder, "a"))
        return ", ".join(sorted(nd.load(os.path.join(folder, "a"))))


def second_derivative() -> object:
    """The gradient of the gradient."""
    block = _block()
    X.attach_grad()
    with autograd.record():
        y = block(X)
        dx = autograd.grad((y * y).sum(), X, create_graph=True, retain_graph=True)[0]
        loss = (dx * dx).sum()
    loss.backward()
    return "given"


def sync_far_from_zero() -> object:
    """contrib.SyncBatchNorm, values at 1e4 with a spread of 1: the largest error of the output."""
    from mxnet.gluon.contrib.nn import SyncBatchNorm

    block = SyncBatchNorm(in_channels=3, num_devices=1)
    block.initialize()
    x = np.random.default_rng(3).normal(1e4, 1, (64, 3, 4, 4)).astype(np.float32)
    with autograd.train_mode():
        y = block(nd.array(x)).asnumpy()
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((0, 2, 3), keepdims=True)) / np.sqrt(exact.var((0, 2, 3), keepdims=True) + 1e-5)
    return float(np.abs(y - exact).max())
