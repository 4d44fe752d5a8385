"""``flax.nnx.BatchNorm`` computed by multibn, and the article's block in Flax: one class."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from multibn.layer.inputs import objection
from multibn.layer.nonfinite import PoisonedBatch, poisoned, poisoned_channels
from multibn.layer.types import PARAMETER_TYPE
from multibn.spec.batchnorm import BatchNormSpec, spec_text
from multibn.spec.parameters import check_features, check_rank

from .compat import canonicalize_dtype
from .formulas import How
from .function import IMPLEMENTATIONS, batch_norm

_SPEC_SAYS = {"epsilon": "eps", "momentum": "momentum", "use_scale": "scale", "use_bias": "center"}
"""Flax's arguments that a spec has, by its names."""

_told: weakref.WeakSet[nnx.BatchNorm] = weakref.WeakSet()
"""Layers that have warned of a poisoned batch: an attribute would change what ``nnx.jit`` keeps programs for."""


class BatchNorm(nnx.BatchNorm):
    """A ``flax.nnx.BatchNorm``, with the arguments and the state of one; or, given ``num_dims`` or ``spec``, the article's block.

    State: ``mean`` (zeros) and ``var`` (ones), BatchStat; ``scale`` (ones) and ``bias`` (zeros), Param, or None; (num_features,)
    each. Like Flax's layer it normalises with the batch unless ``use_running_average``, which ``model.eval()`` sets. Momentum is
    the weight of the old value (BN-05). The moving variance is biased, unless the spec says otherwise (BN-06).

    With Flax's arguments y has the type that Flax gives it: ``dtype``, or else the common type of x, scale and bias. Several axes
    are refused, and ``mask`` and ``axis_name`` while the batch normalises. ``use_fast_variance`` changes nothing: the variance is
    exact. With a spec y has x's type, and the state's type must match it (BN-10).

    Args:
        num_features: channels C.
        num_dims: rank of the input, 2 to 5, such as 4 for (N, C, H, W): the channel axis is then 1. None: any rank, axis -1.
        spec: what it computes; None: what Flax's arguments say.
        implementation: "kernel", or "framework" for JAX's operators in place of the CPU kernel.
        arguments: Flax's, by their names: axis, momentum, epsilon, use_running_average, rngs and others.

    Raises:
        ValueError: a value that is not allowed, such as epsilon 0 (BN-03), or one that both the spec and an argument give.
    """

    num_dims: int | None = None
    spec: BatchNormSpec | None = None
    implementation: str = "kernel"

    def __init__(
        self,
        num_features: int,
        num_dims: int | None = None,
        *,
        spec: BatchNormSpec | None = None,
        implementation: str = "kernel",
        **arguments: Any,
    ) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be {' or '.join(IMPLEMENTATIONS)}, got {implementation!r}.")
        if num_dims is not None or spec is not None:
            twice = [name for name in (*_SPEC_SAYS, "dtype") if name in arguments]
            if twice:
                raise ValueError(f"{', '.join(twice)}: the spec says what this layer computes. Put it there, or leave it out.")
            check_features(num_features)
            if num_dims is not None:
                check_rank(num_dims)
            spec = BatchNormSpec() if spec is None else spec
            momentum = 0.0 if spec.momentum is None else spec.momentum
            arguments |= {"epsilon": spec.eps, "momentum": momentum, "use_scale": spec.scale, "use_bias": spec.center}
            arguments.setdefault("axis", -1 if num_dims is None else 1)
            arguments.setdefault("rngs", nnx.Rngs(0))
        super().__init__(num_features, **arguments)
        self.num_dims, self.spec, self.implementation = num_dims, spec, implementation
        if spec is not None and spec.momentum is None:
            self.batches = nnx.BatchStat(jnp.zeros((), jnp.int32))
        check_layer(self)

    def __repr__(self) -> str:
        if self.spec is None:
            return str(super().__repr__())
        return f"BatchNorm({self.num_features}, {self.num_dims}, {spec_text(self.spec)})"

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        """y for x; while the batch normalises, the moving statistics are updated.

        Raises:
            ValueError: wrong rank, shape or number of values (BN-01, BN-12); a mask, or axis_name, while the batch normalises.
            TypeError: wrong type (BN-10).
        """
        moving = self.use_running_average if use_running_average is None else use_running_average
        if moving is None:
            raise ValueError(
                "use_running_average was given neither to BatchNorm nor to this call. Give True for inference, False to train."
            )
        if not moving:
            _refuse(self.axis_name, mask)
        axis, spec = _one_axis(self.axis), spec_of(self)
        if self.spec is None:
            x = jnp.asarray(x, canonicalize_dtype(x, _value(self.scale), _value(self.bias), dtype=self.dtype))
        kind = jnp.dtype(PARAMETER_TYPE.get(x.dtype.name, "float32"))
        gamma, beta, mean, var = (_value(a) for a in (self.scale, self.bias, self.mean, self.var))
        if self.spec is None:
            gamma, beta, mean, var = (a if a is None else a.astype(kind) for a in (gamma, beta, mean, var))
        elif not spec.learn_affine:
            gamma, beta = jax.lax.stop_gradient((gamma, beta))
        if self.num_dims is not None and x.ndim != self.num_dims:
            problem = objection(x.shape, x.dtype.name, num_features=self.num_features, ranks=(self.num_dims,), channel_axis=axis)
            raise ValueError(problem.message if problem else "")
        how = How.of(spec, not moving, axis, self.implementation)
        batches = self.batches[...] if spec.momentum is None else 0
        y, mean, var = batch_norm(x, gamma, beta, mean, var, batches, how)
        if how.update and x.size:
            self.mean[...], self.var[...] = mean.astype(self.mean.dtype), var.astype(self.var.dtype)
            if spec.momentum is None:
                self.batches[...] = batches + 1
            self._tell(x, y, axis)
        return y

    def _tell(self, x: Any, y: Any, axis: int) -> None:
        """Warn with ``PoisonedBatch``, once per layer and outside of traced functions, if the batch is poisoned (BN-11)."""
        if isinstance(y, jax.core.Tracer) or self in _told:
            return
        if bool(jnp.isfinite(jnp.take(y, 0, axis=0)).all()):  # a poisoned channel is NaN all over
            return
        channels = poisoned_channels(np.asarray(x), axis)
        if channels:
            _told.add(self)
            warnings.warn(poisoned(f"BatchNorm({self.num_features})", channels), PoisonedBatch, stacklevel=3)


def check_layer(layer: nnx.BatchNorm) -> None:
    """Whether a layer has parameters that the specification allows.

    Raises:
        ValueError: it has not, or it normalises several axes.
    """
    spec_of(layer)
    _one_axis(layer.axis)


def spec_of(layer: nnx.BatchNorm) -> BatchNormSpec:
    """What a layer of ours or of Flax's computes, as a spec."""
    spec = getattr(layer, "spec", None)
    if spec is not None:
        return spec  # type: ignore[no-any-return]
    return BatchNormSpec(layer.epsilon, layer.momentum, "biased", layer.use_scale, layer.use_bias)


def _one_axis(axis: int | Sequence[int]) -> int:
    axes = [axis] if isinstance(axis, int) else list(axis)
    if len(axes) != 1:
        raise ValueError(f"axis must be one axis, the channels', got {axis!r} (BN-01). Reshape the input so that it is one.")
    return axes[0]


def _refuse(axis_name: object, mask: object) -> None:
    if mask is not None:
        raise ValueError(
            "mask is not supported while the batch normalises: all values of x count. Leave it out, pass only the values that "
            "count, or use flax.nnx.BatchNorm for this layer."
        )
    if axis_name is not None:
        raise ValueError(
            f"axis_name={axis_name!r} is not supported while the batch normalises: each device would need the others' "
            "statistics. Under jax.jit with a sharded batch leave it out, the statistics are the whole batch's there; or use "
            "flax.nnx.BatchNorm."
        )


def _value(variable: Any) -> Any:
    return None if variable is None else variable[...]
