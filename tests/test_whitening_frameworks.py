"""Whitening in PyTorch and in Gluon: the same numbers as in NumPy, state, modes, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from multibn import Whitening, WhiteningSpec
from multibn.layer.types import Array
from multibn.whitening.spec import KINDS

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'multibn[torch]'")
mx = pytest.importorskip("mxnet", reason="needs MXNet: pip install 'multibn[mxnet]'")

from test_whitening import correlated

import multibn_mxnet
import multibn_torch

IMPLEMENTATIONS = ("kernel", "framework")


def in_numpy(spec: WhiteningSpec, x: Array, dy: Array) -> list[Any]:
    layer = Whitening(x.shape[1], x.ndim, spec=spec)
    return [layer.forward(x, True), *layer.backward(dy), layer.moving_mean, layer.moving_covariance]


def in_torch(spec: WhiteningSpec, x: Array, dy: Array, implementation: Any) -> list[Any]:
    layer = multibn_torch.Whitening(x.shape[1], x.ndim, spec=spec, implementation=implementation)
    given = torch.from_numpy(x).requires_grad_()
    y = layer(given)
    y.backward(torch.from_numpy(dy))
    gradients = [None if p is None else p.grad for p in (layer.gamma, layer.beta)]
    arrays = [y, given.grad, *gradients, layer.moving_mean, layer.moving_covariance]
    return [None if a is None else a.detach().numpy() for a in arrays]


def in_gluon(spec: WhiteningSpec, x: Array, dy: Array, implementation: str, hybridized: bool) -> list[Any]:
    block = multibn_mxnet.Whitening(x.shape[1], x.ndim, spec=spec, implementation=implementation)
    block.initialize()
    block.hybridize(hybridized, static_alloc=hybridized)
    given = mx.nd.array(x)
    given.attach_grad()
    with mx.autograd.record():
        y = block(given)
    y.backward(mx.nd.array(dy))
    gradients = [getattr(block, name).grad().asnumpy() if hasattr(block, name) else None for name in ("gamma", "beta")]
    return [
        y.asnumpy(),
        given.grad.asnumpy(),
        *gradients,
        block.moving_mean.data().asnumpy(),
        block.moving_covariance.data().asnumpy(),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(90, 4), (6, 4, 5, 5), (3, 4, 9, 9)])
def test_every_home_gives_the_same(kind: Any, affine: bool, shape: tuple[int, ...]) -> None:
    spec = WhiteningSpec(kind=kind, groups=2, scale=affine, center=affine, momentum=None)
    x, dy = correlated(shape, 3, "float32"), correlated(shape, 4, "float32")
    wanted = in_numpy(spec, x, dy)
    found = [in_torch(spec, x, dy, each) for each in IMPLEMENTATIONS]
    found += [in_gluon(spec, x, dy, each, hybridized) for each in IMPLEMENTATIONS for hybridized in (False, True)]
    for arrays in found:
        for came, right in zip(arrays, wanted, strict=True):
            assert (came is None) == (right is None)
            if right is not None:
                np.testing.assert_allclose(came, right, rtol=1e-3, atol=1e-3 * np.abs(right).max())


def test_gluons_kernel_has_numpys_bits() -> None:
    x, dy = correlated((6, 4, 5, 5), 3, "float32"), correlated((6, 4, 5, 5), 4, "float32")
    for came, right in zip(in_gluon(WhiteningSpec(), x, dy, "kernel", False), in_numpy(WhiteningSpec(), x, dy), strict=True):
        np.testing.assert_array_equal(came, right)


def test_torchs_gradient_is_right_by_gradcheck_at_equal_eigenvalues() -> None:
    x = torch.cat([torch.eye(3), -torch.eye(3)]).double().requires_grad_()
    implementation: Any
    for implementation in IMPLEMENTATIONS:
        layer = multibn_torch.Whitening(3, 2, "zca", implementation=implementation, dtype=torch.float64)
        assert torch.autograd.gradcheck(layer, (x,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pca_says_where_it_has_no_gradient(implementation: Any) -> None:
    said = "kind='pca' has no gradient where eigenvalues of the covariance are equal: those numbered 0 and 1 of group 0 are "
    corners = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
    layer = multibn_torch.Whitening(3, 2, "pca", implementation=implementation)
    with pytest.raises(ValueError) as error:
        layer(torch.from_numpy(corners).requires_grad_()).sum().backward()
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gluon_says_where_pca_has_no_gradient(implementation: str, capfd: pytest.CaptureFixture[str]) -> None:
    block = multibn_mxnet.Whitening(3, 2, "pca", implementation=implementation)
    block.initialize()
    x = mx.nd.array(np.concatenate([np.eye(3), -np.eye(3)]))
    x.attach_grad()
    with mx.autograd.record():
        y = block(x)
    y.backward()
    with pytest.raises(mx.MXNetError):
        x.grad.wait_to_read()
    assert "kind='pca' has no gradient where eigenvalues of the covariance are equal" in capfd.readouterr().out


def test_torchs_state_is_saved_cast_and_told() -> None:
    layer = multibn_torch.Whitening(4, 2, "newton", 2, WhiteningSpec(steps=3)).half()
    assert str(layer) == "Whitening(4, 2, kind='newton', groups=2, steps=3)"
    assert {name: t.dtype for name, t in layer.state_dict().items()} == {
        "weight": torch.float32, "bias": torch.float32, "running_mean": torch.float32, "running_covariance": torch.float32,
        "num_batches_tracked": torch.int64,
    }  # fmt: skip
    for kind in (torch.float16, torch.bfloat16):
        x = torch.randn(30, 4).to(kind).requires_grad_()
        y = layer(x)
        y.float().sum().backward()
        assert (y.dtype, x.grad.dtype) == (kind, kind)
    other = multibn_torch.Whitening(4, 2, "newton", 2, WhiteningSpec(steps=3))
    other.load_state_dict(layer.state_dict())
    assert int(other.num_batches_tracked) == 2
    torch.testing.assert_close(other.eval()(x.float()), layer.eval()(x.float()))
    assert multibn_torch.Whitening(4, 2)(torch.empty(0, 4, requires_grad=True)).shape == (0, 4)


def test_gluons_state_is_saved_cast_and_told(tmp_path: Any) -> None:
    block = multibn_mxnet.Whitening(4, 2, "newton", 2)
    block.initialize()
    assert repr(block) == "Whitening(4, 2, kind='newton', groups=2)"
    assert block.spec.kind == "newton"
    block.cast("float16")
    assert block.running_covariance.dtype == "float32"
    with mx.autograd.record():
        block(mx.nd.array(correlated((30, 4)), dtype="float16"))
    block.save_parameters(str(tmp_path / "state"))
    other = multibn_mxnet.Whitening(4, 2, "newton", 2)
    other.load_parameters(str(tmp_path / "state"))
    assert (other.running_mean.data() == block.running_mean.data()).asnumpy().all()
    mx.util.set_np()
    try:
        assert type(other(mx.np.ones((3, 4)))).__name__ == "ndarray"
    finally:
        mx.util.reset_np()


def test_what_is_wrong_is_refused() -> None:
    wrong_rank = (
        "expected input of rank 2, got rank 4, shape (1, 3, 2, 2) (BN-01). The axes are batch, channel, then space; reshape the "
        "input, or use the layer made for its rank."
    )
    with pytest.raises(ValueError) as in_torch_:
        multibn_torch.Whitening(3, 2)(torch.ones(1, 3, 2, 2))
    assert str(in_torch_.value) == wrong_rank
    block = multibn_mxnet.Whitening(3, 2)
    block.initialize()
    with pytest.raises(mx.MXNetError) as in_gluon_:
        block(mx.nd.ones((1, 3, 2, 2)))
    assert str(in_gluon_.value) == wrong_rank
    with pytest.raises(ValueError) as torchs:
        multibn_torch.Whitening(3, 2, implementation="fast")  # type: ignore[arg-type]
    assert str(torchs.value) == "implementation must be 'auto' or 'kernel' or 'framework', got 'fast'."
    with pytest.raises(ValueError) as gluons:
        multibn_mxnet.Whitening(3, 2, implementation="fast")
    assert str(gluons.value) == "implementation must be 'auto', 'kernel', 'framework', got 'fast'."


def test_gradients_add_up_and_are_left_out_as_asked_for_in_gluon() -> None:
    x, dy = correlated((20, 4), 3, "float32"), correlated((20, 4), 4, "float32")
    once = in_numpy(WhiteningSpec(), x, dy)
    block = multibn_mxnet.Whitening(4, 2)
    block.initialize()
    block.beta.grad_req = "null"
    given = mx.nd.array(x)
    given.attach_grad(grad_req="add")
    for _ in range(2):
        with mx.autograd.record():
            y = block(given)
        y.backward(mx.nd.array(dy))
    np.testing.assert_allclose(given.grad.asnumpy(), 2 * once[1], rtol=1e-6)
