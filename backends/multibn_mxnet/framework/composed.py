"""BatchNorm composed of operators that MXNet can differentiate twice, for gradients of gradients, on x's device.

In MXNet 1.9.1, few operators have a differentiable gradient: multiply, subtract, sum, reshape, cast and where do not. Here
``batch_dot`` computes sums and products, with ones to broadcast a value, ``gather_nd`` changes shapes, and copies change types.
Computations that need no gradient run outside the autograd record, by any operator.
"""

from __future__ import annotations

import math
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.base import MXNetError

from multibn.layer.types import PARAMETER_TYPE
from multibn_mxnet.description import Description, type_name

from . import operators as by_framework

RANKS = 6
"""Largest rank that MXNet can transpose."""


def normalize(layer: Description, x: Any, arrays: list[Any]) -> Any:
    """Normalise a valid, non-empty input; return y.

    Args:
        x: an NDArray.
        arrays: the layer's parameters and states, NDArrays in the layer's order.

    Raises:
        MXNetError: x has more axes than MXNet can transpose.
    """
    if x.ndim > RANKS:
        raise MXNetError(
            f"implementation='composed' takes input of rank 2 to {RANKS}, got rank {x.ndim}, shape {x.shape}: MXNet transposes "
            "no more axes. Reshape the input, or use implementation='auto'."
        )
    spec, training, kind = layer.spec, autograd.is_training(), PARAMETER_TYPE[type_name(x)]
    parameters, states = dict(zip(layer.parameters, arrays, strict=False)), arrays[len(layer.parameters) :]
    values = _channel_rows(_cast(x, kind), layer.axis)
    ones = mx.nd.ones(values.shape, values.context, dtype=kind)
    if spec.uses_batch(training):
        deviations, mean, var = _statistics(values, ones)
    with autograd.pause():
        moving_mean, moving_var = (state.copy() for state in states[:2])  # copies from before the update (BN-09)
        if spec.uses_batch(training) and spec.update_statistics:
            by_framework.update(layer, states, mean, var, values.shape[1])
        if layer.init == "identity" and training:
            by_framework.begin(parameters, moving_mean, moving_var, mean, var, spec.eps)
    if training and spec.normalize_with == "batch":
        y, scale = _normalized(deviations, var, spec.eps)
    else:
        y, scale = _minus(values, _column(moving_mean), ones), _invstd(moving_var, spec.eps)
    if "gamma" in parameters and spec.scale:
        scale = mx.nd.batch_dot(scale, _per_channel(parameters["gamma"]))
    y = mx.nd.batch_dot(y, scale)
    if "beta" in parameters and spec.center:
        y = mx.nd.elemwise_add(y, mx.nd.batch_dot(ones, _per_channel(parameters["beta"])))
    return _cast(_as_given(y, x.shape, layer.axis), x.dtype)


def _statistics(values: Any, ones: Any) -> tuple[Any, Any, Any]:
    """Return the deviations of values (C, m, 1) from their mean, and mean and variance, (C,), without gradients."""
    mean = _average(ones, values)
    with autograd.pause():  # the rounding error of the sum is a constant for the gradient
        missed = _average(ones, _minus(values, mean, ones))
    mean = mx.nd.elemwise_add(mean, missed)
    deviations = _minus(values, mean, ones)
    with autograd.pause():
        return deviations, mean.reshape(-1), _average(deviations, deviations).reshape(-1)


def _normalized(deviations: Any, var: Any, eps: float) -> tuple[Any, Any]:
    """Return two factors of xhat, (C, m, 1) and (C, 1, 1).

    The first is xhat without a gradient through the variance; the second is 1 up to rounding, and carries that gradient. MXNet's
    gradient of rsqrt would leave the range of the type for some variances inside the range.
    """
    with autograd.pause():
        invstd, rest = _invstd(var, eps), _column(eps / (var + eps))
    nearly = mx.nd.batch_dot(deviations, invstd)
    return nearly, mx.nd.rsqrt(mx.nd.elemwise_add(_average(nearly, nearly), rest))


def _invstd(var: Any, eps: float) -> Any:
    """Return 1/sqrt(var+eps), (C, 1, 1); NaN for an infinite variance too (BN-11)."""
    return _column(mx.nd.rsqrt(var + var * 0 + eps))


def _average(a: Any, b: Any) -> Any:
    """Return the mean over m of the products of a and b, (C, m, 1), as (C, 1, 1)."""
    part = mx.nd.full((a.shape[0], 1, 1), 1 / a.shape[1], a.context, dtype=a.dtype)
    return mx.nd.batch_dot(mx.nd.batch_dot(a, b, transpose_a=True), part)


def _minus(values: Any, mean: Any, ones: Any) -> Any:
    return mx.nd.elemwise_add(values, mx.nd.batch_dot(-ones, mean))


def _column(per_channel: Any) -> Any:
    """Reshape (C,) to (C, 1, 1), without gradients."""
    return per_channel.reshape((-1, 1, 1))


def _per_channel(parameter: Any) -> Any:
    """Reshape a parameter (C,) to (C, 1, 1), with gradients."""
    return mx.nd.gather_nd(parameter, _index(np.arange(parameter.shape[0]).reshape(1, -1, 1, 1), parameter))


def _channel_rows(x: Any, axis: int) -> Any:
    """Transpose and reshape x to (C, m, 1)."""
    others = _others(x.ndim, axis)
    rows = np.indices([x.shape[i] for i in others]).reshape(len(others), 1, -1)
    last = mx.nd.transpose(x, (*others, axis % x.ndim))
    return mx.nd.transpose(mx.nd.gather_nd(last, _index(rows, x)), (2, 1, 0))


def _as_given(values: Any, shape: tuple[int, ...], axis: int) -> Any:
    """Transpose and reshape (C, m, 1) to a shape with the channels on an axis."""
    others = _others(len(shape), axis)
    inner = [shape[i] for i in others]
    rows = np.arange(math.prod(inner)).reshape(1, *inner)
    last = mx.nd.gather_nd(mx.nd.transpose(values, (2, 1, 0)), _index(np.concatenate([0 * rows, rows]), values))
    return mx.nd.transpose(last, np.argsort([*others, axis % len(shape)]).tolist())


def _others(rank: int, axis: int) -> list[int]:
    return [i for i in range(rank) if i != axis % rank]


def _index(places: Any, like: Any) -> Any:
    return mx.nd.array(places, like.context, dtype="int64")


def _cast(array: Any, kind: Any) -> Any:
    if np.dtype(kind) == np.dtype(array.dtype):
        return array
    # The gradient of copyto overwrites its target even where it should add; the gradient of identity adds.
    return mx.nd.identity(array).copyto(mx.nd.empty(array.shape, array.context, dtype=kind))
