"""The launches of the GPU kernel for CUDA tensors that have no memory, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest

from multibn_torch import triton_kernel
from multibn_torch.forward import on_gpu
from multibn_torch.triton_kernel import passes

KERNELS = ("describe", "statistics", "normalise", "correlate", "gradients", "propagate")


class Launch(NamedTuple):
    """A kernel and its launch arguments."""

    kernel: Any
    grid: tuple[int, ...]
    given: tuple[Any, ...]
    options: dict[str, Any]


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **options: self._launches.append(Launch(self._kernel, grid, given, options))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches in the list instead of running them."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(passes, name, _Recorder(getattr(passes, name), launches))
        patch.setattr(triton_kernel, "_on", lambda x: nullcontext())  # PyTorch without CUDA has no current device
        patch.setattr(on_gpu, "place", lambda t, name: 0)  # without memory there is no address
        patch.setattr(on_gpu, "check_apart", lambda *_: None)
        yield launches
