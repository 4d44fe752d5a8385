"""The operator by MXNet's own operators, in float32 arithmetic (float64 for float64 input), on x's device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mxnet as mx
import numpy as np

from multibn_mxnet.compat import ADD, NULL

if TYPE_CHECKING:
    from multibn_mxnet.description import Description


def forward(
    layer: Description,
    x: Any,
    parameters: dict[str, Any],
    states: list[Any],
    y: Any,
    saved: Any,
    wanted: list[int],
    training: bool,
) -> None:
    """Fill y and saved, and update the states. Arrays are NDArrays; wanted: MXNet's write requests for y and saved."""
    spec, shape = layer.spec, layer.by_channel(x.shape)
    m = shape[0] * shape[2]
    if m == 0:
        return
    values = _values(x, shape)
    mean, var = (state.copy() for state in states[:2])  # copies from before the update (BN-09)
    if spec.uses_batch(training):
        batch_mean = _sum(values) / m
        missed = _sum(values - _row(batch_mean)) / m
        batch_mean = batch_mean + missed
        deviations = values - _row(batch_mean)
        batch_var = _sum(deviations * deviations) / m
        if spec.update_statistics:
            update(layer, states, batch_mean, batch_var, m)
        if spec.normalize_with == "batch":
            if layer.init == "identity":
                begin(parameters, mean, var, batch_mean, batch_var, spec.eps)
            mean, var = batch_mean, batch_var
    through = mx.nd.full(mean.shape, training and spec.normalize_with == "batch", ctx=x.context, dtype=mean.dtype)
    invstd = mx.nd.where(_finite(var), 1 / mx.nd.sqrt(var + spec.eps), var * float("nan"))
    out = (values - _row(mean)) * _row(invstd)
    if "gamma" in parameters and spec.scale:
        out = out * _row(parameters["gamma"])
    if "beta" in parameters and spec.center:
        out = out + _row(parameters["beta"])
    _assign(y, wanted[0], out)
    _assign(saved, wanted[1], mx.nd.stack(mean, invstd, through))


def backward(
    layer: Description, dy: Any, x: Any, parameters: dict[str, Any], saved: Any, gradients: dict[str, Any], wanted: dict[str, int]
) -> None:
    """Fill the gradients, named "x", "gamma", "beta", each by MXNet's write request of the same name."""
    spec, shape = layer.spec, layer.by_channel(x.shape)
    m = shape[0] * shape[2]
    if m == 0:
        sums = {name: mx.nd.zeros_like(gradients[name]) for name in layer.parameters}
    else:
        values, slopes = _values(x, shape), _values(dy, shape)
        mean, invstd, through = saved.astype(values.dtype)
        xhat = (values - _row(mean)) * _row(invstd)
        sums = {"gamma": _sum(slopes * xhat), "beta": _sum(slopes)}
        flowing = slopes - _row(sums["beta"] / m) - xhat * _row(sums["gamma"] / m)
        scale = invstd * parameters["gamma"] if "gamma" in parameters and spec.scale else invstd
        # The device selects, because reading the flag here would wait for the device.
        dx = mx.nd.where(mx.nd.broadcast_like(_row(through), values), flowing, slopes) * _row(scale)
        _assign(gradients["x"], wanted["x"], dx)
    for name, counts in (("gamma", spec.scale), ("beta", spec.center)):
        if name in gradients:
            _assign(gradients[name], wanted[name], sums[name] if counts else mx.nd.zeros_like(gradients[name]))


def update(layer: Description, states: list[Any], batch_mean: Any, batch_var: Any, m: int) -> None:
    """Update the moving statistics after a training step with m values per channel (BN-05, BN-06, BN-11)."""
    mean, var = (state.copy() for state in states[:2])
    estimate = batch_var * (m / (m - 1)) if layer.spec.moving_variance == "unbiased" else batch_var
    old = _weight_of_old(layer, states, mean)
    new_mean, new_var = _moved(mean, batch_mean, old), _moved(var, estimate, old)
    finite = _finite(new_mean) * _finite(new_var)
    mx.nd.where(finite, new_mean, mean).copyto(states[0])
    mx.nd.where(finite, new_var, var).copyto(states[1])


def begin(parameters: dict[str, Any], mean: Any, var: Any, batch_mean: Any, batch_var: Any, eps: float) -> None:
    """``by_kernel._begin`` with the condition on the device, because reading it here would wait for the device."""
    gamma, beta = parameters["gamma"], parameters["beta"]
    untouched = ((gamma == 1) * (beta == 0) * (mean == 0) * (var == 1)).min()
    chosen = mx.nd.broadcast_like(untouched, gamma) * _finite(batch_mean) * _finite(batch_var)
    mx.nd.where(chosen, mx.nd.sqrt(batch_var + eps), gamma).copyto(gamma)
    mx.nd.where(chosen, batch_mean, beta).copyto(beta)


def _values(array: Any, shape: tuple[int, int, int]) -> Any:
    return array.reshape(shape).astype("float64" if np.dtype(array.dtype) == np.float64 else "float32")


def _row(per_channel: Any) -> Any:
    return per_channel.reshape((1, -1, 1))


def _sum(values: Any) -> Any:
    """Sum over space first, then over the batch: shorter sums round less."""
    return values.sum(axis=2).sum(axis=0)


def _finite(values: Any) -> Any:
    return values * 0 == 0


def _weight_of_old(layer: Description, states: list[Any], like: Any) -> Any:
    """Return the weight of the old moving statistics, (C,); count the batch if momentum is None (BN-05)."""
    momentum = layer.spec.momentum
    if momentum is not None:
        # MXNet cannot parse denormal numbers, so multiply two factors.
        scale = 2.0**-64 if 0 < momentum < np.finfo(np.float64).tiny else 1.0
        return mx.nd.full(like.shape, momentum / scale, ctx=like.context, dtype=like.dtype) * scale
    batches = states[2].astype(like.dtype)
    states[2] += 1
    return mx.nd.broadcast_like(batches / (batches + 1), like)


def _moved(moving: Any, batch: Any, old: Any) -> Any:
    """Return the updated moving statistic; a weight of 0 ignores the old value, even NaN (BN-05)."""
    return mx.nd.where(old == 0, batch, old * moving + (1 - old) * batch)


def _assign(target: Any, request: int, values: Any) -> None:
    values = values.reshape(target.shape).astype(target.dtype)
    if request == ADD:
        target += values
    elif request != NULL:
        values.copyto(target)
