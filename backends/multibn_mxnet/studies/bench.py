"""Benchmarks of Gluon for ``multibn bench``: forward and backward in training, forward in inference; steps of networks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import mxnet as mx

from multibn.bench.contest import Contest, serve
from multibn.bench.inputs import COMMON, MODELS, SMALL
from multibn.bench.result import Input
from multibn_mxnet.block import GluonBatchNorm
from multibn_mxnet.direct import output_memory
from multibn_mxnet.swap import swap

INPUTS = (*COMMON, *(Input("small", shape, hybridized=True) for shape in SMALL))
"""Inputs of the layer benchmarks."""


def contest(given: Input) -> Contest:
    """Return the contest for an input: of models if the input names one, else of layers."""
    return contest_of_models(given) if given.model else contest_of_layers(given)


def contest_of_layers(given: Input) -> Contest:
    """Compare ours, Gluon's own and a copy on the same x. ``attach_grad`` allocates the gradient of x beforehand."""
    x, dy = (mx.nd.random.normal(shape=given.shape) for _ in range(2))
    if given.training:
        x.attach_grad()
    blocks = {"ours": GluonBatchNorm(in_channels=x.shape[1]), "own": mx.gluon.nn.BatchNorm(in_channels=x.shape[1])}
    for block in blocks.values():
        block.initialize()
        block.hybridize(given.hybridized)
    mx.nd.waitall()

    def step(block: Any) -> Any:
        if not given.training:
            y = block(x)
            y.wait_to_read()
            return y
        with mx.autograd.record():
            y = block(x)
        y.backward(dy)
        x.grad.wait_to_read()
        return y

    def copy() -> Any:
        y = output_memory.empty(x.shape, x.context, x.dtype)
        for out, times in ((y, 2), (x.grad, 3)) if given.training else ((y, 1),):
            for _ in range(times):
                x.copyto(out)
            out.wait_to_read()
        return y

    runs = {who: (lambda block=block: step(block)) for who, block in blocks.items()}
    return Contest("gluon.nn.BatchNorm", runs if given.group == "small" else {**runs, "copy": copy}, lambda: None)


def contest_of_models(given: Input) -> Contest:
    """Compare the model zoo's network after ``swap``, unchanged, and without BatchNorm, on the same images."""
    x, labels = mx.nd.random.normal(shape=given.shape), mx.nd.random.randint(0, 1000, given.shape[:1])
    loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    nets, trainers = {}, {}
    for who in ("ours", "own", "none"):
        mx.random.seed(0)
        net = nets[who] = _ZOO[given.model]()
        net.initialize()
        if who == "none":
            net.apply(_leave_out_batchnorm)
        net(x)
        if who == "ours":
            swap(net)
        net.hybridize(given.hybridized)
        trainers[who] = mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 1e-3, "momentum": 0.9})

    def step(who: str) -> None:
        with mx.autograd.record():
            losses = loss(nets[who](x), labels)
        losses.backward()
        trainers[who].step(given.shape[0])
        mx.nd.waitall()

    return Contest(given.model, {who: partial(step, who) for who in nets}, lambda: None)


def _densenet121() -> Any:
    """Return the zoo's network with global pooling at the end, because the zoo's last pooling requires images of 224x224."""
    net = mx.gluon.model_zoo.vision.densenet121()
    name = next(name for name, block in net.features._children.items() if isinstance(block, mx.gluon.nn.AvgPool2D))
    net.features._children[name] = mx.gluon.nn.GlobalAvgPool2D()
    return net


_ZOO = {"densenet121": _densenet121, "resnet18": mx.gluon.model_zoo.vision.resnet18_v1}


def _leave_out_batchnorm(block: Any) -> None:
    for name, child in block._children.items():
        if isinstance(child, mx.gluon.nn.BatchNorm):
            nothing = mx.gluon.nn.HybridLambda("identity")
            block._children[name] = nothing
            if getattr(block, name, None) is child:
                setattr(block, name, nothing)


if __name__ == "__main__":
    hybridized = {name: replace(each, hybridized=True) for name, each in MODELS.items()}
    serve(lambda threads: None, contest, INPUTS, hybridized)  # MXNet reads its number of threads from the environment
