"""A batch with NaN or Inf: the moving statistics are not updated, and one warning per layer names the layer (BN-11)."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import multibn_torch as ours
from multibn.layer.nonfinite import PoisonedBatch, poisoned

LAYER = "2.norm, BatchNorm2d(4)"
ONE = (
    f"{LAYER}: the batch statistics of 1 channel are not finite (2), since the input holds NaN or Inf there. The output is NaN "
    "there; the moving statistics stay as they were (BN-11). Look for the cause in the layers before this one. Shown once per "
    "layer."
)


def model() -> Any:
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.ModuleDict({"norm": torch.nn.BatchNorm2d(4)}))
    ours.swap(made)
    return made


def batch(value: float, channels: Any = (2,)) -> Any:
    x = torch.randn(6, 4, 5, 5)
    for channel in channels:
        x[3, channel, 1, 2] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("implementation", ["kernel", "framework"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("moving", [True, False])
def test_it_is_said_once_and_spoils_nothing(value: float, implementation: Any, grad: bool, moving: bool) -> None:
    layer = model()[2]["norm"]
    layer.implementation = implementation
    layer.use_moving_statistics(moving)
    layer(batch(0.0))
    before = copy.deepcopy(layer.state_dict())
    with torch.set_grad_enabled(grad), pytest.warns(PoisonedBatch) as warned:
        layer(batch(value))
    assert [str(warning.message) for warning in warned] == [ONE]
    layer(batch(value))  # a second warning would raise
    assert all(torch.equal(layer.running_mean[c], before["running_mean"][c]) == (c == 2) for c in range(4))
    assert all(torch.equal(layer.running_var[c], before["running_var"][c]) == (c == 2) for c in range(4))
    layer(batch(0.0))
    assert layer.running_mean[2] != before["running_mean"][2]
    assert layer.eval()(batch(0.0)).isfinite().all()


def test_each_layer_says_it_for_itself() -> None:
    made = model()
    for layer, text in ((made[0], "0, BatchNorm2d(4)"), (made[2]["norm"], LAYER)):
        with pytest.warns(PoisonedBatch) as warned:
            layer(batch(float("nan"), range(4)))
        assert [str(warning.message) for warning in warned] == [poisoned(text, range(4))]
    nameless = ours.BatchNorm2d(4)
    with pytest.warns(PoisonedBatch) as warned:
        nameless(batch(float("nan")))
    assert str(warned[0].message) == ONE.removeprefix("2.norm, ")


def test_the_text_counts_the_channels() -> None:
    assert "statistics of 7 channels are not finite (0, 1, 2, 3, 4, ...), since" in poisoned("a", range(7))


def test_it_is_said_in_training_only_and_not_of_parameters() -> None:
    made = model()
    made.eval()[0](batch(float("nan")))
    layer = made.train()[0]
    with torch.no_grad():
        layer.weight[1] = float("inf")
    layer(batch(0.0))
    ours.freeze_statistics(made)
    made[2]["norm"](batch(float("nan")))


def test_an_error_if_the_program_wants_it_leaves_a_state_to_go_on_with() -> None:
    layer = model()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", PoisonedBatch)
        with pytest.raises(PoisonedBatch):
            layer(batch(float("nan")))
    assert layer.num_batches_tracked == 1
    assert layer.running_mean.isfinite().all()


def test_programs_that_are_transformed_or_traced_are_left_alone() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = model()[0]
    layer.train()
    make_fx(lambda x: layer(x))(batch(float("nan")))
    torch.func.vmap(lambda x: layer.eval()(x))(batch(float("nan")).unsqueeze(0))
    torch.compile(model()[0], backend="eager", fullgraph=True)(batch(float("nan")))  # a warning would raise


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_with_a_mask_only_what_counts_is_looked_at(value: float) -> None:
    layer = ours.BatchNorm1d(4)
    x = torch.randn(3, 4, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, :2] = False
    x[0, 1, 1] = float("nan")  # padding
    x[2, 1, 1] = value
    if value:
        with pytest.warns(PoisonedBatch) as warned:
            layer(x, mask=mask)
        assert [str(warning.message) for warning in warned] == [poisoned("BatchNorm1d(4)", [1])]
    else:
        layer(x, mask=mask)
