"""The layers in typical PyTorch programs: checkpointing, casting, sharing, pruning, fusing, pickling and distributing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize, prune
from torch.utils.checkpoint import checkpoint

import multibn_torch as ours

IMPLEMENTATIONS: list[Any] = ["kernel", "framework"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def same_state(a: Any, b: Any) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])


def network(implementation: Any = "auto", **options: Any) -> Any:
    """Make a network that calls its BatchNorm twice, as networks with shared layers do."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = ours.BatchNorm2d(3, implementation=implementation, **options)

        def forward(self, x: Any) -> Any:
            return self.norm(self.conv(self.norm(x).relu()))

    return Twice()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_updates_once(momentum: Any, reentrant: bool, implementation: Any) -> None:
    plain = network(implementation, momentum=momentum)
    saving = copy.deepcopy(plain)
    for _ in range(2):  # gradients accumulate
        xs = [torch.randn(4, 3, 5, 5).requires_grad_()]
        xs.append(xs[0].detach().clone().requires_grad_())
        plain(xs[0]).pow(3).sum().backward()
        y = checkpoint(saving, xs[1], use_reentrant=reentrant)
        same_state(plain, saving)  # updated in forward, not later
        y.pow(3).sum().backward()
        same_state(plain, saving)
        assert torch.equal(xs[0].grad, xs[1].grad)
    assert saving.norm.num_batches_tracked == 4
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_what_cannot_be_run_again_is_refused() -> None:
    layer: Any = ours.BatchNorm1d(3)
    layer.normalize_with = "moving"
    y = checkpoint(layer, torch.randn(4, 3, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError) as caught:
        y.sum().backward()
    assert str(caught.value) == (
        "a layer that normalises with its moving statistics and updates them cannot be run again in backward, as activation "
        "checkpointing does: they are not those of the forward any more (BN-05, BN-09). Set update_statistics=False, or leave "
        "the layer out of the checkpoint."
    )
    layer.update_statistics = False
    checkpoint(layer, torch.randn(4, 3, requires_grad=True), use_reentrant=False).sum().backward()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_penalty_on_the_gradient_updates_once(implementation: Any) -> None:
    layer: Any = ours.BatchNorm1d(3, implementation=implementation)
    x = torch.randn(8, 3, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (y.sum() + dx.square().sum()).backward()
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_forwards_before_a_backward(implementation: Any) -> None:
    layer: Any = ours.BatchNorm1d(3, implementation=implementation)
    for training in (True, False):
        layer.train(training)
        xs = [torch.randn(8, 3, requires_grad=True) for _ in range(2)]
        alone = [torch.autograd.grad(copy.deepcopy(layer)(x).pow(3).sum(), x)[0] for x in xs]
        if training:
            layer(torch.randn(8, 3))
            y = layer(xs[0]).pow(3).sum() + layer(xs[1]).pow(3).sum()
        else:
            y = layer(xs[0]).pow(3).sum() + layer(xs[1]).pow(3).sum()
            layer.running_mean.add_(1)  # as a broadcast of the buffers does
            layer.running_var.add_(1)
        for got, wanted in zip(torch.autograd.grad(y, xs), alone, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_gives_half_outputs_and_single_statistics(half: Any, implementation: Any) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), ours.BatchNorm2d(4, implementation=implementation))
    x = torch.randn(4, 3, 5, 5)
    with torch.autocast("cpu", dtype=half):
        between = model[0](x)
        wanted = copy.deepcopy(model[1])(between.detach())
        y = model(x)
        assert y.dtype == half
        assert torch.equal(y, wanted)
        loss = y.float().square().sum()
    loss.backward()
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32, torch.int64}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("cls", "shape", "layout"),
    [
        (ours.BatchNorm2d, (4, 3, 5, 6), torch.contiguous_format),
        (ours.BatchNorm2d, (4, 3, 5, 6), torch.channels_last),
        (ours.BatchNorm2d, (8, 16, 32, 32), torch.channels_last),
        (ours.BatchNorm3d, (2, 3, 4, 5, 6), torch.channels_last_3d),
    ],
)
def test_channels_last_is_not_copied(cls: Any, shape: Any, layout: Any, training: bool) -> None:
    layer = cls(shape[1]).train(training)
    x, dy = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    x.requires_grad_()
    layer(x).backward(dy)  # load the kernel
    x.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        y = layer(x)
        y.backward(dy)
    assert y.is_contiguous(memory_format=layout)
    assert x.grad.is_contiguous(memory_format=layout)
    copies = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"}
    assert not copies & {event.name for event in profile.events()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inference_mode(implementation: Any) -> None:
    layer: Any = ours.BatchNorm2d(3, implementation=implementation)
    x = torch.randn(4, 3, 5, 5)
    layer(x)
    with torch.no_grad():
        wanted = copy.deepcopy(layer).eval()(x), copy.deepcopy(layer)(x)
    with torch.inference_mode():
        assert torch.equal(layer.eval()(x), wanted[0])
        assert torch.equal(layer.train()(x), wanted[1])
    assert layer.num_batches_tracked == 2
    layer(x.requires_grad_()).sum().backward()


def test_moving_statistics_that_normalise_and_move_without_gradients() -> None:
    layers: Any = [ours.BatchNorm2d(3, implementation=implementation) for implementation in IMPLEMENTATIONS]
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5) + 1
        for layer in layers:
            layer.normalize_with = "moving"
        with torch.no_grad():
            torch.testing.assert_close(*(layer(x) for layer in layers))
        torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())
    assert layers[0].num_batches_tracked == 2


def test_hooks_are_called() -> None:
    layer: Any = ours.BatchNorm2d(3)
    called: Any = []
    layer.register_forward_pre_hook(lambda module, given: called.append("before") or (given[0] * 2,))
    layer.register_forward_hook(lambda module, given, y: called.append("after") or y + 1)
    layer.register_full_backward_pre_hook(lambda module, dy: called.append("backward"))
    layer.register_full_backward_hook(lambda module, dx, dy: called.append("gradient") or (dx[0] * 3,))
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    plain = ours.BatchNorm2d(3)
    leaf = x.detach().clone().requires_grad_()
    y, wanted = layer(x), plain(leaf * 2) + 1
    assert torch.equal(y, wanted)
    y.pow(3).sum().backward()
    wanted.pow(3).sum().backward()
    torch.testing.assert_close(x.grad, 3 * leaf.grad)
    assert called == ["before", "after", "backward", "gradient"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pruning_and_parametrization(implementation: Any) -> None:
    layer: Any = ours.BatchNorm2d(4, implementation=implementation)
    nn.init.normal_(layer.weight)
    x = torch.randn(4, 4, 5, 5)
    wanted = copy.deepcopy(layer)(x)
    prune.random_unstructured(layer, "weight", amount=2)  # type: ignore[no-untyped-call]
    y = layer(x)
    y.square().sum().backward()
    kept = layer.weight_mask.bool()
    assert kept.sum() == 2
    torch.testing.assert_close(y, torch.where(kept[:, None, None], wanted, torch.zeros(())))
    assert layer.weight_orig.grad[~kept].eq(0).all()
    prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    assert torch.equal(layer(x), y)

    class Softplus(nn.Module):
        def forward(self, weight: Any) -> Any:
            return nn.functional.softplus(weight)

    layer = ours.BatchNorm2d(4, implementation=implementation)
    parametrize.register_parametrization(layer, "weight", Softplus())
    y = layer(x)
    y.pow(3).sum().backward()
    torch.testing.assert_close(y, ours.BatchNorm2d(4)(x) * nn.functional.softplus(torch.ones(())))
    assert layer.parametrizations.weight.original.grad.any()


def test_fused_into_a_convolution() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), ours.BatchNorm2d(4))
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6) + 1)
    model.eval()
    x = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(fuse_conv_bn_eval(model[0], model[1])(x), model(x))


@pytest.mark.parametrize("layer", [ours.BatchNorm1d(3), ours.BatchNorm1d(3, momentum=None), ours.BatchNorm(3, 2)])
def test_statistics_of_an_averaged_model(layer: Any) -> None:
    model = torch.optim.swa_utils.AveragedModel(nn.Sequential(nn.Linear(5, 3), layer))
    batches = [torch.randn(8, 5) for _ in range(4)]
    model(batches[0])
    torch.optim.swa_utils.update_bn(batches, model)
    values = torch.stack([model.module[0](x) for x in batches])
    updated = model.module[1]
    assert updated.num_batches_tracked == 4
    assert updated.momentum == layer.momentum
    torch.testing.assert_close(updated.running_mean, values.mean((0, 1)))
    unbiased = updated.moving_variance == "unbiased"
    torch.testing.assert_close(updated.running_var, values.var(1, correction=int(unbiased)).mean(0))


def python(tmp_path: Any, text: str, *arguments: str) -> str:
    """Run a program in a separate process; return its stdout."""
    path = tmp_path / "program.py"
    path.write_text(text)
    command = [sys.executable, "-W", "ignore", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


SENT = """
import pickle, sys
import torch
layers, x = pickle.load(open(sys.argv[1], "rb"))
state = torch.load(sys.argv[2], weights_only=True)
whole = torch.load(sys.argv[3], weights_only=False)
for layer in (*layers, whole):
    print(repr(layer), layer.training)
    print(layer(x).double().sum().item().hex(), layer.running_var.double().sum().item().hex())
layers[0].load_state_dict(state)
print(layers[0](x).double().sum().item().hex())
"""


def test_layers_travel_to_other_processes(tmp_path: Any) -> None:
    layers: Any = [
        ours.BatchNorm2d(3, momentum=None),
        ours.BatchNorm(3, 4),
        ours.BatchNorm2d(3, implementation="framework").eval(),
    ]
    layers[1].normalize_with = "moving"
    x = torch.randn(4, 3, 5, 5)
    for layer in layers:
        layer(x * 2)
    paths = [tmp_path / name for name in ("layers.pickle", "state.pt", "whole.pt")]
    paths[0].write_bytes(pickle.dumps((layers, x)))
    torch.save(layers[0].state_dict(), paths[1])
    torch.save(layers[1], paths[2])
    expected = []
    for layer in [copy.deepcopy(each) for each in (*layers, layers[1])]:
        y = layer(x)
        expected += [
            f"{layer!r} {layer.training}",
            f"{y.double().sum().item().hex()} {layer.running_var.double().sum().item().hex()}",
        ]
    expected.append(layers[0](x).double().sum().item().hex())
    assert python(tmp_path, SENT, *map(str, paths)).splitlines() == expected


DISTRIBUTED = """
import os, sys
import torch
import multibn_torch as ours

def work(rank, file):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    layer = ours.BatchNorm1d(3)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(3, 3), layer))
    for _ in range(2):
        model.zero_grad()
        y = model(torch.randn(8, 3)) - model(torch.randn(8, 3))  # two forwards, one backward
        y.pow(3).sum().backward()
    gathered = [torch.empty(3) for _ in range(2)]
    torch.distributed.all_gather(gathered, layer.running_mean)
    of_its_own_batch = not torch.equal(*gathered)
    torch.distributed.all_gather(gathered, layer.weight.grad)
    same_gradients = torch.equal(*gathered) and bool(gathered[0].any())
    with torch.no_grad():
        layer.running_mean.fill_(rank + 1.0)
        layer.momentum = 0.0
    model(torch.randn(8, 3))  # takes the first one's
    done = (rank, of_its_own_batch, same_gradients, int(layer.num_batches_tracked), layer.running_mean.tolist())
    print(f"{done}\\n", end="", flush=True)  # in one piece
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_distributed_data_parallel(tmp_path: Any) -> None:
    lines = sorted(python(tmp_path, DISTRIBUTED, str(tmp_path / "meeting")).splitlines())
    assert lines == [f"({rank}, True, True, 5, [1.0, 1.0, 1.0])" for rank in range(2)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_profiler_shows_a_forward_without_gradients(mode: Any) -> None:
    layer, x = ours.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    with mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert [event.count for event in profile.key_averages() if event.key == "multibn::batch_norm"] == [1]


def test_the_profiler_and_the_graph_show_the_kernel() -> None:
    layer, x = ours.BatchNorm2d(3), torch.randn(4, 3, 2, 2, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = layer(x)
        y.sum().backward()
    assert {"multibn::batch_norm", "multibn::batch_norm_backward"} <= {event.key for event in profile.key_averages()}
    assert y.grad_fn.name() == "multibn::batch_norm_backward"
