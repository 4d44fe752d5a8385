"""Equinox's habits."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .gradient import of_large_values

X = jnp.asarray(np.random.default_rng(0).normal(3, 2, (6, 3, 4, 5)), jnp.float32)


def _layer(**options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, axis_name="batch", **options)


def _call(layer: Any, state: Any, x: Any = X, inference: bool = False) -> Any:
    def one(x: Any, state: Any) -> Any:
        return layer(x, state, inference=inference)

    return jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


def _batch_formula(x: Any) -> Any:
    return (x - x.mean((0, 2, 3), keepdims=True)) / jnp.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)


def defaults() -> object:
    """Defaults, in its own words."""
    layer, _ = _layer()
    return f"eps {layer.eps:g}, momentum {layer.momentum:g}, channelwise_affine {layer.channelwise_affine}"


def default_mode() -> object:
    """The mode that it is made with by default; the mode that it has then, and what it warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = eqx.nn.BatchNorm(3, axis_name="batch")
    asked = inspect.signature(eqx.nn.BatchNorm).parameters["mode"].default
    return f"{asked}; {layer.mode}; {str(caught[0].message).split(',')[0] if caught else 'nothing'}"


def _off_in_step(number: int, **options: Any) -> float:
    layer, state = _layer(**options)
    for k in range(1, number + 1):
        y, state = _call(layer, state, X * k)
    return float(jnp.abs(y - _batch_formula(X * number)).max())


def first_step() -> object:
    """Default mode, first training step: largest distance to the output by the batch's statistics."""
    return _off_in_step(1)


def second_step() -> object:
    """Default mode, second training step: the same."""
    return _off_in_step(2)


def second_step_batch() -> object:
    """Mode "batch", second training step: the same."""
    return _off_in_step(2, mode="batch")


def before_training() -> object:
    """Default mode, inference before any training: largest output."""
    layer, state = _layer()
    return float(jnp.abs(_call(layer, state, inference=True)[0]).max())


def inference_after_one_step() -> object:
    """Mode "batch", momentum 0.9: the variance used in inference after one step; (0.9 + 0.1 v)/0.1; 0.9 + 0.1 v."""
    layer, state = _layer(mode="batch", momentum=0.9)
    _, state = _call(layer, state)
    y = _call(layer, state, inference=True)[0]
    used = (X[:, 0].max() - X[:, 0].min()) ** 2 / (y[:, 0].max() - y[:, 0].min()) ** 2
    v = X[:, 0].var()
    return ", ".join(f"{float(each):.4g}" for each in (used, (0.9 + 0.1 * v) / 0.1, 0.9 + 0.1 * v))


def without_vmap() -> object:
    """Called without vmap."""
    layer, state = _layer()
    layer(X[0], state)
    return "accepted"


def gradient_of_large_values() -> object:
    """Mode "batch", a spread of 2^40, 2^44, 2^60, gradients of about 2^-10, float32: largest error of dx, as a part of it."""
    layer, state = _layer(mode="batch")
    return of_large_values(
        lambda x, dy: np.array(jax.vjp(lambda x: _call(layer, state, x), x, has_aux=True)[1](dy)[0]), 1e-5, (40, 44, 60), 2**-10
    )


def integers() -> object:
    """int32 input in mode "batch": type of the output."""
    layer, state = _layer(mode="batch")
    return _call(layer, state, X.astype(jnp.int32))[0].dtype


def half_and_bfloat16() -> object:
    """float16 and bfloat16 input in mode "batch": type of the output."""
    layer, state = _layer(mode="batch")
    return ", ".join(str(_call(layer, state, X.astype(kind))[0].dtype) for kind in (jnp.float16, jnp.bfloat16))


def names() -> object:
    """Names of what it learns; of what its State holds."""
    layer, state = _layer()
    learned, held = (
        [jax.tree_util.keystr(path).lstrip(".") for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
        for tree in (eqx.filter(layer, eqx.is_inexact_array), state)
    )
    return f"{', '.join(learned)}; {', '.join(held)}"
