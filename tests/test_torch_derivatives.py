"""Derivatives of any order and mode, and torch.func transforms, of layers in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import multibn_torch as ours
from multibn_torch.forward.formulas import Moving, Settings
from multibn_torch.forward.operators import by_custom_operator

pytestmark = [  # 2026-11-25: torch 2.13's forward mode uses what torch deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
IMPLEMENTATIONS: list[Any] = ["kernel", "framework"]
ONE_ULP = {"rtol": 2.0**-22, "atol": 2.0**-22}
"""Two results near 1 that both satisfy BN-16 are at most adjacent floats; allow twice that for values derived from them."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def fixed(implementation: Any, mode: str, cls: Any = ours.BatchNorm1d) -> Any:
    """Make a float64 layer that does not update its statistics."""
    layer = cls(3, implementation=implementation).double().train(mode != "inference")
    layer.update_statistics = False
    layer.normalize_with = "moving" if mode == "moving" else "batch"
    layer.running_mean.copy_(torch.randn(3))
    layer.running_var.copy_(torch.rand(3) + 0.5)
    return layer


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["training", "moving", "inference"])
def test_first_and_second_derivatives_in_every_mode(mode: str, implementation: Any) -> None:
    layer = fixed(implementation, mode)

    def function(x: Any, weight: Any, bias: Any) -> Any:
        return functional_call(layer, {"weight": weight, "bias": bias}, x)

    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (3,), (3,))]
    assert torch.autograd.gradcheck(function, given, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, given, check_fwd_over_rev=True, check_batched_grad=True)


def by_hand(x: Any) -> Any:
    """Compute ``nn.BatchNorm2d(3)`` with elementary operators, whose derivatives are reliable."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_higher_derivatives_where_pytorchs_own_are_wrong(implementation: Any) -> None:
    layer = fixed(implementation, "training", ours.BatchNorm2d)
    x, v = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)

    def along(function: Any) -> Any:
        return lambda t: function(x + t * v).pow(3).sum()

    def reverse(function: Any) -> Any:
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value, found = along(function)(t), []
        for _ in range(4):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
            found.append(value.detach())
        return found

    def forward(function: Any) -> Any:
        one, found, each = torch.ones((), dtype=torch.float64), [], along(function)
        for _ in range(3):
            each = (lambda inner: lambda t: jvp(inner, (t,), (one,))[1])(each)
            found.append(each(one * 0))
        return found

    torch.testing.assert_close(reverse(layer), reverse(by_hand), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forward(layer), forward(by_hand), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_transforms_see_a_layer_that_trains_and_update_it_once(momentum: Any, implementation: Any) -> None:
    layer: Any = ours.BatchNorm1d(3, momentum=momentum, implementation=implementation)
    x = torch.randn(6, 3)

    def loss(x: Any) -> Any:
        return layer(x).pow(3).sum()

    own = torch.nn.BatchNorm1d(3, momentum=momentum)
    own(x)
    for transformed in (
        grad(loss), hessian(loss), jacrev(layer), jacfwd(layer), lambda x: jvp(layer, (x,), (x,)), lambda x: vjp(layer, x)[1](x)
    ):  # fmt: skip
        layer.reset_running_stats()
        transformed(x)
        assert layer.num_batches_tracked == 1
        assert not layer.running_mean.requires_grad
        torch.testing.assert_close(layer.running_mean, own.running_mean)
        torch.testing.assert_close(layer.running_var, own.running_var)
    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(grad(loss)(x), leaf.grad)


def test_transforms_keep_the_accuracy() -> None:
    layer: Any = ours.BatchNorm1d(3)
    x = torch.randn(2, 64, 3) + 1e4
    layer.update_statistics = False
    torch.testing.assert_close(vmap(layer)(x), torch.stack([layer(each) for each in x]), **ONE_ULP)
    torch.testing.assert_close(vjp(layer, x[0])[0], layer(x[0]), **ONE_ULP)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_takes_each_sample_as_a_batch(implementation: Any) -> None:
    layer: Any = ours.BatchNorm1d(3, implementation=implementation)
    x = torch.randn(4, 6, 3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError) as caught:
        vmap(layer)(x)
    assert str(caught.value) == (
        "expected moving statistics for each of the 4 batches that vmap maps over, got one running_mean, running_var and "
        "num_batches_tracked (BN-05). Give each its own (torch.func.stack_module_state and functional_call), set "
        "update_statistics=False, or use inference."
    )
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    for training in (True, False):
        layer.train(training)
        layer.update_statistics = False
        each = torch.stack([layer(sample) for sample in x])
        torch.testing.assert_close(vmap(layer)(x), each)
        torch.testing.assert_close(vmap(layer, in_dims=1, out_dims=1)(x.movedim(0, 1)).movedim(1, 0), each)

    def loss(parameters: Any, sample: Any) -> Any:
        return functional_call(layer, parameters, sample[None]).pow(2).sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x[0])  # per-sample gradients, in inference
    torch.testing.assert_close(gradients["bias"], 2 * layer(x[0]))


@pytest.mark.filterwarnings("ignore::multibn.layer.PoisonedBatch")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_vmap_trains_many_layers_at_once(momentum: Any, implementation: Any) -> None:
    layers: Any = [ours.BatchNorm1d(3, momentum=momentum, implementation=implementation) for _ in range(4)]
    layers[1].running_mean.add_(3)
    layers[1].num_batches_tracked.add_(5)
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(4, 6, 3)
    x[2, :, 1] = float("inf")
    base = copy.deepcopy(layers[0])

    def loss(parameters: Any, buffers: Any, x: Any) -> Any:
        return functional_call(base, (parameters, buffers), (x,)).square().nansum()

    gradients = vmap(grad(loss))(parameters, buffers, x)
    vmap(loss, in_dims=(0, 0, None))(parameters, buffers, x[0])
    for i, layer in enumerate(layers):
        layer(x[i]).square().nansum().backward()
        layer(x[0])
        torch.testing.assert_close(gradients["weight"][i], layer.weight.grad, equal_nan=True)
        for name, value in layer.named_buffers():
            torch.testing.assert_close(buffers[name][i], value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_functional_call_updates_what_it_is_given(implementation: Any) -> None:
    layer: Any = ours.BatchNorm1d(3, implementation=implementation)
    before = copy.deepcopy(layer.state_dict())
    wide = {name: torch.stack([value, value], -1) for name, value in before.items()}
    given = {name: value[..., 0] for name, value in wide.items()}  # a view of every other value
    x = torch.randn(6, 3)
    functional_call(layer, given, x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer(x)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(given[name], value)
        assert torch.equal(wide[name][..., 1], before[name])


def test_a_pulled_apart_gamma_is_read_right() -> None:
    layer: Any = ours.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    one = torch.full((1,), 2.0, requires_grad=True)
    y = functional_call(layer, {"weight": one.expand(3), "bias": torch.zeros(6)[::2]}, x)
    y.square().sum().backward()
    torch.testing.assert_close(y, 2 * layer(x))
    torch.testing.assert_close(one.grad, 2 * layer(x).square().sum().view(1) * 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_what_was_taken_out_of_a_transform_is_a_tensor_like_others(training: bool, enabled: bool) -> None:
    taken, x, layer = [], torch.randn(8, 3), ours.BatchNorm1d(3).train(training)

    def total(v: Any) -> Any:
        taken.append(v * 2)
        return v.sum()

    grad(total)(x)
    assert torch._C._functorch.is_dead_tensor_wrapper(taken[0])
    with torch.set_grad_enabled(enabled):
        torch.testing.assert_close(layer(taken[0]), copy.deepcopy(layer).train(training)(x * 2), rtol=0, atol=0)


def test_gradients_that_are_mapped_over() -> None:
    layer: Any = fixed("kernel", "training")
    x = torch.randn(4, 3, dtype=torch.float64)
    one_by_one = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(layer, x, vectorize=True), one_by_one)
    torch.testing.assert_close(jacrev(layer)(x), one_by_one)


def test_a_tangent_of_the_gradient_is_not_lost() -> None:
    layer: Any = fixed("kernel", "training")
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy, tangent = torch.randn(2, 4, 3, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, torch.autograd.forward_ad.make_dual(dy, tangent), retain_graph=True)
        found = torch.autograd.forward_ad.unpack_dual(dx).tangent
    (wanted,) = torch.autograd.grad(y, x, tangent)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("use_batch", [True, False])
def test_the_operator_has_the_same_derivatives(use_batch: bool, masked: bool) -> None:
    moving = Moving(torch.zeros(2).double(), torch.ones(2).double(), torch.zeros((), dtype=torch.int64))
    how = Settings(1e-5, 0.9, True, use_batch, False)
    mask = torch.tensor([[True, True, False], [True, False, False]]) if masked else None
    x, gamma, beta = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2, 3), (2,), (2,)))

    def function(x: Any, gamma: Any, beta: Any) -> Any:
        return by_custom_operator(x, gamma, beta, moving, how, mask)

    assert torch.autograd.gradcheck(function, (x, gamma, beta))
    assert torch.autograd.gradgradcheck(function, (x, gamma, beta))
