"""Contestants of ``multibn bench --whitening``, including the same formulas written in PyTorch's operators."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multibn.bench.contest import take_turns
from multibn_torch.layers import BatchNorm2d
from multibn_torch.whitening.module import Whitening


class Plain(torch.nn.Module):
    """Whitening by PyTorch's operators and autograd: ``torch.linalg.eigh``, or IterNorm's formula (Huang et al., 2019)."""

    def __init__(self, num_features: int, newton: bool, eps: float = 1e-5, steps: int = 5) -> None:
        super().__init__()
        self.newton, self.eps, self.steps = newton, eps, steps
        self.weight, self.bias = (torch.nn.Parameter(f(1, num_features, 1, 1)) for f in (torch.ones, torch.zeros))
        self.register_buffer("running_mean", torch.zeros(num_features, 1))
        self.register_buffer("running_covariance", torch.eye(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return y for (N, C, H, W), in training."""
        n, c, *space = x.shape
        values = x.transpose(0, 1).reshape(c, -1)
        mean = values.mean(1, keepdim=True)
        centred = values - mean
        one = torch.eye(c, dtype=x.dtype, device=x.device)
        covariance = centred @ centred.T / values.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)  # type: ignore[operator]
            self.running_covariance.lerp_(covariance, 0.1)  # type: ignore[operator]
        s = covariance + self.eps * one
        if self.newton:
            by_trace = 1 / s.diagonal().sum()
            p, normalised = one, s * by_trace
            for _ in range(self.steps):
                p = torch.addmm(p, torch.matrix_power(p, 3), normalised, beta=1.5, alpha=-0.5)
            w = p * by_trace.sqrt()
        else:
            eigenvalues, vectors = torch.linalg.eigh(s)
            w = vectors * eigenvalues.rsqrt() @ vectors.T
        y = (w @ centred).reshape(c, n, *space).transpose(0, 1)
        return y * self.weight + self.bias


LAYERS: dict[str, Callable[[int], torch.nn.Module]] = {
    "torch.nn.BatchNorm2d": torch.nn.BatchNorm2d,
    "BatchNorm2d": BatchNorm2d,
    "zca": lambda c: Whitening(c, 4, "zca"),
    "zca, groups of 16": lambda c: Whitening(c, 4, "zca", c // 16),
    "pca": lambda c: Whitening(c, 4, "pca"),
    "newton": lambda c: Whitening(c, 4, "newton"),
    "eigh, autograd": lambda c: Plain(c, newton=False),
    "IterNorm, autograd": lambda c: Plain(c, newton=True),
}
"""Contestant -> function that makes a layer for a number of channels."""


def contest(shape: tuple[int, ...], names: list[str]) -> tuple[dict[str, Callable[[], object]], Callable[[], None]]:
    """Return a step function per contestant, on the same x, and a function that clears the gradients of the last step."""
    x, dy = torch.randn(shape).requires_grad_(), torch.randn(shape)
    layers = {name: LAYERS[name](shape[1]) for name in names}
    leaves = [x, *(p for layer in layers.values() for p in layer.parameters())]

    def step(layer: torch.nn.Module) -> Any:
        y = layer(x)
        y.backward(dy)
        return y

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    return {name: partial(step, layer) for name, layer in layers.items()}, clear


def main(order: str) -> None:
    """Run in the process that ``multibn.bench.whitening.measure`` starts: print one line of JSON per input."""
    its = json.loads(order)
    torch.set_num_threads(its["threads"])
    torch.manual_seed(0)
    for shape, names, rounds in its["inputs"]:
        print(json.dumps(take_turns(*contest(tuple(shape), names), rounds)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
