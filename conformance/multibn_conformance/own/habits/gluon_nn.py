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


def _sync() -> Any:
    from mxnet.gluon.contrib.nn import SyncBatchNorm

    block = SyncBatchNorm(in_channels=3, num_devices=1)
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


def updates_grad_of_beta() -> object:
    """record(), autograd.grad with respect to beta alone: updates."""
    block = _block()
    with autograd.record():
        autograd.grad(block(X), [block.beta.data()])
    nd.waitall()
    return _updates(block)


def updates_sync() -> object:
    """contrib.SyncBatchNorm on one device: updates after a forward; after its backward."""
    block = _sync()
    y = _recorded(block)
    nd.waitall()
    before = _updates(block)
    y.backward()
    nd.waitall()
    return f"{before}; {_updates(block)}"


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


def center_false_gradient() -> object:
    """center=False: whether beta gets a gradient."""
    return _block(center=False).beta.grad_req != "null"


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
    return _without_onednn("eps_zero_constant")


def _without_onednn(question: str) -> str:
    code = "import importlib.util as u; s = u.spec_from_file_location('h', " + repr(__file__) + "); h = u.module_from_spec(s); "
    code += f"s.loader.exec_module(h); print(h.{question}())"
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MXNET_MKLDNN_ENABLED": "0"}, capture_output=True, text=True
    )
    if told.returncode:
        raise RuntimeError(told.stderr.strip().splitlines()[-1])
    return told.stdout.strip()


def _estimator(block: Any, x: Any) -> str:
    block.hybridize()
    _recorded(block, x).backward()
    nd.waitall()
    stored = block.running_var.data().asnumpy() - 0.9
    off = [np.abs(stored / (0.1 * x.asnumpy().astype(np.float64).var((0, 2, 3), ddof=ddof)) - 1).max() for ddof in (0, 1)]
    return "biased" if off[0] < off[1] else "unbiased"


def estimator() -> object:
    """Moving variance: hybridized; under npx.set_np(); of contrib.SyncBatchNorm on one device."""
    told = [_estimator(_block(), X)]
    with mx.util.np_shape(True), mx.util.np_array(True):
        told.append(_estimator(_block(), mx.np.array(X.asnumpy())))
    return "; ".join([*told, _estimator(_sync(), X)])


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


def relu_native() -> object:
    """The same without oneDNN."""
    return _without_onednn("relu")


def double_input() -> object:
    """float64 input to float32 parameters."""
    return _block()(X.astype("float64")).asnumpy().dtype


def bfloat16() -> object:
    """astype("bfloat16") of an array."""
    return X.astype("bfloat16").dtype


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


def names_of_parameters() -> object:
    """Names in a file of collect_params().save(), of a block with the prefix bn_."""
    block = nn.BatchNorm(in_channels=3, prefix="bn_")
    block.initialize()
    with tempfile.TemporaryDirectory() as folder:
        block.collect_params().save(os.path.join(folder, "a"))
        return ", ".join(sorted(nd.load(os.path.join(folder, "a"))))


def names_of_export() -> object:
    """Names in the .params file of export(), of the same."""
    block = nn.BatchNorm(in_channels=3, prefix="bn_")
    block.initialize()
    block.hybridize()
    block(X)
    with tempfile.TemporaryDirectory() as folder:
        block.export(os.path.join(folder, "a"))
        return ", ".join(sorted(nd.load(os.path.join(folder, "a-0000.params"))))


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
    block = _sync()
    x = np.random.default_rng(3).normal(1e4, 1, (64, 3, 4, 4)).astype(np.float32)
    with autograd.train_mode():
        y = block(nd.array(x)).asnumpy()
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((0, 2, 3), keepdims=True)) / np.sqrt(exact.var((0, 2, 3), keepdims=True) + 1e-5)
    return float(np.abs(y - exact).max())
