"""The article's studies in JAX; ``multibn.article`` runs this module in a process of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from multibn import identity
from multibn.article import facts
from multibn.article.plan import Run
from multibn.article.train import serve
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn_jax import BACKEND, BatchNorm

_ACTIVATIONS = {"relu": nnx.relu, "sigmoid": nnx.sigmoid, "tanh": nnx.tanh}


class Perceptron(nnx.Module):
    """With or without BatchNorm; a hidden layer that is normalised needs no bias."""

    def __init__(self, run: Run, weights: Sequence[Array]) -> None:
        self.activation = run.activation
        self.hidden = nnx.List([linear(weight, bias=not run.norm) for weight in weights[:-1]])
        norms = [BatchNorm(len(weight), 2, spec=BatchNormSpec.article()) for weight in weights[:-1]]
        self.norms = nnx.List(norms if run.norm else [])
        self.out = linear(weights[-1], bias=True)

    def __call__(self, x: Any) -> Any:
        """(N, pixels) to (N, classes)."""
        for i, layer in enumerate(self.hidden):
            x = layer(x)
            x = _ACTIVATIONS[self.activation](self.norms[i](x) if len(self.norms) else x)
        return self.out(x)


class Net:
    """The same perceptron with and without BatchNorm, compiled."""

    def __init__(self, run: Run, weights: Sequence[Array]) -> None:
        self.net = Perceptron(run, weights)
        self.optimizer = nnx.Optimizer(self.net, optax.sgd(run.rate), wrt=nnx.Param)

    def step(self, x: Array, labels: Array) -> Any:
        """Forward, backward, step."""
        self.net.train()
        return _step(self.net, self.optimizer, x, labels)

    def predict(self, x: Array) -> Array:
        """With the moving statistics."""
        self.net.eval()
        return np.asarray(self.net(x).argmax(axis=1))

    def layers(self) -> list[dict[str, Array]]:
        """Of the hidden layers."""
        found = []
        for i, layer in enumerate(self.net.hidden):
            its = {"weight": np.asarray(layer.kernel[...]).T}
            if len(self.net.norms):
                norm = self.net.norms[i]
                found.append({**its, "gamma": np.asarray(norm.scale[...]), "beta": np.asarray(norm.bias[...])})
            else:
                found.append({**its, "bias": np.asarray(layer.bias[...])})
        return found


@nnx.jit
def _step(net: Perceptron, optimizer: nnx.Optimizer, x: Any, labels: Any) -> Any:
    def loss(net: Perceptron) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(net)
    optimizer.update(net, gradients)
    return value


def linear(weight: Array, bias: bool) -> nnx.Linear:
    """A linear layer that begins with these weights, (out, in), and 0."""
    layer = nnx.Linear(weight.shape[1], weight.shape[0], use_bias=bias, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(weight.T)
    return layer


def begins_as_identity(x: Array) -> Array:
    """y of a block whose gamma and beta are those that let the batch pass unchanged."""
    block = BatchNorm(x.shape[1], x.ndim)
    scale, bias = identity.parameters(x, block.epsilon, np.float32)
    block.scale[...], block.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    return np.asarray(block(x))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    SOURCES = {"net": "\n\n".join(inspect.getsource(each) for each in (Perceptron, Net))}
    serve(lambda: {**facts.of(BACKEND, begins_as_identity), "sources": SOURCES}, Net)
