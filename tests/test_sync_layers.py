"""``SyncBatchNorm`` in one process: conversion, a group of one, inference, and errors."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import multibn_torch
from multibn.sync import Alone, MpiGroup
from multibn_torch import SyncBatchNorm, TorchGroup


def state(layer: torch.nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in layer.buffers()]


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b)


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6, eps=1e-3, momentum=0.2), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(6 * 16, 5), torch.nn.BatchNorm1d(5, affine=False),
    )  # fmt: skip


def test_conversion_keeps_the_very_same_layers() -> None:
    model, calls = network(), []
    layer = model[1]
    layer.weight.requires_grad_(False)
    layer.register_forward_hook(lambda *_: calls.append(1))
    before = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert model[1] is layer
    assert type(layer) is SyncBatchNorm
    assert isinstance(layer, torch.nn.SyncBatchNorm)
    assert (layer.eps, layer.momentum, layer.name, layer.weight.requires_grad) == (1e-3, 0.2, "1", False)
    assert model[5].weight is None
    assert {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())} == before
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert calls == [1]
    assert repr(layer) == repr(network()[1]).replace("BatchNorm2d", "SyncBatchNorm")[:-1] + ", by=multibn)"


def test_conversion_keeps_what_multibn_layers_compute() -> None:
    from multibn import BatchNormSpec

    made = multibn_torch.BatchNorm(4, 2, BatchNormSpec(momentum=0.7, moving_variance="biased"))
    made.freeze_affine()
    x = torch.randn(6, 4)
    twin = copy.deepcopy(made)
    layer = SyncBatchNorm.convert_sync_batchnorm(made, Alone())
    assert equal(layer(x), twin(x))
    assert equal(layer.running_var, twin.running_var)
    assert layer.spec.momentum == 0.7


def test_conversion_names_what_it_leaves_alone() -> None:
    class Own(torch.nn.BatchNorm2d):
        pass

    model = torch.nn.Sequential(Own(3), torch.nn.BatchNorm2d(3))
    text = (
        "convert_sync_batchnorm left these layers as they are, since their classes may compute something else: 0 (Own). They use "
        "the statistics of each rank's own samples."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$"):
        SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(each).__name__ for each in model] == ["Own", "SyncBatchNorm"]


def test_conversion_changes_nothing_where_it_raises() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3, eps=0))
    with pytest.raises(ValueError, match=r"^1: eps must be a finite number > 0, got 0"):
        SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is torch.nn.BatchNorm2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_group_of_one_has_the_kernels_bits(dtype: Any) -> None:
    """Where the kernel's own sums are as good as exact; exchanging nothing, it needs no process group."""
    x = torch.randn(8, 3, 7, 7).to(dtype)
    ours, kernels = SyncBatchNorm(3), multibn_torch.BatchNorm2d(3)
    for layer in (ours, kernels):
        layer(x)
    assert equal(ours.running_mean, kernels.running_mean)
    ours.eval()
    kernels.eval()
    assert equal(ours(x), kernels(x))


def test_checkpoints_are_pytorchs() -> None:
    ours, theirs = SyncBatchNorm(3), torch.nn.SyncBatchNorm(3)
    ours(torch.randn(4, 3, 5))
    theirs.load_state_dict(ours.state_dict())
    again = SyncBatchNorm(3)
    again.load_state_dict(theirs.state_dict())
    assert equal(again.running_var, ours.running_var)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert equal(torch.load(file, weights_only=False).running_mean, ours.running_mean)
    copied = copy.deepcopy(ours)
    assert copied._number == ours._number


def test_double_backward_transforms_and_small_batches_are_refused() -> None:
    layer = SyncBatchNorm(3)
    with pytest.raises(ValueError, match="got 1 on all ranks together"):
        layer(torch.randn(1, 3))
    with pytest.raises(RuntimeError, match=r"^SyncBatchNorm in training takes plain tensors"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0
    layer.eval()
    assert torch.func.grad(lambda x: layer(x).sum())(torch.randn(4, 3)).shape == (4, 3)


def test_flushing_denormals_changes_no_bit() -> None:
    x = torch.randn(8, 3, 5, 5) * 1e-38
    layers = [SyncBatchNorm(3, eps=1e-80) for _ in range(2)]
    want = layers[0](x)
    want.backward(x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        got = layers[1](x)
        got.backward(x)
    finally:
        torch.set_flush_denormal(False)
    assert equal(layers[0].running_mean, layers[1].running_mean)
    assert equal(layers[0].weight.grad, layers[1].weight.grad)
    assert equal(got, want)


def test_groups_say_what_they_need() -> None:
    with pytest.raises(RuntimeError) as caught:
        TorchGroup()
    assert str(caught.value) == (
        "TorchGroup needs torch.distributed, which is not initialised. Call torch.distributed.init_process_group first."
    )
    with pytest.raises(ValueError, match=r"^timeout must be a number of seconds > 0, got 0\.$"):
        MpiGroup(None, timeout=0)


def test_any_rank_and_an_empty_batch() -> None:
    layer = SyncBatchNorm(2)
    for shape in ((4, 2), (4, 2, 3), (2, 2, 3, 3), (2, 2, 2, 2, 2), (2, 2, 2, 2, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape
    before = state(layer)[0]
    y = layer(torch.randn(0, 2, 3, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 2, 3)
    assert equal(state(layer)[0], before)
    assert layer.weight.grad is not None
    assert np.array_equal(layer.weight.grad.numpy(), np.zeros(2))


def test_the_first_batch_of_one_process_is_no_beginning() -> None:
    text = (
        "init='identity' begins with the statistics of one process's first batch, which SyncBatchNorm does not use. Train "
        "one batch before conversion, or leave init out."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        SyncBatchNorm(3, init="identity")
    model = torch.nn.Sequential(multibn_torch.BatchNorm2d(3, init="identity"))
    with pytest.raises(ValueError, match=f"^0: {re.escape(text)}$"):
        SyncBatchNorm.convert_sync_batchnorm(model)
    model(torch.randn(4, 3, 5, 5))
    assert type(SyncBatchNorm.convert_sync_batchnorm(model)[0]) is SyncBatchNorm


def test_arguments_of_pytorch() -> None:
    own = torch.nn.SyncBatchNorm(3, 1e-3, None, False, False)
    assert repr(SyncBatchNorm(3, 1e-3, None, False, False)) == repr(own)[:-1] + ", by=multibn)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_accelerator_has_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        x = (torch.randn(8, 5, 9, 9) * torch.logspace(-20, 3, 5)[:, None, None]).to(dtype)
        layer = SyncBatchNorm(5).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        given = x.to(device).requires_grad_()
        y = layer(given)
        y.backward(x.to(device).flip(0))
        assert given.grad is not None
        found.append(
            [
                t.detach().cpu()
                for t in (y, given.grad, *layer.buffers(), *(p.grad for p in layer.parameters() if p.grad is not None))
            ]
        )
    assert all(equal(a, b) for a, b in zip(*found, strict=True))
