"""Forward keeps x and two numbers per channel for backward; backward allocates dx and nothing else of that size. Measured."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from multibn_torch import BatchNorm2d

SHAPE = (32, 64, 112, 112)  # 103 MB of float32
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (the most since the reset), in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Use(NamedTuple):
    """Memory in units of the size of x, to a tenth: the most that was used beyond what was there before, and what stays."""

    forward_peak: float
    forward_stays: float
    backward_peak: float
    backward_stays: float


def measure(layer: Any, shape: tuple[int, ...] = SHAPE) -> Use:
    """Of a training forward and a backward. y stays after forward, dx after backward, as the caller holds them."""
    x = torch.ones(shape, requires_grad=True)
    dy = torch.ones(shape)
    found: list[int] = []
    results: list[Any] = []
    parts: list[Callable[[], Any]] = [lambda: layer(x), lambda: results[0].backward(dy)]
    for part in parts:
        RESET.write_text("5")  # VmHWM starts anew
        before = memory("VmRSS")
        results.append(part())
        found += [memory("VmHWM") - before, memory("VmRSS") - before]
    return Use(*(round(value / (x.numel() * 4), 1) for value in found))


@pytest.fixture
def can_measure() -> None:
    try:
        RESET.write_text("5")
    except OSError:
        pytest.skip("this system does not reset the peak of a process's memory")


@pytest.mark.usefixtures("can_measure")
def test_memory_of_forward_and_backward_against_torch() -> None:
    uses = {}
    for kind in (BatchNorm2d, torch.nn.BatchNorm2d):
        layer = kind(64)
        for _ in range(2):  # what is loaded and started once is not of interest
            measure(layer, (2, 64, 40, 40))
        uses[kind] = measure(layer)
        print(f"{kind.__module__}: {uses[kind]}, in units of x")
    assert uses[BatchNorm2d] == Use(1.0, 1.0, 1.0, 1.0)
    assert uses[BatchNorm2d] <= uses[torch.nn.BatchNorm2d]


def test_forward_keeps_x_itself_and_two_numbers_per_channel() -> None:
    x = torch.ones(8, 64, 14, 14, requires_grad=True)
    kept: list[Any] = []

    def keep(t: Any) -> Any:
        kept.append(t)
        return t

    layer = BatchNorm2d(64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    own = [x, layer.weight]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in own]
    assert list(vars(y.grad_fn)) == ["kept"]
    statistics, how, *switches, seen = y.grad_fn.kept
    assert seen == (x.dtype, (x.shape[0], 64, x[0, 0].numel()), x.data_ptr(), layer.weight.data_ptr())
    assert ctypes.sizeof(statistics) == 2 * 64 * 8
    assert {type(value) for value in (*how, *switches)} == {float, bool}
