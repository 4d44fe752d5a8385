"""Contests of ``multibn bench`` in PyTorch: forward and backward in training, forward in inference, steps of networks."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import torch

from multibn.bench import resident
from multibn.bench.contest import Contest, serve
from multibn.bench.inputs import COMMON, STAGES
from multibn.bench.result import Input
from multibn_torch.forward.eager import output_like
from multibn_torch.forward.recompute import recompute
from multibn_torch.layers import BatchNorm1d, BatchNorm2d
from multibn_torch.swap import swap

from .models import MODELS

INPUTS = (*COMMON, *(Input("channels last", shape, channels_last=True) for shape in STAGES))
"""Inputs on which the layers are measured."""


def contest(given: Input) -> Contest:
    """Return the contestants for an input."""
    if given.recompute:
        return contest_of_memory(given)
    return contest_of_models(given) if given.model else contest_of_layers(given)


def contest_of_layers(given: Input) -> Contest:
    """Return our layer, PyTorch's own, and a copy of memory, on the same x."""
    rank = len(given.shape)
    layout = torch.channels_last if given.channels_last else torch.contiguous_format
    x, dy = (torch.randn(given.shape).contiguous(memory_format=layout).requires_grad_(grad) for grad in (given.training, False))
    own = torch.nn.BatchNorm1d if rank == 2 else torch.nn.BatchNorm2d
    layers = {
        "ours": (BatchNorm1d if rank == 2 else BatchNorm2d)(x.shape[1]).train(given.training),
        "own": own(x.shape[1]).train(given.training),
    }
    leaves = [x, *(p for layer in layers.values() for p in layer.parameters())]

    def step(layer: torch.nn.Module) -> torch.Tensor:
        if not given.training:
            with torch.no_grad():
                return layer(x)  # type: ignore[no-any-return]
        y: torch.Tensor = layer(x)
        y.backward(dy)  # type: ignore[no-untyped-call]
        return y

    def copies() -> list[torch.Tensor]:
        return [_copied(x, times) for times in ((2, 3) if given.training else (1,))]  # y, dx

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    runs = {who: (lambda layer=layer: step(layer)) for who, layer in layers.items()}
    return Contest(f"torch.nn.{own.__name__}", runs if given.group == "small" else {**runs, "copy": copies}, clear)


def contest_of_models(given: Input) -> Contest:
    """Return a network after ``swap`` with fused ReLUs, unchanged, and without BatchNorm, on the same images.

    All start from the same weights. If compiled: ``swap`` without fused ReLUs, and no network without BatchNorm, for which
    Inductor generates slower code than for the others.
    """
    torch.manual_seed(0)
    x, labels = torch.randn(given.shape), torch.randint(1000, given.shape[:1])
    own = MODELS[given.model]()
    models = {"ours": copy.deepcopy(own), "own": own}
    swap(models["ours"], fuse_relu=not given.compiled)
    if given.compiled:
        models = {who: torch.compile(model, fullgraph=True) for who, model in models.items()}  # type: ignore[misc]
    else:
        models["none"] = copy.deepcopy(own)
        for name, module in list(models["none"].named_modules()):
            if isinstance(module, torch.nn.BatchNorm2d):
                models["none"].set_submodule(name, torch.nn.Identity())
    optimizers = {who: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for who, model in models.items()}

    def step(who: str) -> None:
        torch.nn.functional.cross_entropy(models[who](x), labels).backward()  # type: ignore[no-untyped-call]
        optimizers[who].step()

    def clear() -> None:
        for optimizer in optimizers.values():
            optimizer.zero_grad()

    return Contest(given.model, {who: partial(step, who) for who in models}, clear)


def contest_of_memory(given: Input) -> Contest:
    """Return a network after ``swap`` with fused ReLUs, inside ``recompute()`` and without, and how to measure peak memory."""
    torch.manual_seed(0)
    x, labels = torch.randn(given.shape), torch.randint(1000, given.shape[:1])
    model = MODELS[given.model]()
    swap(model, fuse_relu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def forward(who: str) -> torch.Tensor:
        with recompute() if who == "ours" else nullcontext():
            return torch.nn.functional.cross_entropy(model(x), labels)

    def step(who: str) -> None:
        forward(who).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def peak(who: str) -> float:
        optimizer.zero_grad()
        start = resident.begin()
        loss = forward(who)
        return resident.peak(start) if loss.requires_grad else 0.0

    runs = {who: partial(step, who) for who in ("ours", "own")}
    return Contest(f"{given.model} without recompute()", runs, optimizer.zero_grad, peak)


def _copied(x: torch.Tensor, times: int) -> torch.Tensor:
    """Copy x several times into one new tensor, as the layer allocates one output and passes over the memory several times."""
    with torch.no_grad():
        y = output_like(x)
        for _ in range(times):
            y.copy_(x)
        return y


if __name__ == "__main__":
    serve(torch.set_num_threads, contest, INPUTS)
