"""The PyTorch layers: programs written for torch.nn's layers work with ours, and the results follow the specification."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import multibn_torch as ours
from multibn import BatchNormSpec, reference
from multibn.kernel import entry
from multibn.layer.nonfinite import PoisonedBatch

PAIRS = [
    (ours.BatchNorm1d, torch.nn.BatchNorm1d, (6, 3)),
    (ours.BatchNorm1d, torch.nn.BatchNorm1d, (6, 3, 5)),
    (ours.BatchNorm2d, torch.nn.BatchNorm2d, (6, 3, 5, 4)),
    (ours.BatchNorm3d, torch.nn.BatchNorm3d, (6, 3, 2, 3, 2)),
]
IMPLEMENTATIONS: list[Any] = ["kernel", "framework"]


def close(a: Any, b: Any, scale: Any = 1.0) -> None:
    """Assert equality up to the rounding of a short float32 sum: 64 steps of 2^-24 each, relative to ``scale``."""
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=0, atol=64 * 2**-24 * scale)


def step(layer: Any, x: Any, dy: Any) -> Any:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y, x.grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("cls", "theirs", "shape"), PAIRS)
def test_computes_what_pytorchs_own_does(cls: Any, theirs: Any, shape: Any, implementation: Any) -> None:
    torch.manual_seed(0)
    mine, own = cls(3, implementation=implementation), theirs(3)
    assert isinstance(mine, theirs)
    for _ in range(4):
        x, dy = torch.randn(shape) * 2 + 1, torch.randn(shape)
        (y, dx), (y_own, dx_own) = step(mine, x, dy), step(own, x, dy)
        close(y, y_own, 4)
        close(dx, dx_own, 4)
        close(mine.weight.grad, own.weight.grad, 100)
        close(mine.bias.grad, own.bias.grad, 100)
        close(mine.running_mean, own.running_mean, 2)
        close(mine.running_var, own.running_var, 8)
        assert mine.num_batches_tracked == own.num_batches_tracked
    close(mine.eval()(x), own.eval()(x), 4)
    assert mine.num_batches_tracked == 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("option", "value"),
    [("momentum", v) for v in (None, 0.3, 0.0, 1.0)]
    + [("eps", 1e-12), ("affine", False), ("bias", False), ("track_running_stats", False)],
)
def test_pytorchs_options_mean_the_same(option: Any, value: Any, implementation: Any) -> None:
    options = {option: value}
    torch.manual_seed(1)
    mine, own = ours.BatchNorm2d(3, implementation=implementation, **options), torch.nn.BatchNorm2d(3, **options)
    for _ in range(3):
        x, dy = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
        for a, b in zip(step(mine, x, dy), step(own, x, dy), strict=True):
            close(a, b, 4)
    close(mine.eval()(x), own.eval()(x), 4)
    assert mine.state_dict().keys() == own.state_dict().keys()
    for name, value in own.state_dict().items():
        close(mine.state_dict()[name].float(), value.float(), 4)


def test_kernel_gives_the_references_bits_in_training_and_inference() -> None:
    torch.manual_seed(2)
    layer: Any = ours.BatchNorm(3, 4, BatchNormSpec.article())
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    gamma, beta = layer.gamma.detach().numpy(), layer.beta.detach().numpy()
    for training in (True, True, False):
        x, dy = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
        layer.train(training)
        layer.zero_grad()
        y, dx = step(layer, x, dy)
        expected: Any = reference.forward(x.numpy(), gamma, beta, mean, var, layer.spec, training)
        gradients: Any = reference.backward(dy.numpy(), expected.saved)
        mean, var = expected.moving_mean, expected.moving_var
        for got, wanted in [(y, expected.y), (dx, gradients.dx), (layer.weight.grad, gradients.dgamma)]:
            np.testing.assert_array_equal(got.detach().numpy(), wanted)
        np.testing.assert_array_equal(layer.bias.grad.numpy(), gradients.dbeta)
        np.testing.assert_array_equal(layer.moving_mean.numpy(), mean)
        np.testing.assert_array_equal(layer.moving_var.numpy(), var)


@pytest.mark.parametrize("shape", [(8, 64, 5, 5), (16, 64, 7, 7), (16, 128, 14, 14)])
def test_bits_do_not_depend_on_who_does_the_work(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the caller's thread alone with several threads."""
    torch.manual_seed(11)
    x, dy = torch.randn(shape), torch.randn(shape)
    found = []
    for serial in (0, 1 << 30):
        monkeypatch.setattr(entry, "SERIAL", serial)
        layer: Any = ours.BatchNorm2d(shape[1])
        y, dx = step(layer, x, dy)
        found.append([y, dx, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("learn", [(), ("x",), ("weight",), ("bias",), ("x", "bias"), ("x", "weight", "bias")])
def test_any_subset_of_gradients(learn: Any, implementation: Any) -> None:
    torch.manual_seed(3)
    layer: Any = ours.BatchNorm2d(3, implementation=implementation)
    layer.weight.requires_grad_("weight" in learn)
    layer.bias.requires_grad_("bias" in learn)
    x = torch.randn(4, 3, 2, 2, requires_grad="x" in learn)
    y = layer(x)
    assert y.requires_grad == bool(learn)
    if learn:
        y.backward(torch.randn_like(y))
    grads = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    assert {name for name, grad in grads.items() if grad is not None} == set(learn)


@pytest.mark.parametrize("layer", [ours.BatchNorm2d(3, momentum=None, bias=False), ours.BatchNorm(3, 4, BatchNormSpec.article())])
def test_copies_pickles_and_state_dicts_are_the_same_layer(layer: Any) -> None:
    torch.manual_seed(4)
    layer(torch.randn(4, 3, 2, 2))
    layer.normalize_with = "moving"
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    fresh = type(layer)(3, bias=False, momentum=None) if type(layer) is ours.BatchNorm2d else ours.BatchNorm(3, 4, layer.spec)
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    fresh.normalize_with = "moving"
    x = torch.randn(4, 3, 2, 2)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh]
    for other in others:
        assert repr(other) == repr(layer)
        assert other.spec == layer.spec
        assert torch.equal(other(x), copy.deepcopy(layer)(x))


def test_checkpoints_go_both_ways() -> None:
    torch.manual_seed(5)
    own, mine = torch.nn.BatchNorm2d(3), ours.BatchNorm2d(3)
    own(torch.randn(4, 3, 2, 2))
    mine.load_state_dict(own.state_dict())
    assert torch.equal(mine.running_var, own.running_var)
    mine(torch.randn(4, 3, 2, 2))
    own.load_state_dict(mine.state_dict())
    assert torch.equal(mine.running_var, own.running_var)
    assert own.num_batches_tracked == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_input_keeps_single_state(half: Any, implementation: Any) -> None:
    torch.manual_seed(6)
    layer: Any = ours.BatchNorm2d(3, implementation=implementation).to(half)
    assert {t.dtype for t in [*layer.parameters(), layer.running_mean, layer.running_var]} == {torch.float32}
    assert ours.BatchNorm2d(3, dtype=half).weight.dtype == torch.float32
    x, dy = torch.randn(4, 3, 5, 5).to(half), torch.randn(4, 3, 5, 5).to(half)
    y, dx = step(layer, x, dy)
    assert y.dtype == dx.dtype == half
    single = ours.BatchNorm2d(3)
    y_single, dx_single = step(single, x.float(), dy.float())
    if implementation == "kernel":
        # y is rounded once from float64 to half precision, y_single to float32: they differ by half an ulp and little more
        one_ulp = 2.0 ** (-7 if half == torch.bfloat16 else -10)
        assert torch.allclose(y.float(), y_single, rtol=0.501 * one_ulp, atol=1e-7)
        assert torch.equal(layer.running_var, single.running_var)
        assert torch.allclose(dx.float(), dx_single, rtol=0.501 * one_ulp, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_double_input_takes_a_double_layer(implementation: Any) -> None:
    layer: Any = ours.BatchNorm1d(3, implementation=implementation).double()
    y = layer(torch.randn(5, 3, dtype=torch.float64))
    assert y.dtype == layer.running_mean.dtype == torch.float64


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded", "channels_last gradient"])
def test_memory_layout_does_not_change_the_meaning(layout: Any, implementation: Any) -> None:
    torch.manual_seed(7)
    x, dy = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)
    given = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": torch.cat([x, x], 3)[..., :6],
        "expanded": x[:, :, :1, :1].expand(4, 3, 6, 6),
        "channels_last gradient": x,
    }[layout]
    dy_given = dy.contiguous(memory_format=torch.channels_last) if "gradient" in layout else dy
    layers = [ours.BatchNorm2d(3, implementation=implementation) for _ in range(2)]
    y, dx = step(layers[0], given, dy_given)
    y_plain, dx_plain = step(layers[1], given.contiguous(), dy)
    close(y, y_plain, 4)
    close(dx, dx_plain, 4)
    close(layers[0].running_var, layers[1].running_var, 4)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("implementation", ["kernel", "framework"])
def test_moving_statistics_normalise_as_they_were_before_the_update(implementation: Any) -> None:
    """In torch.func transforms too (BN-09)."""
    norm = ours.BatchNorm(3, 2, BatchNormSpec(normalize_with="moving"), implementation=implementation)
    plain, x = copy.deepcopy(norm), torch.randn(8, 3) + 2
    wanted = x / (1 + norm.eps) ** 0.5
    y, _ = torch.func.vjp(norm, x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(plain(x), wanted)
    for before, after in zip(plain.buffers(), norm.buffers(), strict=True):
        torch.testing.assert_close(after, before)
    assert float(plain.get_buffer("running_mean").abs().min()) > 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalize_with", ["batch", "moving"])
@pytest.mark.parametrize("update", [True, False])
def test_switches_are_independent(normalize_with: Any, update: Any, implementation: Any) -> None:
    spec = BatchNormSpec(normalize_with=normalize_with, update_statistics=update, learn_affine=False)
    layer: Any = ours.BatchNorm(3, 4, spec, implementation=implementation)
    assert layer.spec == spec
    x = torch.randn(4, 3, 5, 5) + 3
    y = layer(x)
    assert (y.mean() > 2) == (normalize_with == "moving")
    assert bool(layer.moving_mean.any()) == update
    assert int(layer.num_batches_tracked) == int(update)
    assert not y.requires_grad


def test_an_infinite_channel_keeps_to_itself() -> None:
    for implementation in IMPLEMENTATIONS:
        layer: Any = ours.BatchNorm1d(2, implementation=implementation)
        with pytest.warns(PoisonedBatch):
            y = layer(torch.tensor([[1.0, float("inf")], [2.0, 1.0], [4.0, 1.0]]))
        assert y[:, 0].isfinite().all()
        assert y[:, 1].isnan().any()
        assert layer.running_mean[0] != 0
        assert layer.running_mean[1] == 0
        assert layer.running_var[1] == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_batch_changes_nothing(implementation: Any) -> None:
    layer: Any = ours.BatchNorm2d(3, implementation=implementation)
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4, 4)
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.eval()(x).shape == x.shape


RANK = (
    "expected input of rank 4, got rank 2, shape (2, 3) (BN-01). The axes are batch, channel, then space; "
    "reshape the input, or use the layer made for its rank."
)
CHANNELS = (
    "expected 3 channels on axis 1, got 4 in input of shape (2, 4, 1, 1) (BN-01). "
    "Build the layer with 4 features, or move the channel axis of the input."
)
INTEGERS = "expected input of type float16, bfloat16, float32, float64, got int64 (BN-10). Convert the input to float32 first."
DOUBLE = (
    "weight must be float64 for float64 input, got float32 (BN-10). Call double() of the layer or of the model, also after "
    "load_state_dict(assign=True), which keeps the types of what it loads."
)
ONE_VALUE = (
    "Expected more than 1 value per channel when training, got input of shape (1, 3, 1, 1) (BN-12). One value is its own "
    "mean, so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference."
)
EPS = (
    "eps must be a finite number > 0, got 0.0 (BN-03). It is added to the variance inside the root. Frameworks that "
    "accept 0 divide by zero on a constant channel; use a small number, such as the article's 1e-12."
)
BAD = [
    (torch.zeros(2, 3), ValueError, RANK),
    (torch.zeros(2, 4, 1, 1), RuntimeError, CHANNELS),
    (torch.zeros(2, 3, 1, 1, dtype=torch.int64), NotImplementedError, INTEGERS),
    (torch.zeros(2, 3, 1, 1, dtype=torch.float64), RuntimeError, DOUBLE),
    (torch.zeros(1, 3, 1, 1), ValueError, ONE_VALUE),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("x", "error", "message"), BAD)
def test_bad_input_is_refused_and_changes_nothing(x: Any, error: Any, message: Any, implementation: Any) -> None:
    layer: Any = ours.BatchNorm2d(3, implementation=implementation)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error) as caught:
        layer(x)
    assert str(caught.value) == message
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ours.BatchNorm2d(4, momentum=3.0),
            "momentum must be a number with 0 <= momentum <= 1, or None, got 3.0 (BN-05). In PyTorch, it is the weight of the "
            "new value.",
        ),
        (lambda: ours.BatchNorm(3, 6), "num_dims must be 2, 3, 4 or 5, the rank of the input (N, C, ...), got 6 (BN-01)."),
        (lambda: ours.BatchNorm(0, 4), "num_features must be an integer >= 1, the size of the channel axis, got 0 (BN-01)."),
        (
            lambda: ours.BatchNorm2d(3, implementation="cuda"),  # type: ignore[arg-type]
            "implementation must be 'auto' or 'kernel' or 'framework', got 'cuda'.",
        ),
        (lambda: ours.BatchNorm2d(3, eps=0.0), EPS),
        (lambda: ours.swap(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3, eps=0.0))), "1: " + EPS),
    ],
)
def test_bad_parameters_are_refused(make: Any, message: Any) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


def test_swap_keeps_objects_state_and_mode() -> None:
    torch.manual_seed(8)
    nn = torch.nn
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), shared, nn.Sequential(nn.BatchNorm2d(4, momentum=None).half(), nn.SyncBatchNorm(4)), shared
    )
    model[1].eval()
    parameters = dict(model.named_parameters())
    own = copy.deepcopy(model)
    assert ours.swap(model) == ["1", "2.0"]
    assert [type(model[i]) for i in (1, 3)] == [ours.BatchNorm2d] * 2
    assert model[1] is shared is model[3]
    assert type(model[2][1]) is nn.SyncBatchNorm
    assert model[2][0].weight.dtype == torch.float32
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert [m.training for m in model.modules()] == [m.training for m in own.modules()]
    assert ours.swap(model) == []
    x = torch.randn(2, 4, 3, 3)
    close(model[1](x), own[1](x), 4)


def test_text_says_what_the_layer_is() -> None:
    layer: Any = ours.BatchNorm2d(3, implementation="framework")
    layer.normalize_with, layer.update_statistics = "moving", False
    assert repr(layer) == (
        "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, normalize_with='moving', "
        "frozen=statistics, implementation='framework', by=multibn)"
    )
    assert repr(ours.BatchNorm(3, 4, BatchNormSpec.article())) == "BatchNorm(3, 4, eps=1e-12, momentum=0.9)"
    assert repr(ours.BatchNorm(3, 2, BatchNormSpec(scale=False))) == "BatchNorm(3, 2, eps=1e-05, momentum=0.9, scale=False)"


def test_momentum_may_be_changed_later() -> None:
    layer: Any = ours.BatchNorm(3, 4, BatchNormSpec(momentum=0.1))
    assert layer.spec.momentum == 0.1
    layer.momentum = 0.25  # PyTorch's momentum is the weight of the new value
    assert layer.spec.momentum == 0.75


def test_second_derivatives_are_right() -> None:
    torch.manual_seed(9)
    for training in (True, False):
        layer: Any = ours.BatchNorm1d(3, implementation="kernel").double().train(training)
        layer.update_statistics = False
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, x)
        assert torch.autograd.gradgradcheck(layer, x)
    bare: Any = ours.BatchNorm1d(3, affine=False).half()
    x = torch.randn(5, 3, requires_grad=True, dtype=torch.float16)
    (dx,) = torch.autograd.grad((bare(x) ** 2).sum(), x, create_graph=True)
    assert dx.requires_grad
    assert dx.dtype == torch.float16
