"""BatchNorm of JAX arrays, as a pure function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from multibn.layer.inputs import objection
from multibn.layer.types import PARAMETER_TYPE, three_axes

from . import formulas, handler, primitives
from .compat import equally_varying
from .formulas import How, parameter_type

IMPLEMENTATIONS = ("kernel", "framework")


def batch_norm(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, batches: Any, how: How) -> tuple[Any, Any, Any]:
    """Normalise x, and update the moving statistics: (y, mean, var), all new arrays.

    Works under every transformation of JAX. On CPU the bits are those of the other frameworks' layers (BN-15). Differentiable any
    number of times with respect to x, gamma and beta, and to mean and var where they normalise. The returned mean and var are
    constants to differentiation, as moving statistics are everywhere.

    Args:
        x: (..., C, ...) of rank >= 2, float16, bfloat16, float32 or float64, channels on ``how.channel_axis``.
        gamma, beta: (C,), float64 for float64 input, else float32; None for ones and zeros.
        mean, var: (C,), the moving statistics, of the same type.
        batches: how many batches they have taken in, for ``how.old`` None; an integer, or an array of one.
        how: what to compute; ``How.of(spec, training)`` makes one.

    Raises:
        ValueError: wrong rank, shape or number of values (BN-01, BN-12), or an unknown implementation.
        TypeError: wrong type (BN-10).
    """
    if how.implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be {' or '.join(IMPLEMENTATIONS)}, got {how.implementation!r}.")
    x, mean, var = (jnp.asarray(a) for a in (x, mean, var))
    kind = parameter_type(x) if x.dtype.name in PARAMETER_TYPE else mean.dtype
    gamma = jnp.ones(mean.shape, kind) if gamma is None else jnp.asarray(gamma)
    beta = jnp.zeros(mean.shape, kind) if beta is None else jnp.asarray(beta)
    uses_batch = how.use_batch or how.update
    symbolic = not all(isinstance(n, int) for n in x.shape)
    problem = objection(
        x.shape,
        x.dtype.name,
        num_features=mean.size,
        channel_axis=how.channel_axis,
        needs_batch=uses_batch and not symbolic,
        parameters={
            name: (a.shape, a.dtype.name)
            for name, a in (("gamma", gamma), ("beta", beta), ("moving_mean", mean), ("moving_var", var))
        },
    )
    if problem is not None:
        raise (TypeError if problem.kind.endswith("type") else ValueError)(problem.message)
    n, channels, s = three_axes(x.shape, how.channel_axis)
    if symbolic and uses_batch and not n * s >= 2:  # JAX raises where a symbolic shape leaves it open, with what to do
        raise ValueError(f"Expected more than 1 value per channel when training, got input of shape {x.shape} (BN-12).")
    if x.size == 0:  # BN-12
        return x, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)
    given = equally_varying([x.reshape(n, channels, s), gamma, beta, mean, var, jnp.asarray(batches, jnp.int32)])
    compute: Callable[..., Any] = formulas.forward if how.implementation == "framework" else primitives.bind
    y, mean, var = compute(*given, how=how)
    return y.reshape(x.shape), mean, var


EXPORT_CHECKS = tuple(jax.export.DisabledSafetyCheck.custom_call(name) for name in (handler.FORWARD, handler.BACKWARD))
"""``disabled_checks`` of ``jax.export.export``, which let a program call the kernel; what runs it must import multibn_jax."""
