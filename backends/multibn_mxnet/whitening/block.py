"""Whitening as a Gluon block, by the Custom operator ``multibn_whitening``: imperative, hybridized, and exported.

Outputs of the operator are y and ``saved``, which backward needs: float64 (groups, d, d+3), the factors of ``decompose``, the
mean that was subtracted, and whether gradients flow through both. Gamma and beta are always inputs, because MXNet 1.9.1 cannot
infer the storage type of an operator with more outputs or states than inputs. The moving statistics change in forward (WH-05).
"""

from __future__ import annotations

import json
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.base import MXNetError

from multibn.whitening.arguments import layer_text, problem, resolved
from multibn.whitening.spec import Kind, WhiteningSpec
from multibn_mxnet.block import check_implementation, plain
from multibn_mxnet.description import type_name

from .operator import AFFINE, NAME, STATES


class Whitening(gluon.HybridBlock):  # type: ignore[misc]
    """Block that whitens the channels of a batch: mean 0, variance 1, no correlation (WH-01 to WH-10).

    Args:
        num_features: C, the size of the channel axis.
        num_dims: rank of the input, 2 to 5: 2 for fully connected layers (N, C), 4 for convolutions (N, C, H, W).
        kind: "zca", "pca" or "newton"; None for the spec's.
        groups: number of channel groups, each whitened separately; None for the spec's.
        spec: what the block computes.
        implementation: "kernel" (the CPU kernel), "framework" (the passes over the data by MXNet's own operators, any device, in
            the input's type), or "auto": the kernel on CPU, the operators elsewhere.
        prefix, params: as in Gluon.

    Parameters, under Gluon's names: gamma (ones), beta (zeros), running_mean (C,), zeros, running_covariance (groups, d, d),
    identities, and num_batches_tracked (0) if momentum is None. ``moving_mean`` and ``moving_covariance`` are the article's
    names for the same Parameters.

    Raises:
        ValueError, TypeError: an invalid argument (WH-01, WH-03).
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
        """The specification of the block."""
        return self._spec

    @property
    def moving_mean(self) -> Any:
        """The Parameter of the moving mean, Gluon's ``running_mean``."""
        return self.running_mean

    @property
    def moving_covariance(self) -> Any:
        """The Parameter of the moving covariance, Gluon's ``running_covariance``."""
        return self.running_covariance

    def forward(self, x: Any) -> Any:
        """Whiten x (N, C, ...); in training (``autograd.is_training()``), also update the moving statistics.

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
        """Whiten as part of a graph."""
        mean = parameters["running_mean"]
        its = {"gamma": F.ones_like(mean), "beta": F.zeros_like(mean), **parameters}
        arrays = [its[name] for name in (*AFFINE, *STATES[: 3 if self._spec.momentum is None else 2])]
        is_np = mx.util.is_np_array()
        if is_np:  # there is no npx.Custom
            x, arrays = x.as_nd_ndarray(), [array.as_nd_ndarray() for array in arrays]
        # oneDNN arrays have a layout of their own: see ``Normalization._normalize``. These operators return plain arrays.
        if F is mx.nd:
            y = F.Custom(plain(x), *arrays, op_type=NAME, **self._attributes)[0]
            y = y.reshape(y.shape)
        else:
            x = F.squeeze(F.expand_dims(x, axis=0), axis=0)
            y = F.Custom(x, *arrays, op_type=NAME, **self._attributes)[0]
            y = F.squeeze(F.expand_dims(y, axis=0), axis=0)
        return y.as_np_ndarray() if is_np else y

    def cast(self, dtype: Any) -> None:
        """Cast parameters and statistics; a cast to float16 leaves both in float32 (WH-09)."""
        self._clear_cached_op()
        for name, parameter in self._reg_params.items():
            if name != "num_batches_tracked":
                parameter.cast("float32" if np.dtype(dtype).name == "float16" else dtype)

    def __repr__(self) -> str:
        return f"Whitening({layer_text(self.num_features, self.num_dims, self._spec)})"
