"""``multibn_jax.BatchNorm`` compared with ``flax.nnx.BatchNorm``: arguments, state, results, errors; and with a spec."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX has an environment of its own: make test-jax")

import jax.numpy as jnp
from flax import nnx

from multibn import BatchNormSpec, kernel
from multibn.layer.nonfinite import PoisonedBatch
from multibn_jax import BatchNorm, How, batch_norm, swap

IMPLEMENTATIONS = ("kernel", "framework")
X = np.random.default_rng(0).standard_normal((6, 5, 4, 3)).astype(np.float32) * 2 + 1
ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "axis 1": {"axis": 1},
    "one axis in a tuple": {"axis": (1,)},
    "momentum, epsilon": {"momentum": 0.5, "epsilon": 0.1},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "dtype float16": {"dtype": jnp.float16},
    "parameters float16": {"param_dtype": jnp.float16},
    "all float16": {"param_dtype": jnp.float16, "dtype": jnp.float16},
    "initialisers": {"scale_init": nnx.initializers.constant(2.0), "bias_init": nnx.initializers.constant(0.5)},
}


def pair(arguments: dict[str, Any], implementation: str) -> tuple[nnx.BatchNorm, nnx.BatchNorm]:
    """Make our layer and Flax's with the same arguments."""
    axis = arguments.get("axis", -1)
    features = X.shape[axis[0] if isinstance(axis, tuple) else axis]
    theirs = nnx.BatchNorm(features, rngs=nnx.Rngs(0), **{**arguments, "use_fast_variance": False})
    return BatchNorm(features, rngs=nnx.Rngs(0), implementation=implementation, **arguments), theirs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_flaxs_arguments_mean_the_same(name: str, implementation: str) -> None:
    arguments = ARGUMENTS[name]
    ours, theirs = pair(arguments, implementation)
    half = jnp.float16 in arguments.values()
    for x in (X, X * 3 - 1):
        a, b = ours(x), theirs(x)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=4e-3 if half else 2e-6, atol=4e-3 if half else 2e-6)
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))
    for a, b in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(theirs)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=4e-3 if half else 1e-6, atol=1e-6)
    for layer in (ours, theirs):
        layer.eval()
    np.testing.assert_allclose(ours(X), theirs(X), rtol=4e-3 if half else 2e-6, atol=4e-3 if half else 2e-6)
    np.testing.assert_array_equal(ours(X), ours(X, use_running_average=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_y_has_flaxs_type(dtype: str) -> None:
    ours, theirs = pair({}, "kernel")
    x = jnp.asarray(X, dtype)
    assert ours(x).dtype == theirs(x).dtype == jnp.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_spec_says_what_the_articles_block_computes(implementation: str) -> None:
    for spec in (
        BatchNormSpec.article(),
        BatchNormSpec.article(average=True),
        BatchNormSpec(scale=False, normalize_with="moving"),
    ):
        block = BatchNorm(5, 4, spec=spec, implementation=implementation)
        mean, var = np.zeros(5, np.float32), np.ones(5, np.float32)
        for i, x in enumerate((X, X + 1)):
            want, _ = kernel.forward(x, np.ones(5, np.float32), None, mean, var, spec, True, batches=i)
            got = block(x)
            for a, b in ((got, want), (block.mean[...], mean), (block.var[...], var)):
                exact = implementation == "kernel"
                np.testing.assert_allclose(a, b, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    assert repr(BatchNorm(8, 4, spec=BatchNormSpec.article())) == "BatchNorm(8, 4, eps=1e-12, momentum=0.9)"


def test_the_articles_mean_of_24_numbers() -> None:
    block = BatchNorm(3, 4, spec=BatchNormSpec(momentum=0.0))
    block(np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2))
    assert block.mean[...].tolist() == [7.5, 11.5, 15.5]


def test_frozen_parameters_get_no_gradient() -> None:
    for learn in (True, False):
        block = BatchNorm(5, 4, spec=BatchNormSpec(learn_affine=learn))
        gradient = nnx.grad(lambda block: (block(X) ** 3).sum())(block)
        assert bool(jnp.abs(gradient["scale"][...]).max() > 0) is learn


def refused(function: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(message) + "$"):
        function()


def test_what_is_not_supported_is_refused_and_changes_nothing() -> None:
    layer, masked = BatchNorm(3, rngs=nnx.Rngs(0), axis_name="batch"), BatchNorm(3, rngs=nnx.Rngs(0))
    before = [np.array(a) for each in (layer, masked) for a in jax.tree.leaves(nnx.state(each))]
    refused(
        lambda: layer(X),
        ValueError,
        "axis_name='batch' is not supported while the batch normalises: each device would need the others' statistics. Under "
        "jax.jit with a sharded batch leave it out, the statistics are the whole batch's there; or use flax.nnx.BatchNorm.",
    )
    refused(
        lambda: masked(X, mask=X > 0),
        ValueError,
        "mask is not supported while the batch normalises: all values of x count. Leave it out, pass only the values that count, "
        "or use flax.nnx.BatchNorm for this layer.",
    )
    refused(
        lambda: BatchNorm(12, axis=(1, 2), rngs=nnx.Rngs(0)),
        ValueError,
        "axis must be one axis, the channels', got (1, 2) (BN-01). Reshape the input so that it is one.",
    )
    refused(
        lambda: masked(X[:1, :1, :1]),
        ValueError,
        "Expected more than 1 value per channel when training, got input of shape (1, 1, 1, 3) (BN-12). One value is its own "
        "mean, so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference.",
    )
    refused(
        lambda: masked(X[..., :2]),
        ValueError,
        "expected 3 channels on axis -1, got 2 in input of shape (6, 5, 4, 2) (BN-01). Build the layer with 2 features, or move "
        "the channel axis of the input.",
    )
    refused(
        lambda: BatchNorm(3, 4, spec=BatchNormSpec(), momentum=0.9),
        ValueError,
        "momentum: the spec says what this layer computes. Put it there, or leave it out.",
    )
    refused(
        lambda: BatchNorm(3, 4)(X[0]),
        ValueError,
        "expected input of rank 4, got rank 3, shape (5, 4, 3) (BN-01). The axes are batch, channel, then space; reshape the "
        "input, or use the layer made for its rank.",
    )
    refused(
        lambda: BatchNorm(5, 4)(X.astype(np.int32)),
        TypeError,
        "expected input of type float16, bfloat16, float32, float64, got int32 (BN-10). Convert the input to float32 first.",
    )
    refused(
        lambda: BatchNorm(3, rngs=nnx.Rngs(0), implementation="fast"),
        ValueError,
        "implementation must be kernel or framework, got 'fast'.",
    )
    refused(
        lambda: BatchNorm(0, 4),
        ValueError,
        "num_features must be an integer >= 1, the size of the channel axis, got 0 (BN-01).",
    )
    refused(
        lambda: BatchNorm(3, 6),
        ValueError,
        "num_dims must be 2, 3, 4 or 5, the rank of the input (N, C, ...), got 6 (BN-01).",
    )
    for layer_ in (layer, masked):
        np.testing.assert_allclose(layer_(X, True, mask=X > 0), nnx.BatchNorm(3, rngs=nnx.Rngs(0))(X, True), rtol=1e-6)
    for a, b in zip(before, [a for each in (layer, masked) for a in jax.tree.leaves(nnx.state(each))], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_function_refuses_wrong_parameters() -> None:
    one, how = jnp.ones(5), How(1e-5, 0.9, False, True, True, 1)
    refused(
        lambda: batch_norm(X, one[:4], one, one, one, 0, how),
        ValueError,
        "gamma must have shape (5,), one value per channel, got (4,) (BN-01). Give one value for each index of the channel axis.",
    )
    refused(
        lambda: batch_norm(X, one, one.astype(jnp.float16), one, one, 0, how),
        TypeError,
        "beta must be float32 for float32 input, got float16 (BN-10). Cast the layer or the input so that they match.",
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_batch_changes_nothing(implementation: str) -> None:
    block = BatchNorm(5, 4, spec=BatchNormSpec(momentum=None), implementation=implementation)
    gradient = nnx.grad(lambda block, x: block(x).sum())(block, X[:0])
    assert block(X[:0]).shape == (0, 5, 4, 3)
    assert (block.batches[...].tolist(), block.mean[...].tolist(), block.var[...].tolist()) == (0, [0] * 5, [1] * 5)
    assert gradient["scale"][...].tolist() == [0] * 5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_poisoned_channel_keeps_its_statistics_and_the_layer_warns_once(implementation: str) -> None:
    x = X.copy()
    x[0, 1, 0, 0] = np.inf
    block = BatchNorm(5, 4, implementation=implementation)
    with pytest.warns(PoisonedBatch, match=r"^BatchNorm\(5\): the batch statistics of 1 channel are not finite \(1\)"):
        y = block(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)
        nnx.jit(lambda block, x: block(x))(BatchNorm(5, 4), x)  # traced: no warning, the statistics are kept all the same
    assert bool(jnp.isnan(y[:, 1]).all())
    assert bool(jnp.isfinite(y[:, [0, 2, 3, 4]]).all())
    assert (float(block.mean[...][1]), float(block.var[...][1])) == (0, 1)
    assert float(block.mean[...][0]) != 0


class Net(nnx.Module):
    def __init__(self, **arguments: Any) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs, **arguments)
        self.blocks = nnx.List([nnx.BatchNorm(16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)])
        self.shared = self.norm

    def __call__(self, x: Any) -> Any:
        h = self.blocks[0](nnx.relu(self.norm(self.conv(x))))
        return self.blocks[1](h.mean((1, 2)))


def test_swap_keeps_the_objects_and_the_paths() -> None:
    net = Net()
    net(jnp.ones((2, 8, 8, 3)))
    objects, state = [net.norm, net.blocks[0], net.norm.scale, net.norm.mean], nnx.state(net)
    assert swap(net) == ["blocks/0", "norm"]
    assert all(a is b for a, b in zip(objects, [net.norm, net.blocks[0], net.norm.scale, net.norm.mean], strict=True))
    assert type(net.norm) is type(net.blocks[0]) is BatchNorm
    assert net.shared is net.norm
    assert jax.tree.structure(state) == jax.tree.structure(nnx.state(net))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(nnx.state(net)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert swap(net) == []


def test_swap_refuses_or_leaves_alone_what_would_be_something_else() -> None:
    net = Net(epsilon=0.0)
    with pytest.raises(ValueError, match=r"^norm: eps must be a finite number > 0, got 0\.0 \(BN-03\)"):
        swap(net)
    assert type(net.blocks[0]) is nnx.BatchNorm

    class Own(nnx.BatchNorm):
        pass

    assert swap(Own(3, rngs=nnx.Rngs(0))) == []
    assert swap(Net(axis_name="batch")) == ["blocks/0"]
