"""BatchNorm of operators that MXNet differentiates twice, for gradients of gradients, on whatever device x is.

Few of MXNet 1.9.1's operators have a gradient with a gradient: multiply, subtract, sum, reshape, cast and where have none. Here
``batch_dot`` makes sums and products, with ones where a value is repeated, ``gather_nd`` changes shapes, and copies change types.
What needs no gradient is done beside the record, by any operator.
"""

from __future__ import annotations

import math
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.base import MXNetError

from multibn.layer import PARAMETER_TYPE

from . import by_framework
from .description import Layer, type_name

RANKS = 6
"""Axes that MXNet can transpose."""


def normalize(layer: Layer, x: Any, arrays: list[Any]) -> Any:
    """y of an input without objections, which has values.

    Args:
        x: an NDArray.
        arrays: the layer's parameters and states, in its order, NDArrays too.

    Raises:
        MXNetError: more axes than MXNet can transpose.
    """
    if x.ndim > RANKS:
        raise MXNetError(
            f"implementation='composed' takes input of rank 2 to {RANKS}, got rank {x.ndim}, shape {x.shape}: MXNet transposes "
            "no more axes. Reshape the input, or use implementation='auto'."
        )
    spec, training, kind = layer.spec, autograd.is_training(), PARAMETER_TYPE[type_name(x)]
    parameters, states = dict(zip(layer.parameters, arrays, strict=False)), arrays[len(layer.parameters) :]
    values = _by_channel(_cast(x, kind), layer.axis)
    ones = mx.nd.ones(values.shape, values.context, dtype=kind)
    with autograd.pause():
        mean, var = (state.copy().reshape((-1, 1, 1)) for state in states[:2])  # as they are before the update (BN-09)
    if spec.uses_batch(training):
        batch_mean, batch_var = _statistics(values, ones)
        with autograd.pause():
            its_mean, its_var = (statistic.reshape(-1) for statistic in (batch_mean, batch_var))
            if spec.update_statistics:
                by_framework.update(layer, states, its_mean, its_var, values.shape[1])
            if layer.init == "identity" and spec.normalize_with == "batch":
                by_framework.begin(parameters, mean.reshape(-1), var.reshape(-1), its_mean, its_var, spec.eps)
        if spec.normalize_with == "batch":
            mean, var = batch_mean, batch_var
    scale = mx.nd.rsqrt(_poisoned(var) + spec.eps)
    if "gamma" in parameters and spec.scale:
        scale = mx.nd.batch_dot(scale, _per_channel(parameters["gamma"]))
    y = mx.nd.batch_dot(_minus(values, mean, ones), scale)
    if "beta" in parameters and spec.center:
        y = mx.nd.elemwise_add(y, mx.nd.batch_dot(ones, _per_channel(parameters["beta"])))
    return _cast(_as_given(y, x.shape, layer.axis), x.dtype)


def _statistics(values: Any, ones: Any) -> tuple[Any, Any]:
    """Mean and variance, (C, 1, 1), of values (C, m, 1)."""
    part = mx.nd.full((values.shape[0], 1, 1), 1 / values.shape[1], values.context, dtype=values.dtype)
    mean = mx.nd.batch_dot(mx.nd.batch_dot(ones, values, transpose_a=True), part)
    with autograd.pause():  # what the sum's roundings missed does not depend on the values
        missed = mx.nd.batch_dot(mx.nd.batch_dot(ones, _minus(values, mean, ones), transpose_a=True), part)
    mean = mx.nd.elemwise_add(mean, missed)
    deviations = _minus(values, mean, ones)
    return mean, mx.nd.batch_dot(mx.nd.batch_dot(deviations, deviations, transpose_a=True), part)


def _minus(values: Any, mean: Any, ones: Any) -> Any:
    return mx.nd.elemwise_add(values, mx.nd.batch_dot(-ones, mean))


def _poisoned(var: Any) -> Any:
    """NaN where a variance is infinite too (BN-11)."""
    with autograd.pause():
        nothing = var * 0
    return mx.nd.elemwise_add(var, nothing)


def _per_channel(parameter: Any) -> Any:
    """(C,) as (C, 1, 1)."""
    return mx.nd.gather_nd(parameter, _index(np.arange(parameter.shape[0]).reshape(1, -1, 1, 1), parameter))


def _by_channel(x: Any, axis: int) -> Any:
    """x as (C, m, 1)."""
    others = _others(x.ndim, axis)
    rows = np.indices([x.shape[i] for i in others]).reshape(len(others), 1, -1)
    last = mx.nd.transpose(x, (*others, axis % x.ndim))
    return mx.nd.transpose(mx.nd.gather_nd(last, _index(rows, x)), (2, 1, 0))


def _as_given(values: Any, shape: tuple[int, ...], axis: int) -> Any:
    """(C, m, 1) in a shape with the channels on an axis."""
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
    # The gradient of copyto overwrites what it is to be added to; that of identity adds.
    return mx.nd.identity(array).copyto(mx.nd.empty(array.shape, array.context, dtype=kind))
