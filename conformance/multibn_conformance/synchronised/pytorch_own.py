"""PyTorch's own SyncBatchNorm as a rank, on CPU tensors, which it refuses.

All of PyTorch's Python code runs as it is: the layer, the autograd function, its messages, over gloo. Two things stand in for an
accelerator. The layer is told that the private device, which it accepts, is called "cpu". The five operators that PyTorch has on
accelerators alone are registered for CPU here, with the formulas of ``aten/src/ATen/native/cuda/Normalization.cuh``. They are as
good as they can be: each computes in float64 and rounds its results once, to the types of the CUDA kernels (float32, for float64
input float64). So what breaks is the work of the messages, their types and what is exchanged; the CUDA kernels, which add in the
type itself, can only be further off.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec

from .hub import HubGroup

KNOWN: dict[str, tuple[str, str]] = {
    "any-split": (
        "expected moving_mean",
        "Each rank's mean and 1/sqrt(var+eps) are rounded before they are sent, and combined with more roundings.",
    ),
    "any-split-of-hostile-values": ("expected moving_(mean|var)", "The same: what is small beside what is large is lost."),
    "one-value-and-none": (
        "expected an error on every rank, got an output",
        "It counts the ranks, not the values: one value in all is normalised, and the unbiased variance is divided by 0.",
    ),
    "another-eps": ("expected an error on every rank, got an output", "The ranks do not compare their settings."),
    "a-refused-input": (
        "the process of rank . ended|expected an output, got",
        "A rank sends a message whose length is that of its own input, at which gloo ends processes.",
    ),
    "an-absent-rank": ("expected an error that names rank 1", "The error after the timeout names neither rank nor layer."),
    "nan-on-one-rank": ("expected moving_mean .*, got .*nan", "The moving statistics become NaN for good, on all ranks."),
}
"""Case -> what its judgement must match (a regular expression), and what PyTorch's own does."""

_REGISTERED: list[torch.library.Library] = []


class PyTorchOwn:
    """``torch.nn.SyncBatchNorm`` over the ranks of a group.

    Raises:
        ValueError: a spec that it cannot compute: its moving variance is unbiased.
    """

    def __init__(self, num_features: int, spec: BatchNormSpec, group: HubGroup) -> None:
        _register()
        if spec.moving_variance != "unbiased":
            raise ValueError(f"torch.nn.SyncBatchNorm moves the unbiased variance, got moving_variance={spec.moving_variance!r}.")
        self._group, self._ranks = group, _process_group(group)
        momentum = None if spec.momentum is None else 1 - spec.momentum
        self._layer: Any = torch.nn.SyncBatchNorm(num_features, spec.eps, momentum, process_group=self._ranks)
        self._count()

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        """Copies of the arrays become the state."""
        layer = self._layer
        layer.to(torch.from_numpy(gamma).dtype)
        state = {"weight": gamma, "bias": beta, "running_mean": moving_mean, "running_var": moving_var}
        layer.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in state.items()}, strict=False)

    def forward(self, x: Array, training: bool) -> Array:
        """y."""
        self._layer.train(training)
        self._layer.zero_grad()
        self._x = torch.from_numpy(np.array(x)).requires_grad_()
        with mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu"):
            self._y = self._layer(self._x)
        self._count()
        return self._y.detach().numpy()

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """dx, dgamma and dbeta."""
        given = self._x, self._layer.weight, self._layer.bias
        dx, dgamma, dbeta = torch.autograd.grad(self._y, given, torch.from_numpy(np.array(dy)), materialize_grads=True)
        self._count()
        return dx.numpy(), dgamma.numpy(), dbeta.numpy()

    def moving(self) -> tuple[Array, Array]:
        """Copies of the moving statistics."""
        return self._layer.running_mean.numpy().copy(), self._layer.running_var.numpy().copy()

    def _count(self) -> None:
        """Tell the suite how many exchanges there were."""
        self._group.sums = self._ranks._get_sequence_number_for_group()


def _process_group(group: Any) -> Any:
    """gloo's group of these ranks, of which the others of the world are no part."""
    world = group if group.world is None else group.world
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if dist.is_initialized():
        dist.destroy_process_group()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world.rank == 0 else None
    port = np.array([store.port if store else 0])
    world.sum(port)
    store = store or TCPStore("127.0.0.1", int(port[0]), is_master=False)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=group.timeout))
    if group is world:
        return dist.group.WORLD
    members = np.zeros(world.size, dtype=np.int64)
    members[world.rank] = 1
    group.sum(members)
    return dist.new_group(np.flatnonzero(members).tolist(), use_local_synchronization=True)


def _register() -> None:
    if _REGISTERED:
        return
    library: Any = torch.library.Library("aten", "IMPL", "CPU")  # type: ignore[no-untyped-call]
    for function in (_stats, _gather, _normalise, _reduce, _propagate):
        library.impl(function.__doc__, function)
    _REGISTERED.append(library)


def _row(t: Tensor, like: Tensor) -> Tensor:
    return t.double().reshape(1, -1, *(1,) * (like.dim() - 2))


def _but_channels(x: Tensor) -> list[int]:
    return [i for i in range(x.dim()) if i != 1]


def _of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """batch_norm_stats"""
    var, mean = torch.var_mean(x.double(), _but_channels(x), correction=0)
    return mean.to(_of(x)), (1 / (var + eps).sqrt()).to(_of(x))


def _gather(
    x: Tensor, mean: Tensor, invstd: Tensor, moving_mean: Tensor | None, moving_var: Tensor | None, momentum: float, eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """batch_norm_gather_stats_with_counts"""
    total = torch.zeros(mean.shape[1], dtype=torch.float64)
    var_n, n = total.clone(), 0
    average = total
    for its_mean, its_invstd, count in zip(mean.double(), invstd.double(), counts.tolist(), strict=True):
        var_n += (its_invstd**-2 - eps) * count + (average - its_mean) ** 2 * n * count / (n + count)
        average = (n * average + count * its_mean) / (n + count)
        n += int(count)
    if moving_mean is not None and moving_var is not None:
        moving_mean.copy_((1 - momentum) * moving_mean.double() + momentum * average)
        moving_var.copy_((1 - momentum) * moving_var.double() + momentum * (var_n / torch.tensor(n - 1.0)))
    return average.to(_of(x)), (1 / (var_n / torch.tensor(float(n)) + eps).sqrt()).to(_of(x))


def _normalise(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    """batch_norm_elemt"""
    return ((x.double() - _row(mean, x)) * _row(invstd, x) * _row(gamma, x) + _row(beta, x)).to(x.dtype)


def _reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor, needs_dx: bool, needs_dgamma: bool, needs_dbeta: bool
) -> tuple[Tensor, ...]:
    """batch_norm_backward_reduce"""
    sum_dy = dy.double().sum(_but_channels(x))
    sum_dy_xmu = (dy.double() * (x.double() - _row(mean, x))).sum(_but_channels(x))
    return sum_dy.to(_of(x)), sum_dy_xmu.to(_of(x)), (sum_dy_xmu * invstd.double()).to(gamma.dtype), sum_dy.to(gamma.dtype)


def _propagate(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor, sum_dy: Tensor, sum_dy_xmu: Tensor, count: Tensor
) -> Tensor:
    """batch_norm_backward_elemt"""
    m = count.sum().double()
    slope = _row(sum_dy_xmu, x) / m * _row(invstd, x) ** 2
    dx = (dy.double() - _row(sum_dy, x) / m - (x.double() - _row(mean, x)) * slope) * _row(gamma, x) * _row(invstd, x)
    return dx.to(x.dtype)
