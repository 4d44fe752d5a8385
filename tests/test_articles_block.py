"""The article's own Gluon block gives the same numbers as the specification, within the bound of float32 arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")
pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from multibn import BatchNormSpec
from multibn.layer.types import Array
from multibn_conformance.cases.case import ALL_GRADIENTS, MOVING, back, case, infer, train, usual
from multibn_conformance.judging.judge import judge_maker
from multibn_mxnet.studies.article import beside_the_articles_block
from multibn_mxnet.studies.articles_block import BatchNorm


class TheArticles:
    """The block as a subject of the conformance suite."""

    rank = 4

    def __init__(self, num_features: int, spec: BatchNormSpec) -> None:
        self.block = BatchNorm(num_features, self.rank)
        self.block.initialize()
        self.shape = self.block.gamma.shape

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        self.block.gamma.set_data(mx.nd.array(gamma.reshape(self.shape)))
        self.block.beta.set_data(mx.nd.array(beta.reshape(self.shape)))
        self.block.moving_mean, self.block.moving_var = (mx.nd.array(a.reshape(self.shape)) for a in (moving_mean, moving_var))

    def forward(self, x: Array, training: bool) -> Array:
        self.x = mx.nd.array(x)
        self.x.attach_grad()
        with mx.autograd.record(train_mode=training):
            self.y = self.block(self.x)
        y: Array = self.y.asnumpy()
        return y

    def backward(self, dy: Array) -> tuple[Array, Array, Array]:
        self.y.backward(mx.nd.array(dy))
        return self.x.grad.asnumpy(), self.block.gamma.grad().asnumpy().ravel(), self.block.beta.grad().asnumpy().ravel()

    def moving(self) -> tuple[Array, Array]:
        return self.block.moving_mean.asnumpy().ravel(), self.block.moving_var.asnumpy().ravel()


class Dense(TheArticles):
    rank = 2


class Inverted(TheArticles):
    """The block with momentum as the weight of the new value."""

    def forward(self, x: Array, training: bool) -> Array:
        old = self.block.moving_mean
        y = super().forward(x, training)
        self.block.moving_mean = old + (self.block.moving_mean - old) * 9
        return y


def judged(make: Any) -> str:
    rank = make.rank
    steps = (train(usual(rank, seed=s), "y", *MOVING) for s in range(2))
    spec = BatchNormSpec.article()
    tried = case(
        "BN-05", "article", "", "", *steps, back(usual(rank, seed=2), *ALL_GRADIENTS), infer(usual(rank), "y"), spec=spec
    )
    return judge_maker(make, tried, "article/own/cpu", "working").status


def test_it_is_the_specification_in_float32() -> None:
    """Outputs, gradients, moving statistics and inference, within the suite's bound for working arithmetic."""
    assert judged(TheArticles) == judged(Dense) == "pass"
    assert judged(Inverted) == "fail"


def test_beside_ours_on_real_activations() -> None:
    """Two float32 sums of m = 1024 values, each with an error of less than m roundings in the worst case, and about 3 in
    practice.
    """
    assert max(beside_the_articles_block().values()) < 2 * 1024 * 2**-24


def test_its_moving_statistics_go_where_the_input_is() -> None:
    block = BatchNorm(3, 4)
    block.initialize(ctx=mx.cpu(1))
    with mx.autograd.record():
        block(mx.nd.arange(24, ctx=mx.cpu(1)).reshape((2, 3, 2, 2)))
    assert block.moving_mean.context == block.moving_var.context == mx.cpu(1)
    assert block.moving_mean.asnumpy().ravel()[0] == pytest.approx(0.1 * 7.5, rel=2**-22)
