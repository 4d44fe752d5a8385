"""The article's studies in PyTorch; ``multibn.article`` runs this module in a separate process."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from multibn.article import facts
from multibn.article.plan import Run
from multibn.article.train import serve
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn_torch import BACKEND, BatchNorm

_ACTIVATIONS = {"relu": torch.nn.ReLU, "sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh}


class Net:
    """A perceptron with or without BatchNorm; a normalised hidden layer needs no bias."""

    def __init__(self, run: Run, weights: Sequence[Array]) -> None:
        modules: list[torch.nn.Module] = []
        for weight in weights[:-1]:
            modules.append(linear(weight, bias=not run.norm))
            if run.norm:
                modules.append(BatchNorm(len(weight), 2, BatchNormSpec.article()))
            modules.append(_ACTIVATIONS[run.activation]())
        self.net = torch.nn.Sequential(*modules, linear(weights[-1], bias=True))
        self.optimizer = torch.optim.SGD(self.net.parameters(), run.rate)

    def step(self, x: Array, labels: Array) -> Any:
        """Run forward, backward and an optimizer step; return the loss."""
        loss = torch.nn.functional.cross_entropy(self.net.train()(torch.from_numpy(x)), torch.from_numpy(labels))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()

    def predict(self, x: Array) -> Array:
        """Predict labels in inference mode, with the moving statistics."""
        with torch.no_grad():
            found: Array = self.net.eval()(torch.from_numpy(x)).argmax(dim=1).numpy()
        return found

    def layers(self) -> list[dict[str, Array]]:
        """Return the parameters of each hidden layer."""
        found: list[dict[str, Array]] = []
        for module in list(self.net)[:-1]:
            its = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
            if isinstance(module, BatchNorm):
                found[-1] |= {"gamma": its["weight"], "beta": its["bias"]}
            elif its:
                found.append(its)
        return found


def linear(weight: Array, bias: bool) -> torch.nn.Linear:
    """Make a linear layer with these initial weights, and zeros as bias."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if bias:
            layer.bias.zero_()
    return layer


def whiten(x: torch.Tensor) -> torch.Tensor:
    """Whiten (m, C), as part of the autograd graph."""
    centred = x - x.mean(dim=0)
    eigenvalues, rotation = torch.linalg.eigh(centred.T @ centred / len(x) + 1e-5 * torch.eye(x.shape[1]))
    white: torch.Tensor = centred @ rotation / eigenvalues.sqrt()
    return white


def cost(channels: int, m: int = 2048, turns: int = 5) -> dict[str, float]:
    """Time forward and backward on (m, C) of both layers, in turn; return the minimum over all turns, in milliseconds."""
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (m, channels)).astype(np.float32)).requires_grad_()
    layers: dict[str, Any] = {"whitening": whiten, "batchnorm": BatchNorm(channels, 2)}
    took: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(turns):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer(x).square().sum().backward()
            took[name].append((time.perf_counter() - start) * 1e3)
    return {"channels": channels, **{name: min(times) for name, times in took.items()}}


def begins_as_identity(x: Array) -> Array:
    """Return the output of a layer with init="identity" for its first batch."""
    y: Array = BatchNorm(x.shape[1], x.ndim, init="identity")(torch.from_numpy(x)).detach().numpy()
    return y


if __name__ == "__main__":
    torch.set_num_threads(1)
    SOURCES = {"net": inspect.getsource(Net), "costly": f"{inspect.getsource(whiten)}\n\n{inspect.getsource(cost)}"}
    serve(
        lambda: {
            **facts.of(BACKEND, begins_as_identity),
            "cost": [cost(c) for c in (16, 32, 64, 128, 256)],
            "sources": SOURCES,
        },
        Net,
    )
