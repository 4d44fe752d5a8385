"""What multibn_jax uses of JAX beyond its documented interface; ``tests`` name each thing, and what to do where it is missing."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir


def typed_like(aval: Any, shape: Any, dtype: Any) -> Any:
    """An abstract value of this shape and type; as the other, varying over the same axes of a ``shard_map``."""
    return aval.update(shape=tuple(shape), dtype=dtype, weak_type=False)


def equally_varying(arrays: list[Any]) -> list[Any]:
    """All varying over the axes of a ``shard_map`` that any of them varies over, as a primitive needs its arguments."""
    axes = [_varying(jax.typeof(a)) for a in arrays]
    every = frozenset().union(*axes)
    return [
        a if its == every else jax.lax.pcast(a, tuple(every - its), to="varying") for a, its in zip(arrays, axes, strict=True)
    ]


def _varying(aval: Any) -> frozenset[Any]:
    kind = getattr(aval, "manual_axis_type", None)  # jax 0.10; before it is the aval's own
    axes: frozenset[Any] = kind.varying if kind is not None else aval.vma
    return axes
