"""Facts that the page shows of every backend: the article's example, and the identity initialisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np

from multibn import identity
from multibn.backend import Backend
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec

EXAMPLE: Final = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
"""The article's example; its first channel has the mean (0+1+2+3+12+13+14+15)/8 = 7.5."""


def of(backend: Backend, begins_as_identity: Callable[[Array], Array]) -> dict[str, Any]:
    """Return the facts of a backend on a CPU."""
    x = np.random.default_rng(0).normal(3, 2, (16, 4, 8, 8)).astype(np.float32)
    off = np.abs(begins_as_identity(x).astype(np.float64) - x)
    return {
        "title": backend.title,
        "versions": dict(backend.versions),
        "example": {name: example(backend, name) for name in backend.implementations},
        "identity": {"off": float(off.max()), "part": float((off / identity.bound(x, 1e-5)).max())},
    }


def example(backend: Backend, implementation: str) -> dict[str, list[float]]:
    """Return the batch means of the article's example, read as moving means with momentum 0, and its moving means with 0.9."""
    found = {}
    for name, momentum in (("batch", 0.0), ("moving", 0.9)):
        subject = backend.make(3, replace(BatchNormSpec.article(), momentum=momentum), "cpu", implementation)
        ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
        subject.load(ones, zeros, zeros, ones)
        subject.forward(EXAMPLE, True)
        found[name] = [float(value) for value in subject.moving()[0]]
    return found
