"""Errors of the Gluon blocks: whole messages, raised by the call, with nothing changed."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")

import multibn_mxnet
from multibn import BatchNormSpec
from multibn_mxnet.framework import operators as by_framework
from multibn_mxnet.operator import callbacks

RANK = (
    "expected input of rank 4, got rank 3, shape (2, 3, 4) (BN-01). The axes are batch, channel, then space; "
    "reshape the input, or use the layer made for its rank."
)
CHANNELS = (
    "expected 3 channels on axis 1, got 4 in input of shape (2, 4, 2, 2) (BN-01). "
    "Build the layer with 4 features, or move the channel axis of the input."
)
INTEGERS = "expected input of type float16, bfloat16, float32, float64, got int32 (BN-10). Convert the input to float32 first."
PARAMETERS = "gamma must be float64 for float64 input, got float32 (BN-10). Cast the layer or the input so that they match."
ONE_VALUE = (
    "Expected more than 1 value per channel when training, got input of shape (1, 3, 1, 1) (BN-12). One value is its own "
    "mean, so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference."
)
BAD = {
    "rank": ((2, 3, 4), "float32", RANK),
    "channels": ((2, 4, 2, 2), "float32", CHANNELS),
    "integers": ((2, 3, 2, 2), "int32", INTEGERS),
    "parameters": ((2, 3, 2, 2), "float64", PARAMETERS),
    "one value": ((1, 3, 1, 1), "float32", ONE_VALUE),
}


def state(block: Any) -> list[Any]:
    return [p.data().asnumpy().tolist() for p in block.collect_params().values()]


@pytest.mark.parametrize("way", ["imperative", "hybridized", "traced before"])
@pytest.mark.parametrize("implementation", ["auto", "composed"])
@pytest.mark.parametrize("case", BAD)
def test_the_message_comes_from_the_call(case: str, implementation: str, way: str) -> None:
    shape, dtype, message = BAD[case]
    block = multibn_mxnet.BatchNorm(3, 4, BatchNormSpec(momentum=None), implementation=implementation)
    block.initialize()
    if way != "imperative":
        block.hybridize()
    if way == "traced before":
        with mx.autograd.record():
            block(mx.nd.ones((2, 3, 2, 2)))
    before = state(block)
    with pytest.raises(mx.base.MXNetError) as error, mx.autograd.record():
        block(mx.nd.ones(shape, dtype=dtype))
    assert str(error.value) == message
    assert state(block) == before


@pytest.mark.parametrize("implementation", ["kernel", "framework"])
@pytest.mark.parametrize("case", BAD)
def test_inside_a_parent_the_message_goes_to_stderr(case: str, implementation: str, capfd: pytest.CaptureFixture[str]) -> None:
    shape, dtype, message = BAD[case]
    net = mx.gluon.nn.HybridSequential()
    net.add(multibn_mxnet.BatchNorm(3, 4, implementation=implementation))
    net.initialize()
    net.hybridize()
    before = state(net)
    with pytest.raises(mx.base.MXNetError), mx.autograd.train_mode():
        net(mx.nd.ones(shape, dtype=dtype)).wait_to_read()
    assert capfd.readouterr().err == f"multibn: {message}\n"
    assert state(net) == before


def test_axis_outside() -> None:
    message = (
        "channel_axis must be from -3 to 2 for input of shape (2, 3, 4), got 3 (BN-01). Give the axis that counts the features."
    )
    block = multibn_mxnet.GluonBatchNorm(axis=3)
    block.initialize()
    with pytest.raises(mx.base.MXNetError, match=f"^{re.escape(message)}$"):
        block(mx.nd.ones((2, 3, 4)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4), ValueError, "num_features must be an integer >= 1, the size of the channel axis, got 0 (BN-01)."),
        ((True, 4), ValueError, "num_features must be an integer >= 1, the size of the channel axis, got True (BN-01)."),
        ((3, 6), ValueError, "num_dims must be 2, 3, 4 or 5, the rank of the input (N, C, ...), got 6 (BN-01)."),
    ],
)
def test_construction(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        multibn_mxnet.BatchNorm(*arguments)


def test_implementations_and_gluon_habits() -> None:
    message = r"^implementation must be 'auto', 'kernel', 'framework', 'composed', got 'gpu'\.$"
    for make in (
        lambda **its: multibn_mxnet.BatchNorm(3, 4, **its),
        multibn_mxnet.GluonBatchNorm,
        multibn_mxnet.GluonBatchNormReLU,
    ):
        with pytest.raises(ValueError, match=message):
            make(implementation="gpu")
    with pytest.raises(ValueError, match=r"^eps must be a finite number > 0, got 0 \(BN-03\)\."):
        multibn_mxnet.GluonBatchNorm(epsilon=0)
    with pytest.raises(ValueError, match=r"^momentum must be a number with 0 <= momentum < 1, or None, got 1 \(BN-05\)\."):
        multibn_mxnet.GluonBatchNorm(momentum=1)


def test_a_layer_that_cannot_be_read(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(mx.base.MXNetError):
        mx.nd.Custom(mx.nd.ones((2, 3)), op_type="multibn", layer="{}")
    assert "KeyError: 'spec'" in capfd.readouterr().err


def test_the_kernel_does_not_run_elsewhere() -> None:
    block = multibn_mxnet.BatchNorm(3, 4, implementation="kernel")
    message = "implementation='kernel' needs x on a CPU, got gpu(0). Use implementation='auto'."
    with pytest.raises(mx.base.MXNetError, match=f"^{re.escape(message)}$"):
        callbacks._ways(block.layer, SimpleNamespace(context=mx.gpu(0)))
    auto = multibn_mxnet.BatchNorm(3, 4)
    assert callbacks._ways(auto.layer, SimpleNamespace(context=mx.gpu(0))) is by_framework
