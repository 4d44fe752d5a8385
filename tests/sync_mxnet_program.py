"""Programs of the ranks of tests/test_sync_mxnet.py: Gluon alone, and Gluon and PyTorch in one group."""

from __future__ import annotations

import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.base import MXNetError
from ranks import Checks, outcomes

import multibn_mxnet
from multibn import BatchNormSpec
from multibn.sync import Alone, MpiGroup

check, with_torch = Checks(), Checks()


def over_gloo(rank: int, size: int, folder: Path) -> dict[str, str]:
    import torch
    import torch.distributed as dist

    from multibn_torch import TorchGroup

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        return outcomes({**check, **with_torch}, rank, size, TorchGroup())
    finally:
        mx.nd.waitall()
        dist.destroy_process_group()


def over_mpi(rank: int, size: int, folder: Path) -> dict[str, str]:
    from mpi4py import MPI

    return outcomes({**check, "late": _late_over_mpi}, rank, size, MpiGroup(MPI.COMM_WORLD, timeout=60))


SPECS = (
    BatchNormSpec(),
    BatchNormSpec(momentum=None),
    BatchNormSpec(moving_variance="unbiased", scale=False),
    BatchNormSpec.article(),
)


def block(channels: int, rank: int, group: Any, spec: BatchNormSpec | None = None, dtype: str = "float32") -> Any:
    made = multibn_mxnet.SyncBatchNorm(channels, rank, spec, group=group)
    made.initialize()
    made.cast(dtype)
    for name in ("gamma", "beta"):
        if hasattr(made, name):
            values = np.linspace(0.5, 2, channels)
            getattr(made, name).set_data(mx.nd.array(values, dtype=getattr(made, name).dtype))
    return made


def step(its: Any, x: Any, dy: Any) -> tuple[Any, Any]:
    with mx.util.np_shape(True):
        given = mx.nd.array(x, dtype=x.dtype)
        given.attach_grad()
        with autograd.record():
            y = its(given)
        y.backward(mx.nd.array(dy, dtype=dy.dtype))
        return y.asnumpy(), given.grad.asnumpy()


def state(its: Any) -> list[bytes]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return [getattr(its, name).data().asnumpy().tobytes() for name in names if hasattr(its, name)]


def parts(n: int, size: int, generator: random.Random) -> list[slice]:
    cuts = sorted(generator.choices(range(n + 1), k=size - 1))
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, n], strict=True)]


@check
def same_bits_for_random_splits(rank: int, size: int, group: Any) -> None:
    generator = random.Random(2)
    for case in range(16):
        shape = generator.choice([(9, 4, 12, 12), (7, 3, 20, 20), (16, 5), (8, 3, 9)])
        dtype, spec = generator.choice(["float32", "float32", "float16", "float64"]), generator.choice(SPECS)
        ours, alone = (block(shape[1], len(shape), each, spec, dtype) for each in (group, Alone()))
        if case % 2:
            ours.hybridize()
        mine = parts(shape[0], size, generator)[rank]
        for turn in range(2):
            r = np.random.default_rng(100 * case + turn)
            x, dy = (r.standard_normal(shape).astype(dtype) for _ in range(2))
            got, want = step(ours, x[mine], dy[mine]), step(alone, x, dy)
            for name, a, b in zip(("y", "dx"), got, want, strict=True):
                assert a.tobytes() == b[mine].tobytes(), (case, name, shape, dtype)
            assert state(ours) == state(alone), (case, shape, dtype, spec)


@check
def branches_of_a_graph(rank: int, size: int, group: Any) -> None:
    """MXNet runs the backwards of independent layers at once, in any order."""

    class Net(gluon.HybridBlock):  # type: ignore[misc]
        def __init__(self, its: Any) -> None:
            super().__init__()
            with self.name_scope():
                self.first, self.second, self.third, self.fourth = (
                    multibn_mxnet.SyncBatchNorm(6, 4, group=its) for _ in range(4)
                )

        def hybrid_forward(self, F: Any, x: Any) -> Any:
            a = self.second(self.first(x) * F.sin(x * 7))
            b = self.fourth(self.third(x * 2) * F.sin(x * 5))
            return (a + b * 3) * F.sin(x * 11)

    nets = []
    for its in (group, Alone()):
        net = Net(its)
        net.initialize()
        net.hybridize()
        nets.append(net)
    r = np.random.default_rng(0)
    for _ in range(6):
        x, dy = (r.standard_normal((4 * size, 6, 7, 7)).astype("f") for _ in range(2))
        mine = slice(4 * rank, 4 * rank + 4)
        got, want = step(nets[0], x[mine], dy[mine]), step(nets[1], x, dy)
        assert [a.tobytes() for a in got] == [b[mine].tobytes() for b in want]


@check
def every_rank_is_told(rank: int, size: int, group: Any) -> None:
    its = block(4, 2, group)
    step(its, np.ones((3, 4), "f"), np.ones((3, 4), "f"))
    before = state(its)
    words = (
        "of the group, forward, 4 channels, float32, eps 1e-05, batch statistics, update by biased variance, weight of old 0.9"
    )
    with pytest.raises(MXNetError) as caught, autograd.record():
        its(mx.nd.ones((3, 5) if rank == 1 else (3, 4)))
    said = str(caught.value)
    if rank == 1:
        assert said.startswith("expected 4 channels on axis 1, got 5 in input of shape (3, 5)"), said
    else:
        assert (
            f"rank 1 of {size} refused the input, so no rank went on, and nothing was changed (SY-08). rank 1: MXNetError" in said
        )
    assert state(its) == before
    its._spec = BatchNormSpec(eps=1e-3 if rank == 1 else 1e-5)
    its.forget_layer()
    with (
        pytest.raises(MXNetError, match="not at the same pass of the same layer with the same settings") as caught,
        autograd.record(),
    ):
        its(mx.nd.ones((3, 4)))
    assert "rank 1: layer " in str(caught.value)
    assert words in str(caught.value)
    assert state(its) == before
    its._spec = BatchNormSpec()
    its.forget_layer()
    with pytest.raises(MXNetError, match="got 1 on all ranks together"), autograd.record(), mx.util.np_shape(True):
        its(mx.nd.ones((int(rank == 1), 4)))
    step(its, np.ones((3, 4), "f"), np.ones((3, 4), "f"))


@check
def recalibration_of_spread_data(rank: int, size: int, group: Any) -> None:
    data = np.random.default_rng(3).standard_normal((12, 5)).astype("f") * 3 + 1
    nets = []
    for _ in range(2):
        net = gluon.nn.HybridSequential()
        net.add(multibn_mxnet.BatchNorm(5, 2), multibn_mxnet.BatchNorm(5, 2))
        net.initialize()
        nets.append(net)
    multibn_mxnet.recalibrate(nets[0], [mx.nd.array(data)])
    mine = [mx.nd.array(data[i : i + 1]) for i in range(12) if i % size == rank]
    assert len(multibn_mxnet.recalibrate(nets[1], mine, group=group.channel("recalibrate"))) == 2
    assert [state(a) for a in nets[1]] == [state(a) for a in nets[0]]


@with_torch
def ranks_of_both_frameworks(rank: int, size: int, group: Any) -> None:
    import torch

    from multibn_torch import SyncBatchNorm

    generator = random.Random(4)
    for case in range(8):
        shape = generator.choice([(9, 4, 12, 12), (7, 3, 20, 20), (16, 5)])
        mine = parts(shape[0], size, generator)[rank]
        spec = BatchNormSpec(moving_variance="unbiased", momentum=generator.choice([1 - 0.1, None]))
        alone = block(shape[1], len(shape), Alone(), spec)
        ours: Any
        if rank % 2:
            ours = block(shape[1], len(shape), group, spec)
        else:
            ours = SyncBatchNorm(shape[1], momentum=None if spec.momentum is None else 0.1, process_group=group)
            with torch.no_grad():
                ours.weight.copy_(torch.linspace(0.5, 2, shape[1], dtype=torch.float64))
                ours.bias.copy_(ours.weight)
        for turn in range(2):
            r = np.random.default_rng(100 * case + turn)
            x, dy = (r.standard_normal(shape).astype("f") for _ in range(2))
            want = step(alone, x, dy)
            if rank % 2:
                got = step(ours, x[mine], dy[mine])
                its = state(ours)
            else:
                given = torch.from_numpy(x[mine].copy()).requires_grad_()
                y = ours(given)
                y.backward(torch.from_numpy(dy[mine].copy()))
                assert given.grad is not None
                got = y.detach().numpy(), given.grad.numpy()
                its = [t.numpy().tobytes() for t in (ours.running_mean, ours.running_var)]
            for name, a, b in zip(("y", "dx"), got, want, strict=True):
                assert a.tobytes() == b[mine].tobytes(), (case, name)
            assert its[:2] == state(alone)[:2]


def _late_over_mpi(rank: int, size: int, _: Any) -> None:
    """Last, for the ranks end while MPI still waits."""
    from mpi4py import MPI

    from multibn.sync import PeersMissing

    group = MpiGroup(MPI.COMM_WORLD, timeout=3)
    numbers = np.ones(3, np.int64)
    start = time.monotonic()
    if rank == 1:
        time.sleep(7)
    with pytest.raises(PeersMissing) as caught:
        group.sum(numbers)
    if rank == 1:
        assert (
            str(caught.value)
            == f"rank{'s' if size > 2 else ''} 0{', 2' if size > 2 else ''} gave up waiting before this rank came."
        )
    else:
        assert str(caught.value) == "rank 1 did not come within 3 s."
        assert time.monotonic() - start < 6
