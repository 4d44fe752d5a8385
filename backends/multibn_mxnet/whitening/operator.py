"""Whitening as a Custom operator."""

from __future__ import annotations

import json
import math
from typing import Any

import mxnet as mx
import numpy as np

from multibn.layer.types import PARAMETER_TYPE
from multibn.whitening import kernel
from multibn.whitening.matrix import adjoint, decompose, matrix
from multibn.whitening.spec import WhiteningSpec
from multibn_mxnet.description import type_name
from multibn_mxnet.operator.by_kernel import view

NAME = "multibn_whitening"


AFFINE = ("gamma", "beta")


STATES = ("running_mean", "running_covariance", "num_batches_tracked")


@mx.operator.register(NAME)
class _Description(mx.operator.CustomOpProp):  # type: ignore[misc]
    def __init__(self, spec: str, implementation: str) -> None:
        super().__init__(need_top_grad=True)
        self._spec, self._implementation = WhiteningSpec.from_dict(json.loads(spec)), implementation

    def list_arguments(self) -> list[str]:
        return ["data", *AFFINE]

    def list_outputs(self) -> list[str]:
        return ["output", "saved"]

    def list_auxiliary_states(self) -> list[str]:
        return list(STATES[: 3 if self._spec.momentum is None else 2])

    def infer_shape(self, shapes: Any) -> Any:
        c, groups = shapes[0][1], self._spec.groups
        d = c // groups
        states = [[c], [groups, d, d], [1]][: len(self.list_auxiliary_states())]
        return [shapes[0]] + [[c]] * (len(shapes) - 1), [shapes[0], [groups, d, d + 3]], states

    def infer_type(self, types: Any) -> Any:
        kind = np.dtype(PARAMETER_TYPE[np.dtype(types[0]).name]).type  # MXNet expects classes, not dtypes
        states = [kind, kind, np.int64][: len(self.list_auxiliary_states())]
        return [types[0]] + [kind] * (len(types) - 1), [types[0], np.float64], states

    def create_operator(self, context: str, shapes: Any, types: Any) -> Any:
        on_cpu = str(context).startswith("cpu") if self._implementation == "auto" else self._implementation == "kernel"
        return (_ByKernel if on_cpu else _ByFramework)(self._spec)


class _Operator(mx.operator.CustomOp):  # type: ignore[misc]
    """Base class with the methods that MXNet calls. Subclasses define ``run`` and ``back``, which fill a given ``target``."""

    def __init__(self, spec: WhiteningSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, is_train: bool, req: Any, in_data: Any, out_data: Any, aux: Any) -> None:
        x, training = in_data[0], bool(is_train) and in_data[0].size > 0
        batches = int(aux[2].asscalar()) if len(aux) == 3 else 0
        if x.size == 0:
            return
        made = self.run(*in_data, aux[0], aux[1], training, batches, _target(out_data[0], req[0]))
        for out, request, value in zip(out_data, req, made, strict=True):
            if value is not None:
                self.assign(out, request, mx.nd.array(value, ctx=x.context, dtype=out.dtype))
        if training and len(aux) == 3:
            aux[2][:] = batches + 1

    def backward(self, req: Any, out_grad: Any, in_data: Any, out_data: Any, in_grad: Any, aux: Any) -> None:
        x, gamma, beta = in_data
        gradients = None, np.zeros(gamma.shape), np.zeros(beta.shape)
        if x.size:
            gradients = self.back(out_grad[0], x, gamma, _unpacked(out_data[1]), _target(in_grad[0], req[0]))
        for target, request, value in zip(in_grad, req, gradients, strict=True):
            if value is not None:
                self.assign(target, request, mx.nd.array(value, ctx=x.context, dtype=target.dtype))


class _ByKernel(_Operator):
    """The operator by the CPU kernel, without copies."""

    def run(
        self, x: Any, gamma: Any, beta: Any, mean: Any, covariance: Any, training: bool, batches: int, target: Any
    ) -> tuple[Any, ...]:
        out = None if target is None else _rows("y", target, x)
        states = {"gamma": gamma, "beta": beta, "running_mean": mean, "running_covariance": covariance}
        kind = PARAMETER_TYPE[type_name(x)]
        its_gamma, its_beta, its_mean, its_covariance = (view(name, a, kind, a.shape) for name, a in states.items())
        y, saved = kernel.forward(
            _rows("x", x, x), its_gamma, its_beta, its_mean, its_covariance, self.spec, training, batches, out
        )
        return (y.reshape(x.shape) if out is None else None), _packed(saved)

    def back(self, dy: Any, x: Any, gamma: Any, saved: kernel.Saved, target: Any) -> tuple[Any, ...]:
        out = None if target is None else _rows("the gradient of x", target, x)
        slopes, scale = _rows("the head gradient", dy, x), view("gamma", gamma, PARAMETER_TYPE[type_name(x)], gamma.shape)
        dx, dgamma, dbeta = kernel.backward(slopes, _rows("x", x, x), scale, saved, self.spec, out)
        return (dx.reshape(x.shape) if out is None else None), dgamma, dbeta


class _ByFramework(_Operator):
    """The operator by MXNet's operators on x's device, with the (d, d) matrices by ``multibn.whitening.matrix``."""

    def run(
        self, x: Any, gamma: Any, beta: Any, mean: Any, covariance: Any, training: bool, batches: int, target: Any
    ) -> tuple[Any, ...]:
        groups, d = covariance.shape[:2]
        values = self._values(x)
        its_mean, its_covariance = mean.reshape((groups, d)).copy(), covariance.copy()
        if training:
            its_mean = values.mean(axis=2)
            centred = mx.nd.broadcast_sub(values, its_mean.expand_dims(2))
            its_covariance = mx.nd.batch_dot(centred, centred, transpose_b=True) / values.shape[2]
            old = self.spec.weight_of_old(batches)
            moved = mean.asnumpy(), covariance.asnumpy()
            kernel.update(moved[0], moved[1], _double(its_mean), _double(its_covariance), old)
            mean[:], covariance[:] = moved
        factors = decompose(_double(its_covariance))
        w = mx.nd.array(matrix(factors, self.spec), ctx=x.context, dtype=values.dtype)
        y = mx.nd.batch_dot(w, mx.nd.broadcast_sub(values, its_mean.expand_dims(2)))
        y = mx.nd.broadcast_add(mx.nd.broadcast_mul(y, gamma.reshape((groups, d, 1))), beta.reshape((groups, d, 1)))
        return _as_input(y, x), _packed(kernel.Saved(_double(its_mean).reshape(-1), factors, training))

    def back(self, dy: Any, x: Any, gamma: Any, saved: kernel.Saved, target: Any) -> tuple[Any, ...]:
        groups, d = saved.factors.shape[:2]
        values, slopes, w = self._values(x), self._values(dy), matrix(saved.factors, self.spec)
        mean = mx.nd.array(saved.mean.reshape(groups, d, 1), ctx=x.context, dtype=values.dtype)
        centred = mx.nd.broadcast_sub(values, mean)
        products = _double(mx.nd.batch_dot(slopes, centred, transpose_b=True))
        scale = _double(gamma).reshape(groups, d, 1)

        def times(small: Any, large: Any) -> Any:
            return mx.nd.batch_dot(mx.nd.array(small, ctx=x.context, dtype=large.dtype), large)

        dx = times(np.swapaxes(scale * w, 1, 2), slopes)
        if saved.through_statistics:
            unit = float(np.finfo(np.dtype(values.dtype)).eps)
            dx = dx + times(adjoint(saved.factors, scale * products, self.spec, unit) * (2 / values.shape[2]), centred)
            dx = mx.nd.broadcast_sub(dx, dx.mean(axis=2, keepdims=True))
        return _as_input(dx, x), (products * w).sum(axis=2).reshape(-1), _double(slopes.sum(axis=2)).reshape(-1)

    def _values(self, x: Any) -> Any:
        """Reshape (N, C, ...) to (groups, d, m), in the type of the statistics."""
        groups, c = self.spec.groups, x.shape[1]
        return x.swapaxes(0, 1).reshape((groups, c // groups, -1)).astype(PARAMETER_TYPE[type_name(x)])


def _packed(saved: kernel.Saved) -> Any:
    groups, d = saved.factors.shape[:2]
    through = np.full((groups, d, 1), float(saved.through_statistics))
    return np.concatenate([saved.factors, saved.mean.reshape(groups, d, 1), through], axis=2)


def _unpacked(saved: Any) -> kernel.Saved:
    its = saved.asnumpy()
    return kernel.Saved(its[..., -2].reshape(-1), its[..., :-2], bool(its[0, 0, -1]))


def _target(array: Any, request: str) -> Any:
    return array if request in ("write", "inplace") else None


def _rows(name: str, array: Any, x: Any) -> Any:
    """Return a NumPy view (N, C, S) of a CPU NDArray of x's shape and type."""
    n, c, *rest = x.shape
    rows = view(name, array, type_name(x), (n, c, math.prod(rest)), x)
    return rows.view(np.float16) if rows.dtype == np.int16 else rows


def _double(array: Any) -> Any:
    return array.asnumpy().astype(np.float64)


def _as_input(values: Any, x: Any) -> Any:
    """Reshape (groups, d, m) to x's shape, in x's type."""
    return values.reshape((x.shape[1], x.shape[0], *x.shape[2:])).swapaxes(0, 1).astype(x.dtype)
