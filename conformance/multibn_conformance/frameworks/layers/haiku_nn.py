"""haiku.BatchNorm as a subject, with JAX's 64-bit mode on. Needs NumPy, JAX and Haiku only."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)


class Haiku:
    """A transformed function; its moving statistics are the averages that it normalises with in inference."""

    def __init__(self, num_features: int, spec: Any) -> None:
        options = {"create_scale": True, "create_offset": True, "decay_rate": 0.9} if spec is None else _options(spec)
        self._learned = spec is None or spec.learn_affine
        self._with_batch = spec is None or spec.normalize_with == "batch"

        def call(x: Any, training: bool) -> Any:
            return hk.BatchNorm(data_format="channels_first", **options)(x, is_training=training)

        self._net = hk.without_apply_rng(hk.transform_with_state(call))
        self._rank = 0
        ones, zeros = np.ones(num_features, np.float32), np.zeros(num_features, np.float32)
        self.load(ones, zeros, zeros, ones)

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state: the averages, with a count of 0 batches."""
        self._given = {"scale": gamma, "offset": beta}, (moving_mean, moving_var)
        self._rank = 0

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        given = jnp.array(x)
        if x.ndim != self._rank:
            self._start(x.ndim, given)

        def run(parameters: Any, x: Any) -> Any:
            return self._net.apply(parameters, self._state, x, training and self._with_batch)

        if np.issubdtype(x.dtype, np.floating):
            y, self._pullback, self._state = jax.vjp(run, self._parameters, given, has_aux=True)
        else:
            y, self._state = run(self._parameters, given)
        self._type = y.dtype
        return np.array(y)

    def _start(self, rank: int, x: Any) -> None:
        """Return the state for input of this rank; its arrays have the rank of the input."""
        averages = self.moving()
        c = len(averages[0])
        shape = (1, c, *[1] * (rank - 2))
        example = jnp.zeros((2, c, *[2] * (rank - 2)), averages[0].dtype)
        parameters, state = self._net.init(jax.random.PRNGKey(0), example, True)
        self._parameters = {
            layer: {name: jnp.reshape(self._given[0][name], shape) for name in its} for layer, its in parameters.items()
        }
        loaded = dict(zip(("mean_ema", "var_ema"), averages, strict=True))
        self._state = {
            layer: {
                name: jnp.reshape(loaded[layer.split("/")[-1]], shape) if name == "average" else jnp.zeros_like(value)
                for name, value in its.items()
            }
            for layer, its in state.items()
        }
        self._rank = rank

    def backward(self, dy: Any) -> Any:
        """Return (dx, dgamma, dbeta) of the last forward."""
        gradients, dx = self._pullback(jnp.array(dy, self._type))
        named = {name: np.array(g).ravel() for its in gradients.values() for name, g in its.items()} if self._learned else {}
        return np.array(dx), named.get("scale"), named.get("offset")

    def moving(self) -> Any:
        """Return the averages."""
        if not self._rank:
            return tuple(each.copy() for each in self._given[1])
        found = {layer.split("/")[-1]: its["average"] for layer, its in self._state.items()}
        return np.array(found["mean_ema"]).ravel(), np.array(found["var_ema"]).ravel()


def _options(spec: Any) -> dict[str, Any]:
    if spec.momentum is None:
        raise NotImplementedError("haiku.BatchNorm has no average with equal weights")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError("haiku.BatchNorm has one switch: is_training normalises with the batch and updates")
    return {"eps": spec.eps, "decay_rate": spec.momentum, "create_scale": spec.scale, "create_offset": spec.center}


def make(num_features: int, spec: Any = None, device: str = "cpu") -> Haiku:
    """Make a subject; without a spec, it has gamma, beta and a decay rate of 0.9, for Haiku has no defaults of these."""
    return Haiku(num_features, spec)
