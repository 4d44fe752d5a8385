"""BatchNorm as primitives of JAX: three, which are closed under jvp, transposition and vmap, so that every transformation works.

``forward`` is the kernel's. Its derivative is ``tangent``, linear in the tangents; the transpose of that is ``backward``, the
kernel's too. The derivatives of these two are the formulas'. Values are (..., N, C, S), the parameters (..., C): vmap adds axes
in front, over which the handlers loop. On other devices than CPUs each is computed by JAX's own operators.

float64 statistics travel as pairs of uint32, since JAX has no float64 unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import formulas, handler
from .compat import (
    Primitive,
    Zero,
    instantiate_zeros,
    is_undefined_primal,
    lower_fun,
    primitive_batchers,
    primitive_jvps,
    primitive_transposes,
    register_lowering,
    typed_like,
)
from .formulas import How, parameter_type


def bind(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, batches: Any, how: How) -> tuple[Any, Any, Any]:
    """y and the new moving statistics. x is (N, C, S), batches int32."""
    y, _, mean, var = _forward.bind(x, gamma, beta, mean, var, batches, how=how)
    return y, mean, var


def _primitive(name: str, types: Callable[..., Any], kernel: Callable[..., Any] | None, formula: Callable[..., Any]) -> Primitive:
    """A primitive whose results have these types, done by the kernel on CPUs, if given, and by the formula elsewhere."""
    made = Primitive(name)
    made.multiple_results = True
    made.def_impl(jax.jit(made.bind, static_argnames="how"))
    made.def_abstract_eval(lambda *avals, how: [typed_like(avals[0], *each) for each in types(*avals)])
    register_lowering(made, lower_fun(formula, multiple_results=True))
    if kernel is not None:
        register_lowering(made, lower_fun(kernel, multiple_results=True), platform="cpu")

    def batched(arguments: Sequence[Any], axes: Sequence[int | None], *, how: How) -> tuple[Any, list[int]]:
        size = next(a.shape[i] for a, i in zip(arguments, axes, strict=True) if i is not None)
        each = [
            jnp.broadcast_to(a, (size, *a.shape)) if i is None else jnp.moveaxis(a, i, 0)
            for a, i in zip(arguments, axes, strict=True)
        ]
        out = made.bind(*each, how=how)
        return out, [0] * len(out)

    primitive_batchers[made] = batched
    return made


# forward: x, gamma, beta, mean, var, batches -> y, statistics, new mean, new var


def _forward_types(x: Any, gamma: Any, *_: Any) -> Any:
    channel = gamma.shape, parameter_type(x)
    return (x.shape, x.dtype), ((*gamma.shape[:-1], 2, gamma.shape[-1], 2), np.dtype(np.uint32)), channel, channel


def _forward_by_kernel(x: Any, gamma: Any, *others: Any, how: How) -> Any:
    handler.prepare(x.dtype.name)
    settings = np.array([how.eps, -1 if how.old is None else how.old, how.unbiased, how.use_batch, how.update], np.float64)
    return jax.ffi.ffi_call(handler.FORWARD, _shaped(_forward_types(x, gamma)))(x, gamma, *others, settings=settings)


def _forward_by_formula(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, batches: Any, *, how: How) -> Any:
    y, mean, var = formulas.forward(x, gamma, beta, mean, var, batches, how)
    return y, jnp.zeros(*_forward_types(x, gamma)[1]), mean, var


_forward = _primitive("multibn_forward", _forward_types, _forward_by_kernel, _forward_by_formula)


def _forward_jvp(primals: Any, tangents: Any, *, how: How) -> Any:
    out = _forward.bind(*primals, how=how)
    constant = [_zero(a) for a in out]
    if _all_zero(tangents[:5]):
        return out, constant
    linear = [instantiate_zeros(t) for t in tangents[:5]]
    (dy,) = _tangent.bind(*linear, *primals[:5], out[1], how=how)
    return out, (dy, *constant[1:])


# tangent: dx, dgamma, dbeta, dmean, dvar, x, gamma, beta, mean, var, statistics -> dy


def _tangent_types(dx: Any, *_: Any) -> Any:
    return ((dx.shape, dx.dtype),)


def _tangent_by_formula(*arguments: Any, how: How) -> Any:
    linear, primals = arguments[:5], arguments[5:10]
    return [jax.jvp(partial(formulas.normalised, how=how), primals, linear)[1]]


_tangent = _primitive("multibn_tangent", _tangent_types, None, _tangent_by_formula)


def _tangent_jvp(primals: Any, tangents: Any, *, how: How) -> Any:
    """In the linear arguments itself again; in the others the formulas'."""
    linear, kept = primals[:5], primals[5:]
    out = _tangent.bind(*primals, how=how)
    moved = []
    if not _all_zero(tangents[:5]):
        moved += _tangent.bind(*(instantiate_zeros(t) for t in tangents[:5]), *kept, how=how)
    if not _all_zero(tangents[5:10]):
        along = tuple(instantiate_zeros(t) for t in tangents[5:10])
        moved += jax.jvp(lambda *a: _tangent_by_formula(*linear, *a, how=how), tuple(kept[:5]), along)[1]
    return out, [moved[0] + moved[1] if len(moved) == 2 else moved[0] if moved else _zero(out[0])]


def _tangent_transpose(cotangents: Any, *arguments: Any, how: How) -> Any:
    (dy,) = cotangents
    nothing = [None] * len(arguments)
    if isinstance(dy, Zero):
        return nothing
    gamma, var = arguments[6], arguments[9]
    dx, dgamma, dbeta = _backward.bind(dy, *arguments[5:], how=how)
    invstd = jax.lax.rsqrt(var + how.eps)
    moving = [jnp.zeros_like(var)] * 2 if how.use_batch else [-gamma * invstd * dbeta, -0.5 * gamma * invstd**2 * dgamma]
    found = [dx, dgamma, dbeta, *moving]
    return [each if is_undefined_primal(a) else None for each, a in zip(found, arguments[:5], strict=True)] + nothing[5:]


# backward: dy, x, gamma, beta, mean, var, statistics -> dx, dgamma, dbeta


def _backward_types(dy: Any, x: Any, gamma: Any, *_: Any) -> Any:
    channel = gamma.shape, gamma.dtype
    return (x.shape, x.dtype), channel, channel


def _backward_by_kernel(dy: Any, x: Any, gamma: Any, beta: Any, mean: Any, var: Any, statistics: Any, *, how: How) -> Any:
    handler.prepare(x.dtype.name)
    call = jax.ffi.ffi_call(handler.BACKWARD, _shaped(_backward_types(dy, x, gamma)))
    return call(x, dy, gamma, statistics, settings=np.array([how.use_batch], np.float64))


def _backward_by_formula(dy: Any, x: Any, gamma: Any, beta: Any, mean: Any, var: Any, statistics: Any, *, how: How) -> Any:
    return formulas.gradients(dy, x, gamma, beta, mean, var, how)


_backward = _primitive("multibn_backward", _backward_types, _backward_by_kernel, _backward_by_formula)


def _backward_jvp(primals: Any, tangents: Any, *, how: How) -> Any:
    out = _backward.bind(*primals, how=how)
    if _all_zero(tangents[:6]):
        return out, [_zero(each) for each in out]
    along = tuple(instantiate_zeros(t) for t in tangents[:6])
    return out, list(jax.jvp(partial(formulas.gradients, how=how), tuple(primals[:6]), along)[1])


primitive_jvps.update({_forward: _forward_jvp, _tangent: _tangent_jvp, _backward: _backward_jvp})
primitive_transposes[_tangent] = _tangent_transpose


def _zero(like: Any) -> Any:
    return Zero(jax.typeof(like).to_tangent_aval())


def _all_zero(tangents: Sequence[Any]) -> bool:
    return all(isinstance(t, Zero) for t in tangents)


def _shaped(types: Any) -> Any:
    return tuple(jax.ShapeDtypeStruct(*each) for each in types)
