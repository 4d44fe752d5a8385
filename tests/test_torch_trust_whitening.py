"""Unusual arguments for the whitening layer: correct results, or an exception that leaves the state unchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import torch_grid

import multibn_torch as ours

STATE = ("weight", "bias", "running_mean", "running_covariance")
CELLS = [(name, wrong) for name in ("x", *STATE) for wrong in torch_grid.WRONG]


def made() -> Any:
    torch.manual_seed(0)
    layer = ours.Whitening(16, 4, "zca", groups=4)
    with torch.no_grad():
        layer.running_mean.uniform_(-0.1, 0.1)
    return layer, torch.randn(16, 16, 4, 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "wrong"), CELLS)
def test_a_wrong_tensor_raises_or_agrees(name: str, wrong: str, training: bool) -> None:
    layer, x = made()
    layer.train(training)
    if getattr(layer, name, x) is None:
        pytest.skip(f"the layer has no {name}")
    own = copy.deepcopy(layer)
    try:
        value = torch_grid.WRONG[wrong](x if name == "x" else getattr(layer, name).detach())
    except Exception:
        return  # PyTorch cannot even make it
    if name == "x":
        x_given = value
    else:
        x_given = x
        torch_grid.put(layer, name, value)
    before = {key: t.detach().clone() for key in (*STATE, "num_batches_tracked")
              if key != name and (t := getattr(layer, key)) is not None}  # fmt: skip
    try:
        y = layer(x_given)
    except Exception:
        for key, t in before.items():
            assert torch.equal(t, getattr(layer, key)), key
        return
    if wrong in ("None", "float16", "bfloat16", "expanded", "zero tensor"):  # other values than the right argument has
        return
    wanted = own(x)
    found, expected = torch_grid.numbers(y), torch_grid.numbers(wanted)
    if isinstance(found, torch.Tensor) and found.shape == expected.shape:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["running_mean", "running_covariance"])
def test_freed_storage_is_named(name: str) -> None:
    layer, x = made()
    size = getattr(layer, name).nbytes
    getattr(layer, name).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    assert str(caught.value) == (
        f"{name} needs a storage of at least {size} bytes, got one of 0. Allocate the storage before the layer is called."
    )


def test_statistics_that_share_memory_are_refused() -> None:
    layer, x = made()
    layer.running_mean = layer.running_covariance.view(-1)[:16]
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    assert str(caught.value) == (
        "running_mean must have memory of its own for each value, since it is written to, got an expanded tensor or one that "
        "shares memory. Call .clone() on it."
    )
    assert layer.num_batches_tracked == 0


def test_an_input_that_changed_its_type_after_forward_is_refused() -> None:
    layer, x = made()
    x.requires_grad_()
    y = layer(x)
    x.data = x.data.double()
    with pytest.raises(RuntimeError):
        y.sum().backward()
