"""The three switches of BN-09 in PyTorch: independent, reversible, on layers and models, in either mode."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import multibn_torch as ours
from multibn import BatchNormSpec

SWITCHES = ("freeze_statistics", "freeze_affine", "use_moving_statistics")


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Sequential(torch.nn.BatchNorm2d(4)))
    ours.swap(made)
    return made


def as_it_is(layer: Any) -> Any:
    return layer


def trained_again(layer: Any) -> Any:
    return layer.eval().train()


def pickled(layer: Any) -> Any:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("then", [as_it_is, trained_again, copy.deepcopy, pickled])
@pytest.mark.parametrize("on", list(itertools.product([False, True], repeat=3)))
def test_each_switch_does_its_own_and_stays(on: Any, then: Callable[[Any], Any]) -> None:
    statistics, affine, moving = on
    made = model()
    for name, value in zip(SWITCHES, on, strict=True):
        assert getattr(ours, name)(made, value) == ["1", "2.0"]
    layer = then(made)[1]
    assert layer.training
    assert layer.frozen == ("statistics",) * statistics + ("affine",) * affine
    x = torch.randn(5, 4, 3, 3) + 3
    y = layer(x)
    assert (y.mean() > 2) == moving  # the moving mean is 0, the batch mean 3
    assert bool(layer.running_mean.any()) != statistics
    assert int(layer.num_batches_tracked) == int(not statistics)
    assert [p.requires_grad for p in layer.parameters()] == [not affine] * 2
    assert layer.spec == BatchNormSpec(
        momentum=0.9,
        moving_variance="unbiased",
        normalize_with="moving" if moving else "batch",
        update_statistics=not statistics,
        learn_affine=not affine,
    )


@pytest.mark.parametrize("name", SWITCHES)
def test_there_is_a_way_back(name: str) -> None:
    made, plain = model(), model()
    getattr(ours, name)(made)
    assert repr(made) != repr(plain)
    getattr(ours, name)(made, on=False)
    assert repr(made) == repr(plain)
    x = torch.randn(5, 3, 6, 6)
    for each in (made, plain):
        each(x).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), plain.state_dict().values(), strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(made.parameters(), plain.parameters(), strict=True))


def test_a_frozen_affine_takes_no_other_step() -> None:
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made(torch.randn(5, 3, 6, 6)).square().sum().backward()
    ours.freeze_affine(made)
    before = copy.deepcopy(made.state_dict())
    optimizer.step()
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert "0.weight" in changed
    assert not changed & {"1.weight", "1.bias", "2.0.weight", "2.0.bias"}


def test_the_text_says_what_is_frozen() -> None:
    layer: Any = ours.BatchNorm2d(3)
    block: Any = ours.BatchNorm(3, 4, BatchNormSpec.article())
    text = "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True"
    for each in (layer, block):
        each.freeze_statistics()
    assert repr(layer) == f"{text}, frozen=statistics, by=multibn)"
    assert repr(block) == "BatchNorm(3, 4, eps=1e-12, momentum=0.9, frozen=statistics)"
    for each in (layer, block):
        each.freeze_affine()
        each.use_moving_statistics()
    assert repr(layer) == f"{text}, normalize_with='moving', frozen=statistics+affine, by=multibn)"
    assert repr(block) == "BatchNorm(3, 4, eps=1e-12, momentum=0.9, normalize_with='moving', frozen=statistics+affine)"


def test_what_is_not_there_is_not_frozen() -> None:
    layer: Any = ours.BatchNorm2d(3, affine=False)
    layer.freeze_affine()
    assert layer.frozen == ()


NO_STATISTICS = (
    "use_moving_statistics needs moving statistics, got a layer without: it was made with track_running_stats=False (BN-09). "
    "Make it with track_running_stats=True."
)


def test_a_layer_without_moving_statistics_cannot_use_them() -> None:
    bare: Any = ours.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError) as caught:
        bare.use_moving_statistics()
    assert str(caught.value) == NO_STATISTICS
    made = torch.nn.Sequential(ours.BatchNorm2d(4), bare)
    with pytest.raises(ValueError) as caught:
        ours.use_moving_statistics(made)
    assert str(caught.value) == f"1: {NO_STATISTICS}"
    assert [layer.normalize_with for layer in made] == ["batch", "batch"]
    bare.use_moving_statistics(on=False)
    assert bare(torch.randn(5, 4, 3, 3)).mean().abs() < 1e-6


@pytest.mark.parametrize("name", SWITCHES)
def test_a_model_without_our_layers_is_refused(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        getattr(ours, name)(torch.nn.Sequential(torch.nn.BatchNorm2d(4)))
    message = "expected a model with multibn_torch layers, found none. Call multibn_torch.swap(model) first."
    assert str(caught.value) == message
