"""A batch with NaN or Inf in Gluon: one warning per block names the block (BN-11)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")

import multibn_mxnet
from multibn import BatchNormSpec
from multibn.layer.nonfinite import PoisonedBatch, poisoned

IMPLEMENTATIONS = ["kernel", "framework", "composed"]
ONE = (
    "bn, BatchNorm(4): the batch statistics of 1 channel are not finite (2), since the input holds NaN or Inf there. The output "
    "is NaN there; the moving statistics stay as they were (BN-11). Look for the cause in the layers before this one. Shown once "
    "per layer."
)


def made(implementation: str = "auto", spec: BatchNormSpec | None = None, **its: Any) -> Any:
    block = multibn_mxnet.BatchNorm(4, 3, spec, implementation=implementation, prefix="bn_", **its)
    block.initialize()
    return block


def batch(value: float, channels: Any = (2,), size: int = 5, dtype: str = "float32") -> Any:
    values = np.random.RandomState(0).normal(size=(6, 4, size))
    for channel in channels:
        values[3, channel, 1] = value
    return (mx.np if mx.util.is_np_array() else mx.nd).array(values, dtype=dtype)


def told(block: Any, x: Any, training: bool = True) -> list[str]:
    """Return the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught, mx.autograd.record(train_mode=training):
        warnings.simplefilter("always", PoisonedBatch)
        block(x)
    assert all(warning.category is PoisonedBatch for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("moving", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_said_once_and_spoils_nothing(implementation: str, moving: bool, value: float) -> None:
    block = made(implementation, BatchNormSpec(normalize_with="moving" if moving else "batch"))
    assert told(block, batch(0.0)) == []
    before = [block.moving_mean.data().asnumpy(), block.moving_var.data().asnumpy()]
    assert told(block, batch(value)) == [ONE]
    assert told(block, batch(value)) == []
    for old, new in zip(before, (block.moving_mean.data().asnumpy(), block.moving_var.data().asnumpy()), strict=True):
        assert [old[c] == new[c] for c in range(4)] == [c == 2 for c in range(4)]
    assert told(made(implementation), batch(value, range(4))) == [poisoned("bn, BatchNorm(4)", range(4))]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", [5, 1 << 11])
def test_the_kernel_counts_in_every_way(size: int, dtype: str) -> None:  # natively, and by threads
    block = made()
    block.cast(dtype)
    assert told(block, batch(0.0, size=size, dtype=dtype)) == []
    assert told(block, batch(float("nan"), size=size, dtype=dtype)) == [ONE]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_said_in_training_only_and_not_of_parameters(implementation: str) -> None:
    block = made(implementation)
    assert told(block, batch(float("nan")), training=False) == []
    assert told(made(implementation, BatchNormSpec(update_statistics=False)), batch(float("nan"))) == []
    block.beta.set_data(mx.nd.array([0, np.nan, 0, 0]))
    assert told(block, batch(0.0)) == []
    with mx.util.np_shape(True):
        assert told(block, mx.nd.zeros((0, 4, 5))) == []


def test_blocks_of_gluon_in_np_mode_on_another_axis_that_begin_as_the_identity() -> None:
    mx.npx.set_np()
    try:
        for kind in (multibn_mxnet.GluonBatchNorm, multibn_mxnet.GluonBatchNormReLU):
            options: list[dict[str, Any]] = [{}, {"init": "identity"}, {"implementation": "composed"}]
            for more in options:
                block = kind(axis=-1, prefix="bn_", **more)
                block.initialize()
                text = ONE.replace("BatchNorm(4)", f"{kind.__name__}(5)").replace("(2)", "(1)")
                assert told(block, batch(float("nan"))) == [text]
    finally:
        mx.npx.reset_np()


def test_a_half_of_the_other_kind() -> None:
    for implementation in IMPLEMENTATIONS:
        x = mx.nd.amp_cast(batch(float("nan")), dtype=np.dtype([("bfloat16", np.uint16)]))
        assert told(made(implementation), x) == [ONE]


def test_an_error_if_the_program_wants_it_leaves_a_state_to_go_on_with() -> None:
    block = made(spec=BatchNormSpec(momentum=None))
    with warnings.catch_warnings(), mx.autograd.record():
        warnings.simplefilter("error", PoisonedBatch)
        with pytest.raises(PoisonedBatch):
            block(batch(float("nan")))
    assert block.num_batches_tracked.data().asnumpy().tolist() == [1]
    assert np.isfinite(block.running_mean.data().asnumpy()).all()


def test_graphs_are_left_alone() -> None:
    net = mx.gluon.nn.HybridSequential()
    net.add(made())
    net.hybridize()
    assert told(net, batch(float("nan"))) == []
