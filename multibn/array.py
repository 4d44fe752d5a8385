"""The NumPy layer: BatchNorm of arrays, computed by the kernel.

Importing it loads NumPy only; the first forward loads Numba.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from . import identity
from .layer.inputs import objection, plain
from .layer.nonfinite import PoisonedBatch, poisoned, poisoned_channels
from .layer.types import Array
from .spec.batchnorm import BatchNormSpec, spec_text
from .spec.parameters import check_features, check_rank


class BatchNorm:
    """BatchNorm layer for NumPy arrays, computed by the CPU kernel.

    The state is gamma (ones) and beta (zeros), or None if the spec has none, moving_mean (zeros) and moving_var (ones), each of
    shape (num_features,) and float32. For float64 input, assign float64 arrays to these attributes (BN-10). ``batches`` counts
    the updates, for momentum None.

    Args:
        num_features: channels C.
        num_dims: rank of the input, 2 to 5: 2 for (N, C), 4 for (N, C, H, W); None for any.
        spec: what the layer computes; ``BatchNormSpec()`` if None.
        init: "identity" sets gamma and beta so that the first training batch passes unchanged: ``multibn.identity``.

    Raises:
        ValueError: num_features < 1, num_dims not 2 to 5, or init="identity" without gamma, beta or batch statistics.
    """

    def __init__(
        self, num_features: int, num_dims: int | None, spec: BatchNormSpec | None = None, *, init: identity.Init = "standard"
    ) -> None:
        check_features(num_features)
        if num_dims is not None:
            check_rank(num_dims)
        self.num_features, self.num_dims, self.spec = num_features, num_dims, BatchNormSpec() if spec is None else spec
        identity.check_init(init, self.spec)
        self.init = init
        self.gamma = np.ones(num_features, np.float32) if self.spec.scale else None
        self.beta = np.zeros(num_features, np.float32) if self.spec.center else None
        self.moving_mean, self.moving_var = np.zeros(num_features, np.float32), np.ones(num_features, np.float32)
        self.batches = 0
        self._saved: Any = None
        self._left, self._told = 0, False

    def __repr__(self) -> str:
        init = "" if self.init == "standard" else f", init={self.init!r}"
        return f"BatchNorm({self.num_features}, {self.num_dims}, {spec_text(self.spec)}{init})"

    def forward(self, x: Array, training: bool) -> Array:
        """Return y for x of shape (N, C, ...); in training, update the moving statistics as the spec says.

        Raises:
            ValueError: wrong rank, shape or number of values (BN-01, BN-12).
            TypeError: wrong type (BN-10).
        """
        x = plain("x", x)
        state = {"gamma": self.gamma, "beta": self.beta, "moving_mean": self.moving_mean, "moving_var": self.moving_var}
        for name, array in state.items():
            if array is not None or name.startswith("moving"):
                plain(name, array)
        problem = objection(
            x.shape,
            x.dtype.name,
            num_features=self.num_features,
            ranks=None if self.num_dims is None else (self.num_dims,),
            needs_batch=self.spec.uses_batch(training),
            parameters={name: (a.shape, a.dtype.name) for name, a in state.items() if a is not None},
        )
        if problem is not None:
            raise (TypeError if problem.kind.endswith("type") else ValueError)(problem.message)
        if self.init == "identity" and training and x.size:
            self._begin(x)
        y = self._forward(x, training)
        self.batches += training and self.spec.update_statistics and x.size > 0
        if self._left:
            self._tell(x)
        return y

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """Return (dx, dgamma, dbeta) of the last forward; None for a parameter that is absent or not learned.

        Raises:
            ValueError: there was no forward, or dy is not of its output's shape and type.
            TypeError: dy is not a NumPy array, or is masked.
        """
        if self._saved is None:
            raise ValueError("backward needs a forward before it, and there was none. Call forward(x, training) first.")
        dx, dgamma, dbeta = self._backward(plain("dy", dy))
        learned = self.spec.learn_affine
        return dx, dgamma if learned and self.spec.scale else None, dbeta if learned and self.spec.center else None

    def _tell(self, x: Array) -> None:
        """Warn once, with ``PoisonedBatch``, if x contains NaN or Inf (BN-11)."""
        channels = [] if self._told else poisoned_channels(x)
        if channels:  # otherwise a moving statistic overflowed its type
            self._told = True
            warnings.warn(poisoned(f"BatchNorm({self.num_features})", channels), PoisonedBatch, stacklevel=3)

    def _begin(self, x: Array) -> None:
        if self.gamma is None or self.beta is None:
            return
        if identity.untouched(self.gamma, self.beta, self.moving_mean, self.moving_var):
            self.gamma, self.beta = identity.parameters(x, self.spec.eps, self.gamma.dtype)

    def _forward(self, x: Array, training: bool) -> Array:
        from . import kernel

        state = self.gamma, self.beta, self.moving_mean, self.moving_var
        y, saved = kernel.forward(x, *state, self.spec, training, batches=self.batches)
        self._saved, self._left = (saved, x.shape, x.dtype), saved.left
        return y

    def _backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        from . import kernel

        saved, shape, dtype = self._saved
        if dy.shape != shape or dy.dtype != dtype:
            raise ValueError(
                f"dy must have the input's shape {shape} and type {dtype}, got shape {dy.shape} and type {dy.dtype}. "
                "Give the gradient of this forward's output."
            )
        return kernel.backward(dy, saved)
