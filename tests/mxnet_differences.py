"""What our Gluon blocks refuse or do otherwise than MXNet's own, on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import mxnet as mx


class Difference(NamedTuple):
    """A difference.

    Args:
        what: in few words.
        reason: why.
        do: what to do with a class of blocks; it raises, or returns a value, and shows by that whose the block is.
        own: what MXNet's own block answers, the name of an exception's class if it raises.
        ours: what ours answers.
    """

    what: str
    reason: str
    do: Callable[[Any], object]
    own: object
    ours: object


def _block(kind: Any, **options: Any) -> Any:
    block = kind(in_channels=2, **options)
    block.initialize()
    return block


def _train(kind: Any, x: Any, backward: bool = True, **options: Any) -> Any:
    block = _block(kind, **options)
    with mx.autograd.record():
        y = block(x)
    if backward:
        y.backward()
    mx.nd.waitall()
    return block


def _gamma_after_inference(kind: Any) -> float:
    block = _block(kind, scale=False, gamma_initializer="zeros")
    block(mx.nd.ones((2, 2))).wait_to_read()
    return float(block.gamma.data()[0].asscalar())


def _gradient_of_inference_is_right(kind: Any) -> bool:
    block, x = _block(kind), mx.nd.array([[0, 0], [1, 1]])
    x.attach_grad()
    with mx.autograd.record(train_mode=False):
        y = block(x)
    y.backward()
    return bool((x.grad - 1).abs().max().asscalar() < 1e-3)


def _mean(block: Any) -> float:
    return round(float(block.running_mean.data()[0].asscalar()), 3)


_ONES: Final = mx.nd.ones((3, 2))

DIFFERENCES: Final = [
    Difference(
        "epsilon 0", "a constant channel would divide by zero (BN-03)", lambda kind: _train(kind, _ONES, epsilon=0) and "taken",
        "taken", "ValueError",
    ),
    Difference(
        "momentum 2", "the moving statistics would run away (BN-05)", lambda kind: _train(kind, _ONES, momentum=2.0) and "taken",
        "taken", "ValueError",
    ),
    Difference(
        "one value per channel", "its variance is 0, so the output would be beta whatever the input is (BN-12)",
        lambda kind: _train(kind, mx.nd.ones((1, 2))) and "taken", "taken", "MXNetError",
    ),
    Difference(
        "a vector", "there is no axis to reduce (BN-01)", lambda kind: _train(kind, mx.nd.ones(2), axis=0) and "taken",
        "taken", "MXNetError",
    ),
    Difference(
        "forward without backward", "the moving statistics are those of the batches that were seen (BN-05)",
        lambda kind: _mean(_train(kind, _ONES, backward=False)), 0.0, 0.1,
    ),
    Difference(
        "scale=False", "gamma counts for nothing, so it is left alone (BN-04)", _gamma_after_inference, 1.0, 0.0,
    ),
    Difference(
        "backward of an inference", "the moving statistics are constants there (BN-08)", _gradient_of_inference_is_right, False,
        True,
    ),
]  # fmt: skip
