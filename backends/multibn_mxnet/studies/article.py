"""The article's studies in Gluon; ``multibn.article`` runs this module in a separate process."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from multibn.article import facts
from multibn.article.plan import Run
from multibn.article.train import serve
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn_mxnet import BACKEND, BatchNorm

from . import articles_block


class Net:
    """Perceptron with or without BatchNorm; normalised hidden layers have no bias."""

    def __init__(self, run: Run, weights: Sequence[Array]) -> None:
        self.net = gluon.nn.HybridSequential()
        self.hidden: list[dict[str, Any]] = []
        for weight in weights[:-1]:
            dense = linear(weight, bias=not run.norm)
            self.net.add(dense)
            self.hidden.append({"weight": dense.weight})
            if run.norm:
                norm = BatchNorm(len(weight), 2, BatchNormSpec.article())
                norm.initialize()
                self.net.add(norm)
                self.hidden[-1] |= {"gamma": norm.gamma, "beta": norm.beta}
            else:
                self.hidden[-1]["bias"] = dense.bias
            self.net.add(gluon.nn.Activation(run.activation))
        self.net.add(linear(weights[-1], bias=True))
        self.net.hybridize(static_alloc=True)
        self.loss = gluon.loss.SoftmaxCrossEntropyLoss()
        self.trainer = gluon.Trainer(self.net.collect_params(), "sgd", {"learning_rate": run.rate})

    def step(self, x: Array, labels: Array) -> Any:
        """Run forward, backward and an optimizer step; return the loss."""
        with autograd.record():
            loss = self.loss(self.net(mx.nd.array(x)), mx.nd.array(labels)).mean()
        loss.backward()
        self.trainer.step(1)
        return loss.asscalar()

    def predict(self, x: Array) -> Array:
        """Return the predicted classes, using the moving statistics."""
        found: Array = self.net(mx.nd.array(x)).argmax(axis=1).asnumpy()
        return found

    def layers(self) -> list[dict[str, Array]]:
        """Return the parameters of the hidden layers."""
        return [{name: parameter.data().asnumpy() for name, parameter in layer.items()} for layer in self.hidden]


def linear(weight: Array, bias: bool) -> Any:
    """Return a dense layer with these initial weights and bias 0."""
    dense = gluon.nn.Dense(weight.shape[0], use_bias=bias, in_units=weight.shape[1])
    dense.initialize()
    dense.weight.set_data(mx.nd.array(weight))
    return dense


def begins_as_identity(x: Array) -> Array:
    """Return the first output of a block with init="identity"."""
    block = BatchNorm(x.shape[1], x.ndim, init="identity")
    block.initialize()
    with autograd.record():
        y: Array = block(mx.nd.array(x)).asnumpy()
    return y


def beside_the_articles_block(steps: int = 5) -> dict[str, float]:
    """Train our block and the article's on real activations; return the largest relative difference of each result.

    Differences are relative to the result's largest value.
    """
    from multibn.digits import seen

    ours, its = BatchNorm(4, 4, BatchNormSpec.article()), articles_block.BatchNorm(4, 4)
    apart: dict[str, float] = {}
    for block in (ours, its):
        block.initialize()
    for step in range(steps):
        x, dy = (seen(0, step, which) for which in ("x", "y"))
        answers = []
        for block in (ours, its):
            given = mx.nd.array(x)
            given.attach_grad()
            with autograd.record():
                y = block(given)
            y.backward(mx.nd.array(dy))
            moving = (
                (block.moving_mean.data(), block.moving_var.data()) if block is ours else (block.moving_mean, block.moving_var)
            )
            arrays = (y, given.grad, block.gamma.grad(), block.beta.grad(), *moving)
            answers.append([array.asnumpy().ravel().astype(np.float64) for array in arrays])
        for name, a, b in zip(("y", "dx", "dgamma", "dbeta", "moving_mean", "moving_var"), *answers, strict=True):
            apart[name] = max(apart.get(name, 0.0), float(np.abs(a - b).max() / np.abs(a).max()))
    return apart


if __name__ == "__main__":
    SOURCES = {
        "net": inspect.getsource(Net),
        "block": f"{inspect.getsource(articles_block.batch_norm)}\n\n{inspect.getsource(articles_block.BatchNorm)}",
    }
    serve(
        lambda: {
            **facts.of(BACKEND, begins_as_identity),
            "block": beside_the_articles_block(),
            "sources": SOURCES,
        },
        Net,
    )
