"""Gluon's habits: parameters, input, names. When its statistics move is in ``gluon_nn_updates``."""

from __future__ import annotations

import inspect
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


def _recorded(block: Any, x: Any = X, train_mode: bool = True) -> Any:
    x.attach_grad()
    with autograd.record(train_mode=train_mode):
        return block(x)


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
    known = inspect.signature(nn.BatchNorm).parameters
    switches = ", ".join(f"{name} {known[name].default}" for name in ("center", "scale", "use_global_stats"))
    numbers = f"epsilon {block._kwargs['eps']:g}, momentum {block._kwargs['momentum']:g}, axis {block._kwargs['axis']}"
    return f"{numbers}, {switches}"


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
    """eps=0 and a constant channel in training: its output and dx; the moving variance after a step."""
    block = _block(epsilon=0.0)
    x = nd.ones((6, 3, 4, 5))
    y = _recorded(block, x)
    y.backward()
    told = [", ".join(sorted({f"{abs(each):g}" for each in a.asnumpy().ravel()})) for a in (y, x.grad)]
    return f"{'; '.join(told)}; {block.running_var.data().asnumpy()[0]:g}"


def eps_zero_constant_native() -> object:
    """The same without oneDNN."""
    return _without_onednn("eps_zero_constant")


def _without_onednn(question: str) -> str:
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import gluon_nn as h; print(h.{question}())"
    settings = {**os.environ, "MXNET_MKLDNN_ENABLED": "0"}
    told = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(told.stderr.strip().splitlines()[-1])
    return told.stdout.strip()


def one_value() -> object:
    """One value per channel, gamma 2, beta 3, in training: output; dx."""
    block = _block()
    block.gamma.set_data(nd.full(3, 2))
    block.beta.set_data(nd.full(3, 3))
    x = nd.array([[5, 6, 7]])
    y = _recorded(block, x)
    y.backward(nd.array([[1, 2, 4]]))
    return f"{y.asnumpy()[0].tolist()}; {x.grad.asnumpy()[0].tolist()}"


def poison() -> object:
    """A NaN, and an infinity, in the first channel: the moving statistics after a step; whether the others' output is finite."""
    told = []
    for value in (float("nan"), float("inf")):
        x = X.asnumpy().copy()
        x[0, 0, 0, 0] = value
        block = _block()
        y = _recorded(block, nd.array(x))
        y.backward()
        moved = [each.data().asnumpy()[0] for each in (block.running_mean, block.running_var)]
        told.append(f"{moved[0]:g}, {moved[1]:g}, {'yes' if np.isfinite(y.asnumpy()[:, 1:]).all() else 'no'}")
    return "; ".join(told)


def poison_native() -> object:
    """The same without oneDNN."""
    return _without_onednn("poison")


def _estimator(block: Any, x: Any) -> str:
    block.hybridize()
    _recorded(block, x).backward()
    nd.waitall()
    stored = block.running_var.data().asnumpy() - 0.9
    off = [np.abs(stored / (0.1 * x.asnumpy().astype(np.float64).var((0, 2, 3), ddof=ddof)) - 1).max() for ddof in (0, 1)]
    return "biased" if off[0] < off[1] else "unbiased"


def estimator() -> object:
    """Moving variance: hybridized; under npx.set_np(); of contrib.SyncBatchNorm on one device; without oneDNN."""
    told = [_estimator(_block(), X)]
    with mx.util.np_shape(True), mx.util.np_array(True):
        told.append(_estimator(_block(), mx.np.array(X.asnumpy())))
    return "; ".join([*told, _estimator(_sync(), X), _without_onednn("_estimated")])


def _estimated() -> str:
    return _estimator(_block(), X)


def stored_variance() -> object:
    """A variance of 4e-6, 4e-8, 4e-12, with eps 1e-5 and momentum 0: relative error of what is stored."""
    told = []
    for std in (2e-3, 2e-4, 2e-6):
        block = _block(momentum=0.0)
        x = np.random.default_rng(2).normal(0, std, (64, 3, 4, 4)).astype(np.float32)
        _recorded(block, nd.array(x)).backward()
        nd.waitall()
        var = x.astype(np.float64).var((0, 2, 3))
        told.append(f"{np.abs(block.running_var.data().asnumpy() / var - 1).max():.2g}")
    return ", ".join(told)


def stored_variance_of_a_constant() -> object:
    """A constant channel with momentum 0: the stored variance for eps 1e-5, 1e-3."""
    told = []
    for eps in (1e-5, 1e-3):
        block = _block(momentum=0.0, epsilon=eps)
        _recorded(block, nd.ones((6, 3, 4, 5))).backward()
        nd.waitall()
        told.append(f"{block.running_var.data().asnumpy().min():.2g}")
    return ", ".join(told)


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
    return _second(_block())


def _second(block: Any) -> str:
    X.attach_grad()
    with autograd.record():
        y = block(X)
        dx = autograd.grad((y * y).sum(), X, create_graph=True, retain_graph=True)[0]
        loss = (dx * dx).sum()
    loss.backward()
    return "given"


def _far(make: Any) -> str:
    told = []
    for offset in (1e2, 1e3, 1e4):
        x = np.random.default_rng(3).normal(offset, 1, (64, 3, 4, 4)).astype(np.float32)
        with autograd.train_mode():
            y = make()(nd.array(x)).asnumpy()
        exact = x.astype(np.float64)
        exact = (exact - exact.mean((0, 2, 3), keepdims=True)) / np.sqrt(exact.var((0, 2, 3), keepdims=True) + 1e-5)
        told.append(f"{np.abs(y - exact).max():.2g}")
    return ", ".join(told)


def far_from_zero() -> object:
    """Values at 1e2, 1e3, 1e4 with a spread of 1: the largest error of the output."""
    return _far(_block)


def far_from_zero_native() -> object:
    """The same without oneDNN."""
    return _without_onednn("far_from_zero")


def sync_far_from_zero() -> object:
    """The same of contrib.SyncBatchNorm."""
    return _far(_sync)


def sync_defaults() -> object:
    """contrib.SyncBatchNorm: its defaults."""
    from mxnet.gluon.contrib.nn import SyncBatchNorm

    known = inspect.signature(SyncBatchNorm).parameters
    return ", ".join(f"{name} {known[name].default}" for name in ("momentum", "epsilon", "center", "scale", "use_global_stats"))


def sync_axis() -> object:
    """contrib.SyncBatchNorm with axis=3."""
    from mxnet.gluon.contrib.nn import SyncBatchNorm

    return SyncBatchNorm(in_channels=5, num_devices=1, axis=3).name


def sync_half() -> object:
    """contrib.SyncBatchNorm, float16 input after cast("float16"): type of the output."""
    block = _sync()
    block.cast("float16")
    with autograd.train_mode():
        y = block(X.astype("float16"))
    return y.asnumpy().dtype


def sync_second_derivative() -> object:
    """contrib.SyncBatchNorm: the gradient of the gradient."""
    return _second(_sync())
