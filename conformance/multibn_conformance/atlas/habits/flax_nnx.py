"""Flax's habits, linen and nnx."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from .gradient import of_large_values

X = jnp.asarray(np.random.default_rng(0).normal(3, 2, (6, 4, 5, 3)), jnp.float32)


def _start(**options: Any) -> Any:
    layer = linen.BatchNorm(**options)
    return layer, layer.init(jax.random.PRNGKey(0), X)


def defaults() -> object:
    """Defaults, in its own words."""
    return _defaults(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


def defaults_linen() -> object:
    """linen: the same."""
    return _defaults(linen.BatchNorm())


def _defaults(layer: Any) -> str:
    switches = ", ".join(f"{name} {getattr(layer, name)}" for name in ("use_bias", "use_scale", "use_running_average"))
    return f"epsilon {layer.epsilon:g}, momentum {layer.momentum:g}, axis {layer.axis}, {switches}"


def linen_init_updates() -> object:
    """linen: whether init updates."""
    return bool(jnp.abs(_start(use_running_average=False)[1]["batch_stats"]["mean"]).max() > 0)


def linen_estimator() -> object:
    """linen: the moving variance."""
    layer, state = _start(use_running_average=False, momentum=0.0)
    stored = layer.apply(state, X, mutable=["batch_stats"])[1]["batch_stats"]["var"]
    off = [float(jnp.abs(stored / X.var((0, 1, 2), ddof=ddof) - 1).max()) for ddof in (0, 1)]
    return "biased" if off[0] < off[1] else "unbiased"


def linen_without_mutable() -> object:
    """linen: a training forward in which batch_stats is not mutable."""
    layer, state = _start(use_running_average=False)
    layer.apply(state, X)
    return "accepted"


def linen_without_mode() -> object:
    """linen: use_running_average left at None."""
    _start()
    return "accepted"


def nnx_mode() -> object:
    """nnx: whether a new module updates in a forward; after eval()."""
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer(X)
    first = layer.mean[...]
    layer.eval()
    layer(X)
    return f"{'yes' if jnp.abs(first).max() > 0 else 'no'}; {'no' if (layer.mean[...] == first).all() else 'yes'}"


def _far(offset: float, fast: bool) -> float:
    x = np.random.default_rng(1).normal(offset, 1, (64, 4, 4, 3)).astype(np.float32)
    layer = nnx.BatchNorm(3, use_fast_variance=fast, rngs=nnx.Rngs(0))
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    return float(np.abs(np.array(layer(jnp.asarray(x))) - exact).max())


def fast_variance() -> object:
    """use_fast_variance=True, its default: largest error of the output for mean/std 1e2, 1e3, 1e4."""
    return ", ".join(f"{_far(offset, True):.2g}" for offset in (1e2, 1e3, 1e4))


def slow_variance() -> object:
    """use_fast_variance=False: the same."""
    return ", ".join(f"{_far(offset, False):.2g}" for offset in (1e2, 1e3, 1e4))


def gradient_of_large_values() -> object:
    """A spread of 2^40, 2^44, float32: the largest error of dx, as a part of the largest dx."""
    layer = linen.BatchNorm(use_running_average=False)

    def dx(x: Any, dy: Any) -> Any:
        state = layer.init(jax.random.PRNGKey(0), x)
        return np.array(jax.vjp(lambda x: layer.apply(state, x, mutable=["batch_stats"]), x, has_aux=True)[1](dy)[0])

    return of_large_values(dx, 1e-5, (40, 44))


def mask() -> object:
    """mask=: whether what it hides is left out of the statistics."""
    mask = jnp.arange(5)[None, None, :, None] < 2
    layer = nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    layer(X, mask=jnp.broadcast_to(mask, X.shape))
    return bool(jnp.abs(layer.mean[...] - X[:, :, :2].mean((0, 1, 2))).max() < 1e-5)


def axes() -> object:
    """The default axis; a tuple of axes."""
    nnx.BatchNorm(4, axis=(1,), rngs=nnx.Rngs(0))(X)
    return f"{linen.BatchNorm().axis}; accepted"


def rank_one() -> object:
    """Input of rank 1 in training."""
    nnx.BatchNorm(3, rngs=nnx.Rngs(0))(X[0, 0, 0])
    return "accepted"


def names() -> object:
    """linen: names in its state."""
    state = _start(use_running_average=False)[1]
    return ", ".join(f"{group}/{name}" for group in sorted(state) for name in sorted(state[group]))


def names_nnx() -> object:
    """nnx: names in its state, and their kinds."""
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    return ", ".join(f"{name} ({type(getattr(layer, name)).__name__})" for name in map(str, nnx.state(layer)))


def types() -> object:
    """dtype left at None, float16 and bfloat16 input: types of output, gamma and moving statistics."""
    return "; ".join(_types(X.astype(kind)) for kind in (jnp.float16, jnp.bfloat16))


def types_chosen() -> object:
    """dtype=float16 and bfloat16, float32 input: the same."""
    return "; ".join(_types(X, dtype=kind) for kind in (jnp.float16, jnp.bfloat16))


def _types(x: Any, **options: Any) -> str:
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    return f"{layer(x).dtype}, {layer.scale[...].dtype}, {layer.mean[...].dtype}"


def second_derivative() -> object:
    """Whether the second derivative is that of the formulas, by differences in float64."""
    jax.config.update("jax_enable_x64", True)
    x, layer = jnp.asarray(X[:2, 0, :2], jnp.float64), linen.BatchNorm(use_running_average=False, param_dtype=jnp.float64)
    state = layer.init(jax.random.PRNGKey(0), x)

    def loss(x: Any) -> Any:
        return (layer.apply(state, x, mutable=["batch_stats"])[0] ** 3 * jnp.arange(3)).sum()

    direction = jnp.ones_like(x).at[0].set(-2.0) * jnp.arange(3)
    _, got = jax.jvp(jax.grad(loss), (x,), (direction,))
    step = 1e-5
    near = (jax.grad(loss)(x + step * direction) - jax.grad(loss)(x - step * direction)) / (2 * step)
    return bool(jnp.abs(got - near).max() <= 1e-6 * jnp.abs(near).max())
