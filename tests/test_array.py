"""The NumPy layer: accepted input, and errors with whole messages."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from multibn.array import BatchNorm
from multibn.layer.nonfinite import PoisonedBatch, poisoned
from multibn.numpy_backend import BACKEND, KernelSubject, ReferenceSubject
from multibn.spec.batchnorm import BatchNormSpec

X = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)


def test_the_articles_example() -> None:
    layer = BatchNorm(3, 4, BatchNormSpec.article())
    y = layer.forward(X, training=True)
    assert layer.moving_mean.tolist() == np.array([0.75, 1.15, 1.55], np.float32).tolist()
    assert np.array_equal(y, ReferenceSubject(3, BatchNormSpec.article()).forward(X, training=True))
    assert layer.batches == 1
    assert [None if a is None else a.shape for a in layer.backward(X)] == [(2, 3, 2, 2), (3,), (3,)]


@pytest.mark.parametrize(
    ("num_features", "num_dims", "message"),
    [
        (0, 4, "num_features must be an integer >= 1, the size of the channel axis, got 0 (BN-01)."),
        (True, 4, "num_features must be an integer >= 1, the size of the channel axis, got True (BN-01)."),
        (2.0, None, "num_features must be an integer >= 1, the size of the channel axis, got 2.0 (BN-01)."),
        (3, 1, "num_dims must be 2, 3, 4 or 5, the rank of the input (N, C, ...), got 1 (BN-01)."),
        (3, 6, "num_dims must be 2, 3, 4 or 5, the rank of the input (N, C, ...), got 6 (BN-01)."),
    ],
)
def test_sizes_that_no_layer_has(num_features: Any, num_dims: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        BatchNorm(num_features, num_dims)
    assert str(caught.value) == message


def test_repr() -> None:
    assert repr(BatchNorm(3, 4)) == "BatchNorm(3, 4, eps=1e-05, momentum=0.9)"


@pytest.mark.parametrize("spec", [BatchNormSpec(scale=False), BatchNormSpec(center=False), BatchNormSpec(learn_affine=False)])
def test_no_gradient_for_what_there_is_not(spec: BatchNormSpec) -> None:
    layer = BatchNorm(3, 4, spec)
    layer.forward(X, training=True)
    _, dgamma, dbeta = layer.backward(X)
    assert (dgamma is None, dbeta is None) == (not (spec.scale and spec.learn_affine), not (spec.center and spec.learn_affine))
    assert (layer.gamma is None, layer.beta is None) == (not spec.scale, not spec.center)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            X[0],
            ValueError,
            "expected input of rank 4, got rank 3, shape (3, 2, 2) (BN-01). The axes are batch, channel, then space; "
            "reshape the input, or use the layer made for its rank.",
        ),
        (
            X.astype(np.int64),
            TypeError,
            "expected input of type float16, bfloat16, float32, float64, got int64 (BN-10). Convert the input to float32 first.",
        ),
        (
            X[:1, :, :1, :1],
            ValueError,
            "Expected more than 1 value per channel when training, got input of shape (1, 3, 1, 1) (BN-12). One value is its own "
            "mean, so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference.",
        ),
    ],
)
def test_refused_input_leaves_the_state(x: np.ndarray, error: type[Exception], message: str) -> None:  # type: ignore[type-arg]
    layer = BatchNorm(3, 4)
    with pytest.raises(error) as caught:
        layer.forward(x, training=True)
    assert str(caught.value) == message
    assert (layer.moving_mean.tolist(), layer.moving_var.tolist(), layer.batches) == ([0, 0, 0], [1, 1, 1], 0)


@pytest.mark.parametrize("normalize_with", ["batch", "moving"])
def test_a_poisoned_batch_is_told_once(normalize_with: Any) -> None:
    layer, x = BatchNorm(3, 4, BatchNormSpec(momentum=None, normalize_with=normalize_with)), X.copy()
    x[1, 2, 0, 0] = np.inf
    layer.forward(x, training=False)  # a warning would be an error
    with pytest.warns(PoisonedBatch) as warned:
        layer.forward(x, training=True)
    assert [str(warning.message) for warning in warned] == [poisoned("BatchNorm(3)", [2])]
    assert warned[0].filename == __file__
    assert (layer.batches, layer.moving_mean[2], layer.moving_var[2]) == (1, 0, 1)
    layer.forward(x, training=True)
    KernelSubject(3).forward(x, training=True)
    large = BatchNorm(3, 4)
    large.forward(X * np.float32(1e30), training=True)  # finite, but its variance is beyond float32
    assert large.moving_var.tolist() == [1, 1, 1]


def test_refused_gradients() -> None:
    layer = BatchNorm(3, 4)
    with pytest.raises(ValueError) as caught:
        layer.backward(X)
    assert str(caught.value) == "backward needs a forward before it, and there was none. Call forward(x, training) first."
    layer.forward(X, training=True)
    with pytest.raises(ValueError) as caught:
        layer.backward(X[:1])
    assert str(caught.value) == (
        "dy must have the input's shape (2, 3, 2, 2) and type float32, got shape (1, 3, 2, 2) and type float32. "
        "Give the gradient of this forward's output."
    )


def test_the_backend_makes_both() -> None:
    made = {name: BACKEND.make(3, None, "cpu", name) for name in BACKEND.implementations}
    assert {name: type(subject) for name, subject in made.items()} == {"reference": ReferenceSubject, "kernel": KernelSubject}
    assert BACKEND.devices() == ("cpu",)


def test_importing_it_loads_no_numba() -> None:
    code = "import sys, multibn.array; print(sorted({'numba', 'torch', 'mxnet'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
