"""Programs of the ranks of tests/test_sync_torch.py; each check runs on all ranks at the same time."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Checks, over_gloo
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import multibn_torch
from multibn.layer import PoisonedBatch
from multibn.sync import Alone
from multibn_torch import SyncBatchNorm
from multibn_torch.sync.group import _shared

check = Checks()


def program(rank: int, size: int, folder: Path) -> dict[str, str]:
    return over_gloo(check, rank, size, folder)


def bits(t: torch.Tensor) -> bytes:
    t = t.detach().contiguous()
    return (t.view(torch.int16) if t.element_size() == 2 else t).numpy().tobytes()


def parts(n: int, size: int, generator: random.Random) -> list[range]:
    """Return a random split, in which parts may be empty."""
    cuts = sorted(generator.choices(range(n + 1), k=size - 1))
    return [range(a, b) for a, b in zip([0, *cuts], [*cuts, n], strict=True)]


def layer(channels: int, group: Any, seed: int = 0, **keywords: Any) -> SyncBatchNorm:
    made = SyncBatchNorm(channels, process_group=group, **keywords)
    r = np.random.default_rng(seed)
    with torch.no_grad():
        for t in (made.weight, made.bias):
            if t is not None:
                t.copy_(torch.from_numpy(r.standard_normal(channels)))
    return made


def step(
    its: Callable[..., torch.Tensor], x: torch.Tensor, dy: torch.Tensor, **keywords: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = its(x, **keywords)
    y.backward(dy)  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return y.detach(), x.grad


def state(its: Any) -> list[bytes]:
    return [bits(t) for t in (its.running_mean, its.running_var, its.num_batches_tracked)]


KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "normal": lambda r, shape: r.standard_normal(shape),
    "shifted": lambda r, shape: r.standard_normal(shape) + 1e6,
    "outlier": lambda r, shape: np.where(np.arange(np.prod(shape)).reshape(shape) == 3, 1e30, r.standard_normal(shape)),
    "denormal": lambda r, shape: r.integers(-9, 9, shape) * 1.4e-45,
    "wide": lambda r, shape: np.exp2(r.uniform(-100, 60, shape)),
    "constant": lambda r, shape: np.full(shape, 0.1),
}
SHAPES = ((9, 5, 14, 14), (7, 3, 20, 20), (16, 7), (12, 4, 9), (4, 2, 3, 3, 3), (2, 3, 70, 70))
TYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)


@check
def same_bits_for_random_splits(rank: int, size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoisonedBatch)  # 1e30 is too large for float16
        _random_splits(rank, size)


def _random_splits(rank: int, size: int) -> None:
    generator = random.Random(1)
    for case in range(40):
        shape, kind, dtype = generator.choice(SHAPES), generator.choice(list(KINDS)), generator.choice(TYPES)
        momentum = generator.choice([0.1, 0.3, None])
        permuted = generator.sample(range(shape[0]), shape[0])
        mine = list(parts(shape[0], size, generator)[rank])
        last = len(shape) == 4 and generator.random() < 0.4
        ours, alone = (layer(shape[1], group, case, momentum=momentum) for group in (None, Alone()))
        if dtype == torch.float64:
            ours.to(torch.float64)
            alone.to(torch.float64)
        for turn in range(2):
            r = np.random.default_rng(100 * case + turn)
            x = torch.from_numpy(np.asarray(KINDS[kind](r, shape), np.float64)).to(torch.float32).to(dtype)
            dy = torch.from_numpy(r.standard_normal(shape)).to(dtype)
            want = step(alone, x, dy)
            layout = torch.channels_last if last else torch.contiguous_format
            taken = [t[permuted][mine].contiguous(memory_format=layout) for t in (x, dy)]
            got = step(ours, *taken)
            for name, a, b in zip(("y", "dx"), got, want, strict=True):
                assert bits(a) == bits(b[permuted][mine]), (case, name, shape, kind, dtype)
            assert state(ours) == state(alone), (case, "moving", shape, kind, dtype)
        ours.eval()
        alone.eval()
        assert bits(ours(x)) == bits(alone(x)), (case, "inference")


@check
def gradients_of_parameters_are_the_ranks_own(rank: int, size: int) -> None:
    x, dy = torch.randn(size * 4, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.ones(size * 4, 3, 5, 5)
    dy[::2] = 2.0
    ours, alone = layer(3, None), layer(3, Alone())
    mine = slice(4 * rank, 4 * rank + 4)
    step(ours, x[mine], dy[mine])
    step(alone, x, dy)
    assert ours.bias.grad is not None
    assert alone.bias.grad is not None
    assert ours.bias.grad.tolist() == [dy[mine, 0].sum().item()] * 3
    for name in ("weight", "bias"):
        total = getattr(ours, name).grad.double()
        dist.all_reduce(total)
        torch.testing.assert_close(total.float(), getattr(alone, name).grad)


@check
def masks_count_values_of_all_ranks(rank: int, size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(6, 4, 10, generator=generator), torch.randn(6, 4, 10, generator=generator)
    mask = torch.rand(6, 10, generator=generator) < 0.6
    mask[:2] = False  # the first rank's values count for nothing
    ours, alone = layer(4, None), layer(4, Alone())
    want = step(alone, x, dy, mask=mask)
    mine = slice(2 * rank, 2 * rank + 2) if rank < size - 1 else slice(2 * rank, 6)
    got = step(ours, x[mine], dy[mine], mask=mask[mine])
    assert [bits(t) for t in got] == [bits(t[mine]) for t in want]
    assert state(ours) == state(alone)


@check
def switches_freeze_and_replace_statistics(rank: int, size: int) -> None:
    x = torch.randn(3 * size, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    mine = slice(3 * rank, 3 * rank + 3)
    for switch in ("freeze_statistics", "freeze_affine", "use_moving_statistics"):
        ours, alone = layer(4, None), layer(4, Alone())
        for each, its in ((ours, mine), (alone, slice(None))):
            step(each, x[its], x[its])
            getattr(each, switch)()
        got, want = step(ours, x[mine] * 2, x[mine]), step(alone, x * 2, x)
        assert [bits(t) for t in got] == [bits(t[mine]) for t in want], switch
        assert state(ours) == state(alone), switch
    frozen, moved = layer(4, None), layer(4, None)
    frozen.freeze_statistics()
    frozen.use_moving_statistics()
    before = _rounds()
    step(frozen, x[mine], x[mine])
    assert _rounds() == before, "nothing to exchange"
    step(moved, x[mine], x[mine])
    assert _rounds() > before


def _rounds() -> int:
    return sum(exchange.rounds for exchange in _shared.values())


@check
def one_addition_for_each_pass(rank: int, size: int) -> None:
    ours = layer(8, None)
    x = torch.randn(4, 8, 5, 5)
    for _ in range(3):
        step(ours, x, x)
    before = _rounds()
    step(ours, x, x)
    assert _rounds() == before + 2


@check
def one_update_when_a_checkpoint_runs_again(rank: int, size: int) -> None:
    x = torch.randn(2 * size, 4, 6, 6, generator=torch.Generator().manual_seed(6))
    mine = slice(2 * rank, 2 * rank + 2)
    ours, alone = layer(4, None), layer(4, Alone())
    xs = x[mine].clone().requires_grad_()
    y = checkpoint(ours, xs, use_reentrant=False)
    y.backward(x[mine])
    want = step(alone, x, x)
    assert xs.grad is not None
    assert (bits(y), bits(xs.grad)) == (bits(want[0][mine]), bits(want[1][mine]))
    assert state(ours) == state(alone)


@check
def nan_on_one_rank_is_nan_on_all(rank: int, size: int) -> None:
    x = torch.randn(4, 3, 5, 5)
    if rank == size - 1:
        x[1, 1, 2, 2] = float("nan")
    ours = layer(3, None)
    ours.name = "block.bn"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y, dx = step(ours, x, torch.ones_like(x))
        step(ours, x, torch.ones_like(x))
    assert [str(w.message)[:76] for w in caught if w.category is PoisonedBatch] == [
        "block.bn, SyncBatchNorm(3): the batch statistics of 1 channel are not finite"
    ]
    for t in (y, dx):
        assert t.isfinite().all(dim=(0, 2, 3)).tolist() == [True, False, True] if t is y else True
        assert t[:, 1].isnan().all()
    assert ours.running_mean is not None
    assert ours.running_mean[1] == 0
    assert ours.running_mean[0] != 0
    assert ours.num_batches_tracked == 2


@check
def empty_ranks_take_part(rank: int, size: int) -> None:
    ours, alone = layer(3, None), layer(3, Alone())
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(8))
    mine = slice(0, 5) if rank == 1 else slice(0, 0)
    got, want = step(ours, x[mine], x[mine]), step(alone, x, x)
    assert [bits(t) for t in got] == [bits(t[mine]) for t in want]
    assert state(ours) == state(alone)
    before = state(ours)
    y, dx = step(ours, x[:0], x[:0])
    assert y.shape == dx.shape == (0, 3, 4, 4)
    assert state(ours) == before
    assert ours.weight.grad is not None


@check
def groups_of_some_ranks(rank: int, size: int) -> None:
    pairs = dist.new_group([0, 1])
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    if rank < 2:
        mine = slice(3 * rank, 3 * rank + 3)
        ours, alone = layer(3, pairs), layer(3, Alone())
        got, want = step(ours, x[mine], x[mine]), step(alone, x, x)
        assert [bits(t) for t in got] == [bits(t[mine]) for t in want]


def _network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3), torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(), torch.nn.Linear(4 * 16, 2),
    )  # fmt: skip


@check
def distributed_data_parallel_trains_as_one_process(rank: int, size: int) -> None:
    single = _network().double()
    whole = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(single), Alone())
    several = DistributedDataParallel(SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(single)))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (whole, several)]
    generator = torch.Generator().manual_seed(2)
    for turn in range(4):
        x, t = (
            torch.randn(2 * size, 3, 8, 8, generator=generator).double(),
            torch.randn(2 * size, 2, generator=generator).double(),
        )
        mine = slice(2 * rank, 2 * rank + 2)
        for model, optimizer, its in ((whole, optimizers[0], slice(None)), (several, optimizers[1], mine)):
            optimizer.zero_grad()
            if model is several and turn == 1:  # accumulate
                with several.no_sync():
                    ((several(x[mine]) - t[mine]) ** 2).mean().backward()
            elif turn == 1:
                ((model(x) - t) ** 2).mean().backward()
            ((model(x[its]) - t[its]) ** 2).mean().backward()
            optimizer.step()
    for (name, a), b in zip(whole.state_dict().items(), several.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)
        others = [torch.empty_like(b) for _ in range(size)]
        dist.all_gather(others, b)
        assert len({bits(each) for each in others}) == 1, f"{name} differs among ranks"


@check
def autocast_and_half(rank: int, size: int) -> None:
    x = torch.randn(2 * size, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    mine = slice(2 * rank, 2 * rank + 2)
    found = []
    for group, its in ((None, mine), (Alone(), slice(None))):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), layer(4, group))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x[its])
        assert y.dtype == torch.bfloat16
        found.append((y, model[1]))
    assert state(found[0][1]) == state(found[1][1])
    assert bits(found[0][0]) == bits(found[1][0][mine])


@check
def compiled_programs_break_and_stay_right(rank: int, size: int) -> None:
    x = torch.randn(2 * size, 4, 6, 6, generator=torch.Generator().manual_seed(4))
    mine = slice(2 * rank, 2 * rank + 2)
    plain = torch.nn.Sequential(layer(4, None), torch.nn.ReLU())
    other = copy.deepcopy(plain)
    want, got = step(plain, x[mine], x[mine]), step(torch.compile(other, backend="eager"), x[mine], x[mine])
    assert [bits(t) for t in got] == [bits(t) for t in want]
    assert state(other[0]) == state(plain[0])


@check
def no_second_derivative(rank: int, size: int) -> None:
    ours = layer(3, None)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = ours(x)
    said = (
        "SyncBatchNorm has no second derivative, and vmap cannot map over its backward: each rank would need those of all "
        "others. For gradient penalties use BatchNorm2d, with statistics of each rank's own samples."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(said)}$"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@check
def operators_have_the_kernels_bits(rank: int, size: int) -> None:
    from multibn_torch.sync import operators

    _by_operators(rank, size, torch.device("cpu"), operators)


def _by_operators(rank: int, size: int, device: torch.device, operators: Any) -> None:
    from multibn.sync import passes
    from multibn.sync.passes import Peers, SyncSettings

    exchange = next(iter(_shared.values()))
    how = SyncSettings(1e-5, 0.9, True, True, True)
    generator = random.Random(7)
    for case in range(24):
        shape, kind, dtype = generator.choice(SHAPES), generator.choice(list(KINDS)), generator.choice(TYPES)
        r = np.random.default_rng(case)
        x = torch.from_numpy(np.asarray(KINDS[kind](r, shape), np.float64)).to(torch.float32).to(dtype)
        if dtype == torch.float64:
            x = x + torch.from_numpy(r.standard_normal(shape)) * 1e-9
        dy = torch.from_numpy(r.standard_normal(shape)).to(dtype)
        if case % 5 == 0:
            x[0, 0] = float("inf")
        alone = layer(shape[1], Alone(), case)
        alone = alone.to(torch.float64) if dtype == torch.float64 else alone
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoisonedBatch)
            want = step(alone, x, dy)
        mine = list(parts(shape[0], size, generator)[rank])
        xs, dys = x[mine].to(device), dy[mine].to(device)
        peers = Peers(exchange, f"case {case}")
        weight, bias = alone.weight.detach().to(device), alone.bias.detach().to(device)
        # every other rank by the kernel
        batch = operators.describe(xs, peers, how, True)
        y = operators.normalise(xs, weight, bias, batch.saved)
        found = operators.gradients(xs, dys, weight, batch, peers, True)
        assert found.means is not None
        dx = operators.propagate(xs, dys, found.means, batch)
        moving = (
            np.zeros(shape[1], found.dbeta.dtype if dtype == torch.float64 else "f"),
            np.ones(shape[1], found.dbeta.dtype if dtype == torch.float64 else "f"),
        )
        passes.move(batch, *moving)
        for name, a, b in zip(("y", "dx"), (y, dx), want, strict=True):
            a, b = a.cpu(), b[mine]
            assert torch.equal(a.isnan(), b.isnan()), (case, name)
            assert bits(a.nan_to_num(0, 0, 0)) == bits(b.nan_to_num(0, 0, 0)), (case, name, shape, kind, dtype)
        assert alone.running_mean is not None
        assert alone.running_mean.numpy().tobytes() == moving[0].tobytes(), (case, "moving mean")


@check
def recalibration_of_spread_data(rank: int, size: int) -> None:
    model = torch.nn.Sequential(multibn_torch.BatchNorm1d(5), torch.nn.ReLU(), SyncBatchNorm(5))
    data = torch.randn(20, 5, generator=torch.Generator().manual_seed(4)) * 3 + 1
    wanted, spread = copy.deepcopy(model), copy.deepcopy(model)
    multibn_torch.recalibrate(wanted, [data])
    mine = data[[0, 1, 5, 7]] if rank == 0 else data[[i for i in range(20) if i not in (0, 1, 5, 7)]][rank - 1 :: size - 1]
    names = multibn_torch.recalibrate(spread, [mine[:1], mine[1:]] if rank else [mine], group=multibn_torch.TorchGroup())
    assert names == ["0", "2"]
    for i in (0, 2):
        assert [bits(t) for t in spread[i].buffers()] == [bits(t) for t in wanted[i].buffers()]
