"""Whitening: the derivation, the matrices and their gradients, the layers of all backends, and their errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import multibn
from multibn import WhiteningSpec
from multibn.layer.types import Array
from multibn.memory import LENT
from multibn.whitening import matrix
from multibn.whitening.derivation import whiten
from multibn.whitening.layer import ReferenceWhitening
from multibn.whitening.spec import CLAUSES, KINDS

Whitening = multibn.Whitening


def correlated(shape: tuple[int, ...], seed: int = 0, dtype: str = "float64") -> Array:
    draw = np.random.default_rng(seed)
    c = shape[1]
    mixed = np.tensordot(draw.standard_normal(shape), draw.standard_normal((c, c)) + np.eye(c), axes=(1, 0))
    return np.ascontiguousarray(np.moveaxis(mixed, -1, 1) + 3).astype(dtype)


def covariance_of(y: Array) -> Array:
    values = np.moveaxis(y, 1, 0).reshape(y.shape[1], -1).astype(np.float64)
    return np.asarray(np.cov(values, bias=True))


@pytest.mark.parametrize("kind", ["pca", "zca"])
@pytest.mark.parametrize("standardise", [True, False])
def test_the_articles_derivation_gives_the_identity_for_covariance(kind: Any, standardise: bool) -> None:
    done = whiten(correlated((50, 4)), kind, eps=0, standardise=standardise)
    np.testing.assert_allclose(done.output.T @ done.output / 50, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(done.output.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(done.rotation @ done.rotation.T, np.eye(4), atol=1e-12)
    assert (np.diff(done.eigenvalues) <= 0).all()
    if kind == "zca":
        np.testing.assert_allclose(done.matrix, done.matrix.T, atol=1e-12)


def test_it_is_scikit_learns_up_to_sign() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="the comparison needs scikit-learn")
    x = correlated((40, 5))
    theirs = decomposition.PCA(whiten=True).fit(x)
    ours = whiten(x, eps=0, standardise=False, unbiased=True)
    transformed = theirs.transform(x)
    signs = np.sign((transformed * ours.output).sum(axis=0))
    np.testing.assert_allclose(ours.output * signs, transformed, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.eigenvalues, theirs.explained_variance_, rtol=1e-12)


def test_directions_without_variance_come_out_as_0_or_are_an_error() -> None:
    x = correlated((30, 4))
    x[:, 1], x[:, 3] = 0.1, 2 * x[:, 0]  # constant, dependent
    done = whiten(x)
    np.testing.assert_allclose(done.output[:, 2:], 0, atol=1e-12)
    np.testing.assert_allclose(done.output[:, :2].T @ done.output[:, :2] / 30, np.eye(2), atol=1e-9)
    few = whiten(correlated((3, 5)))
    assert np.linalg.matrix_rank(few.output) == 2
    with pytest.raises(ValueError) as error:
        whiten(x, eps=0)
    assert str(error.value) == (
        "eps=0 needs variance in every direction, got 2 of 4 with 30 samples (WH-08). Give an eps > 0, such as "
        "1e-12, or leave out "
        "features that are constant or depend on others."
    )


def test_a_single_feature_is_standardised_and_equal_eigenvalues_are_whitened() -> None:
    x = correlated((20, 1))
    np.testing.assert_allclose(whiten(x, eps=0).output, (x - x.mean()) / x.std(), rtol=1e-12)
    corners = np.concatenate([np.eye(3), -np.eye(3)])
    for kind in ("pca", "zca"):
        output = whiten(corners, kind, eps=0).output
        np.testing.assert_allclose(output.T @ output / 6, np.eye(3), atol=1e-12)
    assert not whiten(np.full((5, 2), 0.1)).output.any()


@pytest.mark.parametrize(
    ("x", "named", "message"),
    [
        (np.ones((3, 2), int), {}, "expected samples of a floating type, got int64 (WH-09). Convert them to float64 first."),
        (
            np.ones(3),
            {},
            "expected samples of shape (n, d) with n >= 2 and d >= 1, got (3,) (WH-01). One sample is its own mean, so its "
            "covariance is 0.",
        ),
        (
            np.array([[1.0], [np.nan]]),
            {},
            "expected finite samples, got NaN or Inf (WH-08). Leave those samples or features out.",
        ),
        (np.ones((3, 2)), {"eps": -1.0}, "eps must be a finite number >= 0, got -1.0 (WH-03). The article's is 1e-12."),
        (np.ones((3, 2)), {"kind": "ica"}, "kind must be 'pca' or 'zca', got 'ica' (WH-03)."),
    ],
)
def test_what_cannot_be_whitened_is_refused(x: Array, named: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        whiten(x, **named)
    assert str(error.value) == message


def test_the_spec_round_trips_and_refuses() -> None:
    spec = WhiteningSpec(kind="newton", groups=4, momentum=None)
    assert WhiteningSpec.from_dict(spec.to_dict()) == spec
    assert eval(repr(spec)) == spec
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"eps": 0},
            "eps must be a finite number > 0, got 0 (WH-03). It is added to every eigenvalue, for a direction without "
            "variance has "
            "eigenvalue 0; use a small number, such as the article's 1e-12.",
        ),
        (
            {"momentum": 1.0},
            "momentum must be a number with 0 <= momentum < 1, or None, got 1.0 (WH-05). It is the weight of the OLD value; "
            "PyTorch's number is the weight of the new one, so use 1 minus it.",
        ),
        ({"kind": "ica"}, "kind must be 'zca' or 'pca' or 'newton', got 'ica' (WH-03)."),
        ({"groups": 0}, "groups must be an integer >= 1, the number of groups of channels, got 0 (WH-01)."),
        ({"steps": True}, "steps must be an integer >= 1, the number of Newton steps, got True (WH-03)."),
        ({"scale": 1}, "scale must be True or False, got 1 of type int."),
    ]
    for values, message in cases:
        with pytest.raises((TypeError, ValueError)) as error:
            WhiteningSpec(**values)
        assert str(error.value) == message
    with pytest.raises(TypeError) as unknown:
        WhiteningSpec.from_dict({"affine": True})
    assert str(unknown.value) == (
        "WhiteningSpec has no parameter 'affine'; it has eps, momentum, kind, groups, steps, scale, center."
    )
    with pytest.raises(ValueError) as divide:
        Whitening(6, 4, groups=4)
    assert str(divide.value) == (
        "groups must divide num_features, for the groups are equal, got 4 groups of 6 channels (WH-01). Use a "
        "divisor of the number "
        "of channels."
    )
    with pytest.raises(ValueError) as features:
        Whitening(0, 4)
    assert str(features.value) == "num_features must be an integer >= 1, the size of the channel axis, got 0 (WH-01)."
    with pytest.raises(ValueError) as dims:
        Whitening(4, 6)
    assert str(dims.value) == "num_dims must be 2, 3, 4 or 5, the rank of the input (N, C, ...), got 6 (WH-01)."
    assert repr(Whitening(4, 2, "pca", 2, WhiteningSpec(eps=1e-3))) == "Whitening(4, 2, kind='pca', groups=2, eps=0.001)"


@pytest.mark.parametrize("kind", ["zca", "pca"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(64, 6), (8, 6, 40, 2), (3, 6, 2500), (300, 6, 7)])
def test_a_batch_is_whitened(kind: Any, groups: int, shape: tuple[int, ...]) -> None:
    y = Whitening(6, len(shape), kind, groups).forward(correlated(shape, dtype="float32"), training=True)
    d = 6 // groups
    for i in range(groups):
        np.testing.assert_allclose(covariance_of(y[:, i * d : (i + 1) * d]), np.eye(d), atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 6, 11), (1500, 6), (2, 6, 3000)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_kernel_is_the_reference(kind: Any, shape: tuple[int, ...], dtype: str) -> None:
    """Blocks of many samples, of one, and of parts of one."""
    layers: list[Any] = [make(6, len(shape), kind, 2) for make in (Whitening, ReferenceWhitening)]
    x, dy = correlated(shape, 1, dtype), correlated(shape, 2, dtype)
    near: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4} if dtype == "float32" else {"rtol": 1e-9, "atol": 1e-9}
    for training in (True, False):
        found = []
        for layer in layers:
            for name in ("gamma", "beta", "moving_mean", "moving_covariance"):
                setattr(layer, name, getattr(layer, name).astype(dtype))
            layer.gamma[::2] = -2
            y = layer.forward(x, training)
            found.append((y, *layer.backward(dy), layer.moving_mean, layer.moving_covariance))
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, **near)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_through_the_matrix_is_that_of_finite_differences(kind: Any) -> None:
    spec = WhiteningSpec(kind=kind, eps=1e-3)
    covariance = covariance_of(correlated((30, 4)))[None]
    owed = np.random.default_rng(5).standard_normal((1, 4, 4))
    came = matrix.adjoint(matrix.decompose(covariance), owed, spec)
    for i in range(4):
        for j in range(4):
            step = np.zeros((1, 4, 4))
            step[0, i, j] += 1e-5
            step[0, j, i] += 1e-5

            def loss(at: Array) -> float:
                return float((owed * matrix.matrix(matrix.decompose(at), spec)).sum())

            slope = (loss(covariance + step) - loss(covariance - step)) / 2e-5
            assert slope == pytest.approx(2 * came[0, i, j], rel=1e-5, abs=1e-5)


def test_equal_eigenvalues_have_a_zca_gradient_and_no_pca_gradient() -> None:
    covariance = np.eye(3)[None] * 0.5
    owed = np.arange(9.0).reshape(1, 3, 3)
    spec = WhiteningSpec(kind="zca", eps=0.5)
    came = matrix.adjoint(matrix.decompose(covariance), owed, spec)
    np.testing.assert_allclose(came, -(owed + owed.swapaxes(1, 2)) / 4)  # f' = -1/2 at l + eps = 1
    pca = WhiteningSpec(kind="pca")
    with pytest.raises(ValueError) as error:
        matrix.adjoint(matrix.decompose(covariance), owed, pca)
    assert str(error.value) == (
        "kind='pca' has no gradient where eigenvalues of the covariance are equal: those numbered 0 and 1 of "
        "group 0 are 0.5 and 0.5 "
        "(WH-07). Any rotation of their eigenvectors is right, so that the slightest change of the input may turn them. Use "
        "kind='zca', whose gradient exists."
    )
    empty = np.diag([1.0, 0.0, 0.0])[None]  # what has no variance is held fixed
    assert np.isfinite(matrix.adjoint(matrix.decompose(empty), owed, pca)).all()


def test_the_layer_refuses_and_stays_as_it_was() -> None:
    layer = Whitening(3, 2)
    for x, kind, message in (
        (
            np.ones((1, 3), np.float32),
            ValueError,
            "Expected more than 1 value per channel when training, got input of shape (1, 3) (BN-12). One value is "
            "its own mean, so "
            "its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference.",
        ),
        (
            np.ones((5, 3), np.int32),
            TypeError,
            "expected input of type float16, bfloat16, float32, float64, got int32 (BN-10). Convert the input to float32 first.",
        ),
    ):
        with pytest.raises(kind) as error:
            layer.forward(x, training=True)
        assert str(error.value) == message
    with pytest.raises(ValueError) as none:
        layer.backward(np.ones((5, 3), np.float32))
    assert str(none.value) == "backward needs a forward before it, and there was none. Call forward(x, training) first."
    layer.forward(correlated((5, 3), dtype="float32"), training=False)
    with pytest.raises(ValueError) as shape:
        layer.backward(np.ones((5, 2), np.float32))
    assert str(shape.value) == (
        "dy must have the input's shape (5, 3) and type float32, got shape (5, 2) and type float32. Give the gradient of this "
        "forward's output."
    )
    assert layer.batches == 0
    assert not layer.moving_mean.any()


def test_large_outputs_come_from_memory_that_is_used_again() -> None:
    x = correlated((40, 8, 40, 40), dtype="float32")
    layer = Whitening(8, 4, spec=WhiteningSpec(eps=1e-9))
    assert covariance_of(layer.forward(x, training=True)) == pytest.approx(np.eye(8), abs=2e-3)
    assert x.nbytes > LENT


def test_the_clauses_are_printed() -> None:
    from typer.testing import CliRunner

    from multibn.cli import app

    lines = CliRunner().invoke(app, ["clauses"]).stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("WH")] == list(CLAUSES)
