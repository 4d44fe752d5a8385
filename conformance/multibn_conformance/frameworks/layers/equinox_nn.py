"""equinox.nn.BatchNorm as a subject, with JAX's 64-bit mode on, in its default mode and in mode "batch". Needs NumPy, JAX and
Equinox only.
"""

from __future__ import annotations

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)


class Equinox:
    """A module under vmap over axis 0; mode None is Equinox's default."""

    def __init__(self, num_features: int, spec: Any, mode: str | None) -> None:
        options = {"dtype": jnp.float32} | ({} if spec is None else _options(spec)) | ({} if mode is None else {"mode": mode})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the default mode warns that another mode is recommended
            self._layer, self._state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(num_features, axis_name="batch", **options)
        self._learned = spec is None or spec.learn_affine
        self._with_batch = spec is None or spec.normalize_with == "batch"

    @property
    def _index(self) -> Any:
        return self._layer.ema_state_index if self._layer.mode == "ema" else self._layer.batch_state_index

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state, with no batch seen in mode "batch" and one in the default mode, which would otherwise discard the
        state.
        """
        if self._layer.weight is not None:
            c, kind = len(moving_mean), moving_mean.dtype
            given = np.ones(c, kind) if gamma is None else gamma, np.zeros(c, kind) if beta is None else beta
            self._layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), self._layer, tuple(map(jnp.array, given)))
        self._layer, self._state = _with_buffers(self._layer, (jnp.array(moving_mean), jnp.array(moving_var)))

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        inference = not (training and self._with_batch)
        parameters, rest = eqx.partition(self._layer, eqx.is_inexact_array)

        def run(parameters: Any, x: Any) -> Any:
            layer = eqx.combine(parameters, rest)
            call = jax.vmap(lambda each, state: layer(each, state, inference=inference), axis_name="batch", in_axes=(0, None),
                            out_axes=(0, None))  # fmt: skip
            return call(x, self._state)

        x = jnp.array(x)
        y, self._pullback, self._state = jax.vjp(run, parameters, x, has_aux=True)
        self._type = y.dtype
        return np.array(y)

    def backward(self, dy: Any) -> Any:
        """Return (dx, dgamma, dbeta) of the last forward."""
        gradients, dx = self._pullback(jnp.array(dy, self._type))
        learned = self._learned and gradients.weight is not None
        return np.array(dx), np.array(gradients.weight) if learned else None, np.array(gradients.bias) if learned else None

    def moving(self) -> Any:
        """Return the stored buffers."""
        return tuple(np.array(each) for each in self._state.get(self._index))


def _with_buffers(layer: Any, buffers: Any) -> Any:
    """Return the layer with these initial buffers, since a State does not accept another type later."""
    if layer.mode == "ema":
        made = eqx.tree_at(
            lambda own: (own.ema_state_index.init, own.ema_first_time_index.init), layer, (buffers, jnp.array(False))
        )
    else:
        made = eqx.tree_at(lambda own: (own.batch_state_index.init, own.batch_counter.init), layer, (buffers, jnp.array(0)))
    return made, eqx.nn.State(made)


def _options(spec: Any) -> dict[str, Any]:
    if spec.momentum is None:
        raise NotImplementedError("equinox.nn.BatchNorm has no average with equal weights")
    if spec.scale != spec.center:
        raise NotImplementedError("equinox.nn.BatchNorm has gamma and beta or neither")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError("equinox.nn.BatchNorm has one switch: inference normalises with the moving ones and keeps them")
    return {"eps": spec.eps, "momentum": spec.momentum, "channelwise_affine": spec.scale}


def make(num_features: int, spec: Any = None, device: str = "cpu") -> Equinox:
    """Make a subject in the default mode; without a spec, it has Equinox's own defaults, apart from float32 parameters in 64-bit
    mode.
    """
    return Equinox(num_features, spec, None)


def make_batch(num_features: int, spec: Any = None, device: str = "cpu") -> Equinox:
    """Make a subject in mode "batch"."""
    return Equinox(num_features, spec, "batch")
