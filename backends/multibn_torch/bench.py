"""What ``multibn bench`` measures in PyTorch: forward and backward in training, forward in inference."""

from __future__ import annotations

import torch

from multibn.bench import Contest, serve
from multibn.bench_result import Input

from .function import output_like
from .layers import BatchNorm1d, BatchNorm2d


def contest(given: Input) -> Contest:
    """Ours, PyTorch's own, and the copy, on the same x."""
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

    def copy() -> list[torch.Tensor]:
        return [_copied(x, times) for times in ((2, 3) if given.training else (1,))]  # y, dx

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    runs = {who: (lambda layer=layer: step(layer)) for who, layer in layers.items()}
    return Contest(f"torch.nn.{own.__name__}", runs if given.group == "small" else {**runs, "copy": copy}, clear)


def _copied(x: torch.Tensor, times: int) -> torch.Tensor:
    """x, copied so many times into one fresh tensor: the layer too writes its output once and passes over the memory again."""
    with torch.no_grad():
        y = output_like(x)
        for _ in range(times):
            y.copy_(x)
        return y


if __name__ == "__main__":
    serve(torch.set_num_threads, contest)
