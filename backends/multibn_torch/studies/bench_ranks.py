"""One process of ``multibn bench --ranks``: synchronised statistics, compared with a straightforward implementation."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from multibn.sync.exchange import Exchange
from multibn.sync.group import Alone, Group
from multibn_torch.layers import BatchNorm2d
from multibn_torch.sync import SyncBatchNorm, TorchGroup
from multibn_torch.sync.group import shared_exchange

MESSAGES = (64, 4096, 65536, 524288)
"""Sizes in bytes of the messages whose sum over all ranks is timed."""


TYPES = ("float16", "bfloat16", "float32", "float64")
"""Types of the input for which the passes of one rank are timed, without exchange."""

TYPE_ROUNDS = 5
"""At most so many turns for each type: exact sums of float64 are slow."""


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class Straightforward(torch.nn.BatchNorm2d):
    """Synchronised BatchNorm by PyTorch's operators and ``all_reduce``: one pass, float32 sums of x and x*x."""

    def forward(self, input: Tensor) -> Tensor:
        """Return y, in training."""
        axes, channels = [0, 2, 3], input.shape[1]
        count = torch.full((1,), float(input.numel() // channels))
        sums = torch.cat([input.sum(axes), (input * input).sum(axes), count])
        s, q, m = _AllReduce.apply(sums).split([channels, channels, 1])  # type: ignore[no-untyped-call]
        mean = s / m
        var = q / m - mean * mean
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (var * m / (m - 1) - self.running_var)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        y: Tensor = input * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return y


def measure(shapes: list[list[int]], rounds: int, mpi: Any) -> dict[str, Any]:
    """Time forward and backward of the contestants, in turn, and sums of messages; return medians in ms, for messages in us."""
    rows = []
    for shape in shapes:
        torch.manual_seed(dist.get_rank())
        x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
        layers: dict[str, torch.nn.Module] = {
            "gloo": SyncBatchNorm(shape[1]), "straightforward": Straightforward(shape[1]), "alone": BatchNorm2d(shape[1]),
            "exact": SyncBatchNorm(shape[1], process_group=Alone()),
        }  # fmt: skip
        if mpi is not None:
            layers["mpi"] = SyncBatchNorm(shape[1], process_group=mpi)
        times: dict[str, list[float]] = {who: [] for who in layers}
        for _ in range(rounds + 2):
            for who, layer in layers.items():
                x.grad = None
                dist.barrier()
                start = time.perf_counter()
                layer(x).backward(dy)
                times[who].append(time.perf_counter() - start)
        exchange = shared_exchange(None)
        rows.append(
            {
                "shape": shape,
                "ms": {who: 1e3 * median(its[2:]) for who, its in times.items()},
                "ratio": median(a / b for a, b in zip(times["straightforward"][2:], times["gloo"][2:], strict=True)),
                "bytes": 0 if exchange is None else _bytes(exchange, layers["gloo"], x, dy),
            }
        )
    groups: dict[str, Group] = {"gloo": TorchGroup().channel("messages")}
    if mpi is not None:
        groups["mpi"] = mpi.channel("messages")
    messages = {who: _messages(group, rounds) for who, group in groups.items()}
    types = [_passes(shape, dtype, min(rounds, TYPE_ROUNDS)) for shape in shapes for dtype in TYPES]
    return {"rows": rows, "messages": messages, "types": types}


def _passes(shape: list[int], dtype: str, rounds: int) -> dict[str, Any]:
    """Time forward and backward with exact sums, of a group of one, and of ``BatchNorm2d``; medians in ms, and of the ratios."""
    kind = getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": torch.float64} if kind is torch.float64 else {}
    layers = {"exact": SyncBatchNorm(shape[1], process_group=Alone(), **options), "alone": BatchNorm2d(shape[1], **options)}
    x, dy = torch.randn(shape).to(kind).requires_grad_(), torch.randn(shape).to(kind)
    times: dict[str, list[tuple[float, float]]] = {who: [] for who in layers}
    for _ in range(rounds + 1):
        for who, layer in layers.items():
            x.grad = None
            dist.barrier()
            start = time.perf_counter()
            y = layer(x)
            middle = time.perf_counter()
            y.backward(dy)
            times[who].append((middle - start, time.perf_counter() - middle))
    found: dict[str, Any] = {"shape": shape, "dtype": dtype}
    for i, name in enumerate(("forward", "backward")):
        exact, alone = ([turn[i] for turn in its[1:]] for its in times.values())
        ratio = median(a / b for a, b in zip(exact, alone, strict=True))
        found[name] = {"exact": 1e3 * median(exact), "alone": 1e3 * median(alone), "ratio": ratio}
    return found


def _bytes(exchange: Exchange, layer: torch.nn.Module, x: Tensor, dy: Tensor) -> int:
    before = exchange.bytes
    layer(x).backward(dy)
    return exchange.bytes - before


def _messages(group: Group, rounds: int) -> dict[str, float]:
    found = {}
    for size in MESSAGES:
        numbers, times = np.zeros(size // 8, np.int64), []
        for _ in range(10 * rounds):
            start = time.perf_counter()
            group.sum(numbers)
            times.append(time.perf_counter() - start)
        found[str(size)] = 1e6 * median(times)
    return found


def main() -> None:
    """Run one rank. Arguments: folder, rounds, JSON of the shapes; rank and size too if not started by MPI."""
    folder, rounds, shapes, *numbers = sys.argv[1:]
    mpi: Any = None
    if numbers:
        rank, size = map(int, numbers)
    else:
        from mpi4py import MPI

        from multibn.sync import MpiGroup

        mpi = MpiGroup(MPI.COMM_WORLD)
        rank, size = mpi.rank, mpi.size
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    result = measure(json.loads(shapes), int(rounds), mpi)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
