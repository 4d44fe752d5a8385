"""flax.nnx.BatchNorm as a subject, with JAX's 64-bit mode on. Needs NumPy, JAX and Flax only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

jax.config.update("jax_enable_x64", True)


class FlaxNNX:
    """A module, differentiated as a function of its parameters and its input."""

    def __init__(self, num_features: int, spec: Any, device: str) -> None:
        options = {} if spec is None else _options(spec)
        self._layer = nnx.BatchNorm(num_features, axis=1, rngs=nnx.Rngs(0), **options)
        self._learned = spec is None or spec.learn_affine
        self._with_batch = spec is None or spec.normalize_with == "batch"

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state."""
        for name, array in zip(("scale", "bias", "mean", "var"), (gamma, beta, moving_mean, moving_var), strict=True):
            if array is not None and getattr(self._layer, name) is not None:
                setattr(self._layer, name, type(getattr(self._layer, name))(jnp.array(array)))

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        kept = not (training and self._with_batch)
        graph, parameters, statistics = nnx.split(self._layer, nnx.Param, nnx.BatchStat)

        def run(parameters: Any, x: Any) -> Any:
            layer = nnx.merge(
                graph, parameters, jax.tree.map(jnp.asarray, statistics)
            )  # a new copy, since this trace may change them
            y = layer(x, use_running_average=kept)
            return y, nnx.state(layer, nnx.BatchStat)

        if np.issubdtype(x.dtype, np.floating):
            y, self._pullback, after = jax.vjp(run, parameters, jnp.array(x), has_aux=True)
        else:
            y, after = run(parameters, jnp.array(x))
        nnx.update(self._layer, after)
        self._type = y.dtype
        return np.array(y)

    def backward(self, dy: Any) -> Any:
        """Return (dx, dgamma, dbeta) of the last forward."""
        gradients, dx = self._pullback(jnp.array(dy, self._type))
        learned = {name: np.array(g[...]) for name, g in gradients.items()} if self._learned else {}
        return np.array(dx), learned.get("scale"), learned.get("bias")

    def moving(self) -> Any:
        """Return (mean, var)."""
        return np.array(self._layer.mean[...]), np.array(self._layer.var[...])


def _options(spec: Any) -> dict[str, Any]:
    if spec.momentum is None:
        raise NotImplementedError("flax.nnx.BatchNorm has no average with equal weights")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError(
            "flax.nnx.BatchNorm has one switch: use_running_average takes the moving statistics and keeps them"
        )
    return {"epsilon": spec.eps, "momentum": spec.momentum, "use_scale": spec.scale, "use_bias": spec.center}


def make(num_features: int, spec: Any = None, device: str = "cpu") -> FlaxNNX:
    """Make a subject; without a spec, it has Flax's own defaults, but for the channel axis, which is 1 here."""
    return FlaxNNX(num_features, spec, device)
