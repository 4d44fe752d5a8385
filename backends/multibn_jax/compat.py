"""What multibn_jax uses of JAX and Flax beyond what they document. A release that lacks a part is reported at import."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import flax
import jax

PARTS: Final = {
    "jax.extend.core:Primitive": "run the kernel under JAX's transformations",
    "jax.interpreters.ad:Zero": "tell which derivatives are asked for",
    "jax.interpreters.ad:instantiate_zeros": "differentiate",
    "jax.interpreters.ad:is_undefined_primal": "differentiate backwards",
    "jax.interpreters.ad:primitive_jvps": "differentiate",
    "jax.interpreters.ad:primitive_transposes": "differentiate backwards",
    "jax.interpreters.batching:primitive_batchers": "work under vmap",
    "jax.interpreters.mlir:lower_fun": "compile under jit",
    "jax.interpreters.mlir:register_lowering": "compile under jit",
    "flax.nnx.nn.dtypes:canonicalize_dtype": "give y the type that Flax gives it",
}
"""``module:name`` -> what multibn_jax cannot do without it. XLA's call frame is described in ``handler``, which checks its sizes
in each call. How an abstract value tells the axes of a ``shard_map`` is below."""


def part(place: str) -> Any:
    """A part of JAX or Flax.

    Args:
        place: a key of ``PARTS``.

    Raises:
        ImportError: the installed release lacks it; the message says what stopped working and what to do.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"jax {jax.__version__} with flax {flax.__version__} has no {module}.{name}, without which multibn_jax cannot "
            f"{PARTS[place]}. Install releases that multibn was tested with: pip install 'jax<=0.10.2' 'flax<=0.12.8'."
        ) from error


Primitive = part("jax.extend.core:Primitive")
Zero = part("jax.interpreters.ad:Zero")
instantiate_zeros = part("jax.interpreters.ad:instantiate_zeros")
is_undefined_primal = part("jax.interpreters.ad:is_undefined_primal")
primitive_jvps = part("jax.interpreters.ad:primitive_jvps")
primitive_transposes = part("jax.interpreters.ad:primitive_transposes")
primitive_batchers = part("jax.interpreters.batching:primitive_batchers")
lower_fun = part("jax.interpreters.mlir:lower_fun")
register_lowering = part("jax.interpreters.mlir:register_lowering")
canonicalize_dtype = part("flax.nnx.nn.dtypes:canonicalize_dtype")


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
    kind = getattr(aval, "manual_axis_type", None)  # jax 0.10; in 0.9 the abstract value has the axes itself
    axes: frozenset[Any] = kind.varying if kind is not None else aval.vma
    return axes
