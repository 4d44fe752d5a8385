"""BatchNorm by JAX's own operators, on any device, in the arithmetic of the parameters' type: ``implementation="framework"``.

The CPU kernel's derivatives of higher order come from here too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from multibn.layer.types import PARAMETER_TYPE
from multibn.spec.batchnorm import BatchNormSpec


class How(NamedTuple):
    """What a BatchNorm computes; hashable, so that ``jax.jit`` may take it as a static argument.

    Args:
        eps: added to the variance (BN-03).
        old: weight of the old moving statistics; None: batches/(batches+1), the equal-weight average (BN-05).
        unbiased: whether the moving variance takes in sum/(m-1) (BN-06).
        use_batch: normalise with the statistics of the batch, else with the moving ones.
        update: update the moving statistics.
        channel_axis: of x; may be negative.
        implementation: "kernel", which on an accelerator is computed as "framework" is; or "framework", JAX's operators.
    """

    eps: float
    old: float | None
    unbiased: bool
    use_batch: bool
    update: bool
    channel_axis: int = -1
    implementation: str = "kernel"

    @classmethod
    def of(cls, spec: BatchNormSpec, training: bool, channel_axis: int = -1, implementation: str = "kernel") -> How:
        """As a spec says, in training or in inference."""
        return cls(
            spec.eps,
            spec.momentum,
            spec.moving_variance == "unbiased",
            training and spec.normalize_with == "batch",
            training and spec.update_statistics,
            channel_axis,
            implementation,
        )


def parameter_type(x: Any) -> Any:
    """The type of gamma, beta and the statistics for input of x's type (BN-10)."""
    return jnp.dtype(PARAMETER_TYPE[x.dtype.name])


def normalised(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, how: How) -> Any:
    """y for x (..., N, C, S) and parameters (..., C)."""
    values = x.astype(gamma.dtype)
    if how.use_batch:
        mean, var = of_batch(values)
    eps = max(how.eps, float(jnp.finfo(gamma.dtype).tiny))  # a smaller eps is 0 in this type
    scale = jax.lax.rsqrt(var + eps)
    return ((values - _along(mean)) * _along(scale) * _along(gamma) + _along(beta)).astype(x.dtype)


def forward(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, batches: Any, how: How) -> tuple[Any, Any, Any]:
    """y, and what the moving statistics become; to differentiation the latter are constants."""
    y = normalised(x, gamma, beta, mean, var, how)
    mean, var = jax.lax.stop_gradient((mean, var))
    if not how.update:
        return y, mean, var
    m = x.shape[-3] * x.shape[-1]
    kind = mean.dtype
    batch_mean, batch_var = of_batch(jax.lax.stop_gradient(x).astype(kind))
    if how.unbiased:
        batch_var = batch_var * m / (m - 1)
    count = jnp.expand_dims(batches, -1).astype(kind)
    old = count / (count + 1) if how.old is None else kind.type(how.old)
    new = kind.type(1) / (count + 1) if how.old is None else kind.type(1 - how.old)
    moved = old * mean + new * batch_mean, old * var + new * batch_var
    finite = jnp.isfinite(moved[0]) & jnp.isfinite(moved[1])  # BN-11
    return y, jnp.where(finite, moved[0], mean), jnp.where(finite, moved[1], var)


def of_batch(values: Any) -> tuple[Any, Any]:
    """Mean and biased variance, (..., C), of (..., N, C, S): two passes, and the rounding of the first mean made good."""
    mean = values.mean((-3, -1))
    mean = mean + (values - _along(mean)).mean((-3, -1))
    return mean, jnp.square(values - _along(mean)).mean((-3, -1))


def gradients(dy: Any, x: Any, gamma: Any, beta: Any, mean: Any, var: Any, how: How) -> tuple[Any, Any, Any]:
    """dx, dgamma and dbeta."""
    _, pull = jax.vjp(lambda x, gamma, beta: normalised(x, gamma, beta, mean, var, how), x, gamma, beta)
    found: tuple[Any, Any, Any] = pull(dy)
    return found


def _along(a: Any) -> Any:
    """(..., C) beside (..., N, C, S)."""
    return a[..., None, :, None]
