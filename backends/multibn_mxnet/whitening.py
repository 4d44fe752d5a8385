"""Whitening as a Gluon block, and the Custom operator ``multibn_whitening`` beneath it: imperative, hybridized, and exported.

The operator gives y and what backward needs, ``saved``, float64 (groups, d, d+3): the factors of ``decompose``, the mean
that was taken away, and whether gradients flow through both. It always takes gamma and beta: MXNet 1.9.1 cannot infer the
storage of an operator with more outputs or states than it has inputs. The moving statistics change in forward (WH-05).
"""

from __future__ import annotations

import json
import math
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.base import MXNetError

from multibn import whitening_kernel as kernel
from multibn.layer import PARAMETER_TYPE
from multibn.whitening import Kind, WhiteningSpec
from multibn.whitening_layer import layer_text, problem, resolved
from multibn.whitening_matrix import adjoint, decompose, matrix

from .block import check_implementation
from .by_kernel import view
from .description import type_name

NAME = "multibn_whitening"
_AFFINE = ("gamma", "beta")
_STATES = ("running_mean", "running_covariance", "num_batches_tracked")


class Whitening(gluon.HybridBlock):  # type: ignore[misc]
    """Whitens the channels of a batch: mean 0, variance 1, no correlation (WH-01 to WH-10).

    Args:
        num_features: C, the size of the channel axis.
        num_dims: rank of the input: 2 for fully connected layers (N, C), 4 for convolutions (N, C, H, W); 3 and 5 too.
        kind: "zca", "pca" or "newton"; None for the spec's.
        groups: groups of channels that are whitened each on its own; None for the spec's.
        spec: what it computes.
        implementation: "kernel" (the CPU kernel), "framework" (the passes over the data by MXNet's own operators, any device, in
            the input's type), or "auto": the kernel on CPU, the operators elsewhere.
        prefix, params: Gluon's.

    Parameters, under Gluon's names: gamma (ones), beta (zeros), running_mean (C,), zeros, running_covariance (groups, d, d),
    identities, and num_batches_tracked (0) where momentum is None. ``moving_mean`` and ``moving_covariance`` are the article's
    names for the same Parameters.

    Raises:
        ValueError, TypeError: an argument that is not allowed (WH-01, WH-03).
    """

    def __init__(
        self,
        num_features: int,
        num_dims: int,
        kind: Kind | None = None,
        groups: int | None = None,
        spec: WhiteningSpec | None = None,
        *,
        implementation: str = "auto",
        prefix: str | None = None,
        params: Any = None,
    ) -> None:
        self._spec = spec = resolved(num_features, num_dims, kind, groups, spec)
        check_implementation(implementation, ("auto", "kernel", "framework"))
        super().__init__(prefix=prefix, params=params)
        self.num_features, self.num_dims, self.implementation = num_features, num_dims, implementation
        d = spec.group_size(num_features)
        identities = mx.init.Constant(mx.nd.array(np.tile(np.eye(d), (spec.groups, 1, 1))))
        one_each, square = (num_features,), (spec.groups, d, d)
        for name, here, shape, init, request in (
            ("gamma", spec.scale, one_each, "ones", "write"),
            ("beta", spec.center, one_each, "zeros", "write"),
            ("running_mean", True, one_each, "zeros", "null"),
            ("running_covariance", True, square, identities, "null"),
            ("num_batches_tracked", spec.momentum is None, (1,), "zeros", "null"),
        ):
            if here:
                dtype = "int64" if name == "num_batches_tracked" else "float32"
                its = {"shape": shape, "init": init, "dtype": dtype, "differentiable": request == "write"}
                setattr(self, name, self.params.get(name, grad_req=request, **its))
        self._attributes = {"spec": json.dumps(spec.to_dict()), "implementation": implementation}

    @property
    def spec(self) -> WhiteningSpec:
        """What the block computes."""
        return self._spec

    @property
    def moving_mean(self) -> Any:
        """The Parameter of the moving mean, ``running_mean`` to Gluon."""
        return self.running_mean

    @property
    def moving_covariance(self) -> Any:
        """The Parameter of the moving covariance, ``running_covariance`` to Gluon."""
        return self.running_covariance

    def forward(self, x: Any) -> Any:
        """y for x of shape (N, C, ...); in training, as ``autograd.is_training()`` tells, the moving statistics are updated.

        Raises:
            MXNetError: wrong rank, number of channels, types, or number of values (WH-01, WH-08, WH-09).
        """
        if isinstance(x, mx.nd.NDArray):
            its = {
                name: (parameter.shape, np.dtype(parameter.dtype).name)
                for name, parameter in self._reg_params.items()
                if name in ("gamma", "beta", "running_mean")
            }
            wrong = problem(x.shape, type_name(x), self.num_features, self.num_dims, autograd.is_training(), its)
            if wrong is not None:
                raise MXNetError(wrong.message)
        return super().forward(x)

    def hybrid_forward(self, F: Any, x: Any, **parameters: Any) -> Any:
        """The same as a part of a graph."""
        mean = parameters["running_mean"]
        its = {"gamma": F.ones_like(mean), "beta": F.zeros_like(mean), **parameters}
        arrays = [its[name] for name in (*_AFFINE, *_STATES[: 3 if self._spec.momentum is None else 2])]
        is_np = mx.util.is_np_array()
        if is_np:  # there is no npx.Custom
            x, arrays = x.as_nd_ndarray(), [array.as_nd_ndarray() for array in arrays]
        y = F.Custom(x, *arrays, op_type=NAME, **self._attributes)[0]
        return y.as_np_ndarray() if is_np else y

    def cast(self, dtype: Any) -> None:
        """Cast parameters and statistics; they stay float32 when the net becomes float16 (WH-09)."""
        self._clear_cached_op()
        for name, parameter in self._reg_params.items():
            if name != "num_batches_tracked":
                parameter.cast("float32" if np.dtype(dtype).name == "float16" else dtype)

    def __repr__(self) -> str:
        return f"Whitening({layer_text(self.num_features, self.num_dims, self._spec)})"


@mx.operator.register(NAME)
class _Description(mx.operator.CustomOpProp):  # type: ignore[misc]
    def __init__(self, spec: str, implementation: str) -> None:
        super().__init__(need_top_grad=True)
        self._spec, self._implementation = WhiteningSpec.from_dict(json.loads(spec)), implementation

    def list_arguments(self) -> list[str]:
        return ["data", *_AFFINE]

    def list_outputs(self) -> list[str]:
        return ["output", "saved"]

    def list_auxiliary_states(self) -> list[str]:
        return list(_STATES[: 3 if self._spec.momentum is None else 2])

    def infer_shape(self, shapes: Any) -> Any:
        c, groups = shapes[0][1], self._spec.groups
        d = c // groups
        states = [[c], [groups, d, d], [1]][: len(self.list_auxiliary_states())]
        return [shapes[0]] + [[c]] * (len(shapes) - 1), [shapes[0], [groups, d, d + 3]], states

    def infer_type(self, types: Any) -> Any:
        kind = np.dtype(PARAMETER_TYPE[np.dtype(types[0]).name]).type  # MXNet knows classes, not dtypes
        states = [kind, kind, np.int64][: len(self.list_auxiliary_states())]
        return [types[0]] + [kind] * (len(types) - 1), [types[0], np.float64], states

    def create_operator(self, context: str, shapes: Any, types: Any) -> Any:
        on_cpu = str(context).startswith("cpu") if self._implementation == "auto" else self._implementation == "kernel"
        return (_ByKernel if on_cpu else _ByFramework)(self._spec)


class _Operator(mx.operator.CustomOp):  # type: ignore[misc]
    """The operator as MXNet calls it. A subclass has ``run`` and ``back``, which write y and dx themselves where asked to."""

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
    """By the CPU kernel, without copying."""

    def run(
        self, x: Any, gamma: Any, beta: Any, mean: Any, covariance: Any, training: bool, batches: int, target: Any
    ) -> tuple[Any, ...]:
        out = None if target is None else _rows(target)
        its_gamma, its_beta, its_mean, its_covariance = (view(a, a.shape) for a in (gamma, beta, mean, covariance))
        y, saved = kernel.forward(_rows(x), its_gamma, its_beta, its_mean, its_covariance, self.spec, training, batches, out)
        return (y.reshape(x.shape) if out is None else None), _packed(saved)

    def back(self, dy: Any, x: Any, gamma: Any, saved: kernel.Saved, target: Any) -> tuple[Any, ...]:
        out = None if target is None else _rows(target)
        dx, dgamma, dbeta = kernel.backward(_rows(dy), _rows(x), view(gamma, gamma.shape), saved, self.spec, out)
        return (dx.reshape(x.shape) if out is None else None), dgamma, dbeta


class _ByFramework(_Operator):
    """The passes over the data by MXNet's operators, on x's device; the (d, d) matrices by ``multibn.whitening_matrix``."""

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
        """(N, C, ...) as (groups, d, m), in the type of the statistics."""
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


def _rows(array: Any) -> Any:
    """A CPU NDArray as (N, C, S) in NumPy, without a copy."""
    n, c, *rest = array.shape
    rows = view(array, (n, c, math.prod(rest)))
    return rows.view(np.float16) if rows.dtype == np.int16 else rows


def _double(array: Any) -> Any:
    return array.asnumpy().astype(np.float64)


def _as_input(values: Any, x: Any) -> Any:
    """(groups, d, m) as x's shape and type."""
    return values.reshape((x.shape[1], x.shape[0], *x.shape[2:])).swapaxes(0, 1).astype(x.dtype)
