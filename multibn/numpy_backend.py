"""The NumPy backend: the subjects ``reference`` and ``kernel`` of the conformance suite."""

from __future__ import annotations

import warnings

import numpy as np

from . import reference
from .array import BatchNorm
from .backend import Backend
from .layer.nonfinite import PoisonedBatch
from .layer.types import Array
from .spec.batchnorm import BatchNormSpec
from .whitening.layer import ReferenceWhitening, Whitening
from .whitening.spec import WhiteningSpec


class KernelSubject(BatchNorm):
    """``BatchNorm`` as the conformance suite sees it, for input of any rank."""

    def __init__(self, num_features: int, spec: BatchNormSpec | None = None) -> None:
        super().__init__(num_features, None, spec)

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        """Set copies of the arrays as the state."""
        self.gamma = gamma.copy() if gamma is not None and self.spec.scale else None
        self.beta = beta.copy() if beta is not None and self.spec.center else None
        if moving_mean is not None and moving_var is not None:
            self.moving_mean, self.moving_var = moving_mean.copy(), moving_var.copy()
        self.batches = 0

    def forward(self, x: Array, training: bool) -> Array:
        """Like ``BatchNorm.forward``, without the warning: some cases contain NaN on purpose."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoisonedBatch)
            return super().forward(x, training)

    def moving(self) -> tuple[Array, Array]:
        """Return copies of the moving statistics."""
        return self.moving_mean.copy(), self.moving_var.copy()


class ReferenceSubject(KernelSubject):
    """Like ``KernelSubject``, computed by ``multibn.reference``."""

    def _forward(self, x: Array, training: bool) -> Array:
        state = self.gamma, self.beta, self.moving_mean, self.moving_var
        done = reference.forward(x, *state, self.spec, training, batches=self.batches)
        self.moving_mean, self.moving_var, self._saved = done.moving_mean, done.moving_var, done.saved
        return done.y

    def _backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        return reference.backward(dy, self._saved)


class WhiteningSubject(Whitening):
    """``Whitening`` as the conformance suite sees it, for input of any rank."""

    def __init__(self, num_features: int, spec: WhiteningSpec) -> None:
        super().__init__(num_features, 2, spec=spec)
        self.num_dims = None

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_covariance: Array | None) -> None:
        """Set copies of the arrays as the state."""
        self.gamma, self.beta = (None if a is None else a.copy() for a in (gamma, beta))
        if moving_mean is not None and moving_covariance is not None:
            self.moving_mean, self.moving_covariance = moving_mean.copy(), moving_covariance.copy()
        self.batches = 0

    def moving(self) -> tuple[Array, Array]:
        """Return copies of the moving statistics."""
        return self.moving_mean.copy(), self.moving_covariance.copy()


class ReferenceWhiteningSubject(WhiteningSubject, ReferenceWhitening):
    """``ReferenceWhitening`` as the conformance suite sees it."""


def _make(num_features: int, spec: BatchNormSpec | None, device: str, implementation: str) -> KernelSubject:
    return {"reference": ReferenceSubject, "kernel": KernelSubject}[implementation](num_features, spec)


def _make_whitening(num_features: int, spec: WhiteningSpec, device: str, implementation: str) -> WhiteningSubject:
    return {"reference": ReferenceWhiteningSubject, "kernel": WhiteningSubject}[implementation](num_features, spec)


def _devices() -> tuple[str, ...]:
    return ("cpu",)


BACKEND = Backend(
    name="numpy",
    versions={"numpy": np.__version__},
    implementations={"reference": "exact", "kernel": "exact"},
    devices=_devices,
    make=_make,
    whitening=_make_whitening,
    title="NumPy",
)
"""The backend ``numpy``."""
