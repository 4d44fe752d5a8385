"""One network in PyTorch, Gluon and Flax: ``python tests/four_homes.py FRAMEWORK OUT.npz`` saves the states of its BatchNorms.

BatchNorm on the images, two blocks of convolution, BatchNorm and ReLU, the mean over space, a linear layer; gradient descent on
handwritten digits. Weights and batches are the same in each. Needs the framework, multibn and scikit-learn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

STEPS, BATCH, RATE = 20, 32, 0.1
WIDTHS = ((1, 8), (8, 16))

State = dict[str, Any]


def weights() -> list[Any]:
    """Return the weights of the convolutions, (out, in, 3, 3), and of the linear layer, (10, 16)."""
    draw = np.random.default_rng(0)
    made = [draw.normal(0, (2 / (9 * given)) ** 0.5, (features, given, 3, 3)) for given, features in WIDTHS]
    return [each.astype(np.float32) for each in (*made, draw.normal(0, 0.1, (10, WIDTHS[-1][1])))]


def batches() -> list[tuple[Any, Any]]:
    """Return batches of images (N, 1, 8, 8) and digits."""
    digits = load_digits()
    images, labels = (digits.images[:, None] / 16).astype(np.float32), digits.target.astype(np.int32)
    order = np.random.default_rng(1).permutation(len(images))[: STEPS * BATCH].reshape(STEPS, BATCH)
    return [(images[chosen], labels[chosen]) for chosen in order]


def torch() -> State:
    """Train in PyTorch."""
    import torch

    from multibn_torch import BatchNorm2d

    torch.set_num_threads(1)
    norms = [BatchNorm2d(n) for n in (1, 8, 16)]
    convolutions = [torch.nn.Conv2d(given, features, 3, padding=1, bias=False) for given, features in WIDTHS]
    linear = torch.nn.Linear(WIDTHS[-1][1], 10)
    layers: list[Any] = [*norms, *convolutions, linear]
    with torch.no_grad():
        for layer, weight in zip(layers[len(norms) :], weights(), strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
        linear.bias.zero_()
    parameters = [p for layer in layers for p in layer.parameters()]
    for x, labels in batches():
        y = norms[0](torch.from_numpy(x))
        for convolution, norm in zip(convolutions, norms[1:], strict=True):
            y = torch.relu(norm(convolution(y)))
        loss = torch.nn.functional.cross_entropy(linear(y.mean((2, 3))), torch.from_numpy(labels).long())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= RATE * gradient
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{i}.{name}": getattr(norm, name).detach().numpy() for i, norm in enumerate(norms) for name in names}


def mxnet() -> State:
    """Train in Gluon."""
    from mxnet import autograd, gluon, init, nd

    from multibn import BatchNormSpec
    from multibn_mxnet import BatchNorm

    spec = BatchNormSpec(moving_variance="unbiased")
    norms = [BatchNorm(n, 4, spec=spec) for n in (1, 8, 16)]
    convolutions = [gluon.nn.Conv2D(features, 3, padding=1, use_bias=False, in_channels=given) for given, features in WIDTHS]
    linear = gluon.nn.Dense(10, in_units=WIDTHS[-1][1])
    net = gluon.nn.Sequential()
    net.add(*norms, *convolutions, linear)
    net.initialize(init.Zero())
    for norm in norms:
        norm.initialize(force_reinit=True)
    for layer, weight in zip((*convolutions, linear), weights(), strict=True):
        layer.weight.set_data(nd.array(weight))
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": RATE})
    for x, labels in batches():
        with autograd.record():
            y = norms[0](nd.array(x))
            for convolution, norm in zip(convolutions, norms[1:], strict=True):
                y = nd.relu(norm(convolution(y)))
            loss = gluon.loss.SoftmaxCrossEntropyLoss()(linear(y.mean((2, 3))), nd.array(labels))
        loss.backward()
        trainer.step(BATCH)
    names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    return {f"{i}.{name}": getattr(norm, its).data().asnumpy() for i, norm in enumerate(norms) for name, its in names.items()}


def jax() -> State:
    """Train in Flax, channels-last."""
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from multibn import BatchNormSpec
    from multibn_jax import BatchNorm

    class Net(nnx.Module):
        def __init__(self) -> None:
            rngs, spec = nnx.Rngs(0), BatchNormSpec(moving_variance="unbiased")
            self.norms = nnx.List([BatchNorm(n, spec=spec, axis=-1) for n in (1, 8, 16)])
            self.convolutions = nnx.List([nnx.Conv(*each, (3, 3), use_bias=False, rngs=rngs) for each in WIDTHS])
            self.linear = nnx.Linear(WIDTHS[-1][1], 10, rngs=rngs)
            *kernels, last = weights()
            for convolution, kernel in zip(self.convolutions, kernels, strict=True):
                convolution.kernel[...] = jnp.asarray(kernel.transpose(2, 3, 1, 0))
            self.linear.kernel[...] = jnp.asarray(last.T)

        def __call__(self, x: Any) -> Any:
            y = self.norms[0](x)
            for i, convolution in enumerate(self.convolutions):
                y = nnx.relu(self.norms[i + 1](convolution(y)))
            return self.linear(y.mean((1, 2)))

    net = Net()
    optimizer = nnx.Optimizer(net, optax.sgd(RATE), wrt=nnx.Param)

    @nnx.jit
    def step(net: Net, optimizer: Any, x: Any, labels: Any) -> None:
        def loss(net: Net) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()

        optimizer.update(net, nnx.grad(loss)(net))

    for x, labels in batches():
        step(net, optimizer, x.transpose(0, 2, 3, 1), labels)
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return {f"{i}.{name}": np.asarray(getattr(norm, its)[...]) for i, norm in enumerate(net.norms) for name, its in names.items()}


HOMES: dict[str, Callable[[], State]] = {"torch": torch, "mxnet": mxnet, "jax": jax}

if __name__ == "__main__":
    np.savez(sys.argv[2], **HOMES[sys.argv[1]]())
