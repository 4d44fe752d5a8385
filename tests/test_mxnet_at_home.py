"""MXNet's own unit tests of BatchNorm, applied to our blocks, and typical programs.

After ``tests/python/unittest/test_operator.py`` (``test_batchnorm_training``, ``test_batchnorm``) and ``test_gluon.py``
(``test_batchnorm``, ``test_batchnorm_16c``, ``test_slice_batchnorm``, ``test_reshape_batchnorm``, ``test_fill_shape_deferred``,
``test_cast``, ``test_summary``) of apache/mxnet 1.9.1, with their tolerances. ``mxnet_differences.py`` says what is not as there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")

from mxnet.test_utils import assert_almost_equal, check_numeric_gradient
from mxnet_differences import DIFFERENCES, Difference

import multibn_mxnet
from multibn_mxnet import GluonBatchNorm


def answer(difference: Difference, kind: Any) -> object:
    try:
        return difference.do(kind)
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.what)
def test_the_differences_are_what_they_are_said_to_be(difference: Difference) -> None:
    assert answer(difference, mx.gluon.nn.BatchNorm) == difference.own
    assert answer(difference, GluonBatchNorm) == difference.ours
    assert difference.own != difference.ours


@pytest.mark.parametrize("use_global_stats", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 3), 1), ((2, 3, 2, 2), 1), *(((2, 3, 2, 2, 2), axis) for axis in (0, 1, 2, 3, 4, -1))], ids=str
)
def test_the_gradient_is_the_numeric_one(shape: tuple[int, ...], axis: int, scale: bool, use_global_stats: bool) -> None:
    random = np.random.RandomState(0)
    block = GluonBatchNorm(axis=axis, scale=scale, use_global_stats=use_global_stats, epsilon=1e-3, prefix="bn_")
    x, channels = random.normal(-0.1, 0.1, shape), shape[axis]
    arguments = {"data": x, "bn_gamma": np.linspace(1, 3, channels), "bn_beta": np.linspace(3, 1, channels)}
    states = {f"bn_running_{name}": random.uniform(size=channels) for name in ("mean", "var")}
    as_arrays = [{name: mx.nd.array(value) for name, value in its.items()} for its in (arguments, states)]
    check_numeric_gradient(block(mx.sym.var("data")), *as_arrays, numeric_eps=1e-2, rtol=0.16, atol=1e-2)


@pytest.mark.parametrize("shape", [(24, 2), (24, 3, 4), (24, 4, 4, 4), (24, 8, 4, 4), (24, 5, 6, 4, 4)], ids=str)
@pytest.mark.parametrize("hybrid", [False, True])
def test_ten_steps_on_every_axis(shape: tuple[int, ...], hybrid: bool) -> None:
    for axis in range(len(shape)):
        block = GluonBatchNorm(axis=axis, in_channels=shape[axis])
        block.initialize()
        block.hybridize(hybrid)
        others, row = tuple(i for i in range(len(shape)) if i != axis), [1] * len(shape)
        row[axis] = shape[axis]
        mean, var = np.zeros(shape[axis]), np.ones(shape[axis])
        for step in range(10):
            x = mx.nd.array(np.random.RandomState(step).uniform(size=shape))
            dy = mx.nd.array(np.random.RandomState(100 + step).uniform(size=shape))
            x.attach_grad()
            with mx.autograd.record():
                y = block(x)
            y.backward(dy)
            values, slopes = x.asnumpy().astype("d"), dy.asnumpy().astype("d")
            batch_mean, batch_var = values.mean(axis=others), values.var(axis=others)
            mean, var = 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * batch_var
            std = np.sqrt(batch_var + 1e-5).reshape(row)
            xhat = (values - batch_mean.reshape(row)) / std
            dx = slopes - slopes.mean(axis=others).reshape(row) - xhat * (slopes * xhat).mean(axis=others).reshape(row)
            assert_almost_equal(y.asnumpy(), xhat, atol=1e-5, rtol=1e-5)
            assert_almost_equal(x.grad.asnumpy(), dx / std, atol=1e-4, rtol=1e-4)
            assert_almost_equal(block.gamma.grad().asnumpy(), (slopes * xhat).sum(axis=others), atol=1e-3, rtol=1e-4)
            assert_almost_equal(block.beta.grad().asnumpy(), slopes.sum(axis=others), atol=1e-4, rtol=1e-4)
            assert_almost_equal(block.running_mean.data().asnumpy(), mean, atol=1e-5, rtol=1e-5)
            assert_almost_equal(block.running_var.data().asnumpy(), var, atol=1e-5, rtol=1e-5)


class Reshaped(mx.gluon.HybridBlock):  # type: ignore[misc,name-defined]
    """Make a convolution and our block, with the input and the intermediate value sliced or reshaped, as in MXNet's tests."""

    def __init__(self, how: str, kind: Any) -> None:
        super().__init__()
        self.how = how
        with self.name_scope():
            self.conv, self.bn = mx.gluon.nn.Conv2D(16, (3, 3)), kind()

    def _do(self, F: Any, x: Any) -> Any:
        return F.reshape(x, shape=(8, -1, 16, 16)) if self.how == "reshape" else F.slice(x, begin=(0, 0, 1), end=(4, 4, 9))

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.bn(self.conv(self._do(F, x)))


@pytest.mark.parametrize("how", ["reshape", "slice"])
def test_sliced_and_reshaped_input_is_the_same_hybridized(how: str) -> None:
    found = []
    for hybrid in (None, {}, {"static_alloc": True, "static_shape": True}):
        net = Reshaped(how, GluonBatchNorm)
        mx.random.seed(5)
        net.initialize(mx.init.Xavier())
        if hybrid is not None:
            net.hybridize(**hybrid)
        x = mx.nd.array(np.random.RandomState(0).uniform(size=(4, 16, 16, 16)))
        x.attach_grad()
        with mx.autograd.record():
            y = net(x)
        y.backward()
        found.append((y.asnumpy(), x.grad.asnumpy(), net.bn.running_var.data().asnumpy()))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_almost_equal(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [16, 1024])
def test_many_channels_after_a_convolution(channels: int) -> None:
    for shape in ((1, 8, 8, 8), (4, 8, 16, 8)):
        found = []
        for hybrid in (False, True):
            net = mx.gluon.nn.HybridSequential()
            net.add(mx.gluon.nn.Conv2D(channels, 3), GluonBatchNorm())
            mx.random.seed(5)
            net.initialize(mx.init.Xavier())
            net.hybridize(hybrid)
            with mx.autograd.record():
                y = net(mx.nd.array(np.random.RandomState(0).uniform(size=shape)))
            y.backward()
            found.append((y.asnumpy(), net[0].weight.grad().asnumpy()))
        for a, b in zip(*found, strict=True):
            assert_almost_equal(a, b, rtol=1e-4, atol=1e-3)


def test_shapes_are_filled_in_and_the_summary_counts() -> None:
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Conv2D(64, kernel_size=2, padding=1), mx.gluon.nn.BatchNorm(), mx.gluon.nn.Dense(10))
    multibn_mxnet.swap(net)
    net.initialize()
    net.summary(mx.nd.ones((2, 3, 5, 7)))
    net.hybridize()
    net(mx.nd.ones((2, 3, 5, 7)))
    assert net[1].gamma.shape[0] == net[1].running_var.shape[0] == 64


def test_a_half_net_keeps_its_statistics() -> None:
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Flatten(), mx.gluon.nn.BatchNorm())
    multibn_mxnet.swap(net)
    net.initialize()
    net.cast("float16")
    net.hybridize()
    assert net(mx.nd.ones((2, 3), dtype="float16")).asnumpy().dtype == np.float16
    assert net[1].running_mean.dtype == "float32"


@pytest.mark.parametrize("hybrid", [False, True])
def test_trainer_with_gradients_asked_for_by_name_and_requests_add_and_null(hybrid: bool) -> None:
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Dense(4, in_units=3), GluonBatchNorm(in_channels=4), mx.gluon.nn.Dense(2, in_units=4))
    net.initialize()
    net.hybridize(hybrid)
    net[1].gamma.grad_req, net[1].beta.grad_req = "add", "null"
    x = mx.nd.array(np.random.RandomState(0).normal(size=(8, 3)))

    def loss() -> Any:
        with mx.autograd.record():
            return net(x).square().sum()

    by_name = mx.autograd.grad(loss(), net[1].gamma.data())[0].asnumpy()
    np.testing.assert_array_equal(net[1].gamma.grad().asnumpy(), np.zeros(4, "f"))
    for _ in range(2):
        loss().backward()
    np.testing.assert_allclose(net[1].gamma.grad().asnumpy(), 2 * by_name, rtol=1e-6)
    mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.5}).step(1)
    np.testing.assert_allclose(net[1].gamma.data().asnumpy(), 1 - by_name, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(net[1].beta.data().asnumpy(), np.zeros(4, "f"))


_PROGRAM = """
import sys
sys.modules["torch"] = None  # GluonCV refuses a PyTorch as new as ours, and does without
import json, numpy as np, mxnet as mx, multibn_mxnet
from sklearn.datasets import load_digits

name, file = sys.argv[1:]
if "cifar" in name or "mobilenetv2" in name:
    from gluoncv.model_zoo import get_model
else:
    from mxnet.gluon.model_zoo.vision import get_model
digits = load_digits()
images = np.repeat(np.repeat(np.repeat(digits.images[:, None] / 16, 3, 1), 4, 2), 4, 3).astype("f")
mx.random.seed(0)
net = get_model(name, classes=10)
net.initialize(mx.init.Xavier())
swapped = multibn_mxnet.swap(net)
net.hybridize()
trainer = mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1, "momentum": 0.9})
loss, losses = mx.gluon.loss.SoftmaxCrossEntropyLoss(), []
for step in range(20):
    its = slice(32 * step, 32 * step + 32)
    with mx.autograd.record():
        error = loss(net(mx.nd.array(images[its])), mx.nd.array(digits.target[its]))
    error.backward()
    trainer.step(32)
    losses.append(float(error.mean().asscalar()))
net.save_parameters(file)
before = net(mx.nd.array(images[640:704])).asnumpy()
again = get_model(name, classes=10)
multibn_mxnet.swap(again)
again.load_parameters(file)
again.hybridize()
after = again(mx.nd.array(images[640:704])).asnumpy()
print(json.dumps({"swapped": len(swapped), "losses": losses, "same": bool((before == after).all())}))
"""


@pytest.mark.parametrize("name", ["cifar_resnet20_v1", "mobilenetv2_0.25", "mobilenet0.25"])
def test_real_programs_train_on_digits(name: str, tmp_path: Path) -> None:
    if "cifar" in name or "mobilenetv2" in name:
        pytest.importorskip("autocfg", reason="GluonCV is not installed")
    command = [sys.executable, "-c", _PROGRAM, name, str(tmp_path / "p")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["swapped"] > 15
    assert found["same"]
    assert np.isfinite(found["losses"]).all()
    if "resnet" in name:  # the others need more than 20 steps
        assert np.mean(found["losses"][-5:]) < 0.5 * np.mean(found["losses"][:3]), found["losses"]
