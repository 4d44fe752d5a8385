"""The operator on CPU in Python, for rare cases and for input worth huge pages; ``native.py`` has the compiled operator."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import numpy as np
from mxnet.base import MXNetError

from multibn import identity, kernel, memory
from multibn.layer.types import PARAMETER_TYPE, Array
from multibn_mxnet import gate
from multibn_mxnet.compat import ADD, NULL
from multibn_mxnet.description import Description, type_name

_BITS = {"float16": "int16", "bfloat16": "uint16"}


def forward(
    layer: Description,
    x: Any,
    parameters: dict[str, Any],
    states: list[Any],
    y: Any,
    saved: Any,
    wanted: list[int],
    training: bool,
) -> int:
    """Fill y and saved, and update the states; return for how many channels the moving statistics were not updated (BN-11).

    Arrays are NDArrays; wanted: MXNet's write requests for y and saved.
    """
    spec, m = layer.spec, values_per_channel(layer, x)
    values, its_y, gamma, beta, mean, var, batches, its_saved = views(layer, x, parameters, states, y, saved, wanted)
    if training and spec.update_statistics:
        check_apart(running_mean=mean, running_var=var, gamma=gamma, beta=beta, x=values)
    out = np.empty_like(values) if wanted[0] in (NULL, ADD) else its_y
    if wanted[0] not in (NULL, ADD):
        memory.advise(out.ctypes.data, out.nbytes)
    use_batch = training and spec.normalize_with == "batch"
    update = training and spec.update_statistics and m > 0
    if layer.init == "identity" and use_batch and m > 0:
        _begin(layer, values, gamma, beta, mean, var)
    left = kernel.run_forward(
        values, out, gamma, beta, mean, var, its_saved[:2],
        spec.eps, spec.weight_of_old(int(batches[0])), spec.moving_variance == "unbiased", use_batch, update,
    )  # fmt: skip
    its_saved[2] = use_batch
    batches += update
    if wanted[0] == ADD:
        add(its_y, out)
    return left


def backward(
    layer: Description, dy: Any, x: Any, parameters: dict[str, Any], saved: Any, gradients: dict[str, Any], wanted: dict[str, int]
) -> None:
    """Fill the gradients, named "x", "gamma", "beta", each by MXNet's write request of the same name."""
    shape, its_type, kind = layer.by_channel(x.shape), type_name(x), state_type(x)
    values, slopes = view("x", x, its_type, shape), view("the head gradient", dy, its_type, shape, x)
    gamma, its_saved = vector(layer, parameters, "gamma", x), view("saved", saved, "float64", (3, shape[1]))
    into = targets(layer, x, gradients, wanted)
    direct = wanted["x"] not in (NULL, ADD)
    dx = into["x"] if direct else np.empty(shape, values.dtype)
    if direct:
        memory.advise(dx.ctypes.data, dx.nbytes)
    sums = {"gamma": np.zeros(shape[1], kind), "beta": np.zeros(shape[1], kind)}
    kernel.run_backward(values, slopes, dx, gamma, its_saved[:2], sums["gamma"], sums["beta"], bool(its_saved[2].any()))
    if wanted["x"] == ADD:
        add(into["x"], dx)
    write_sums(layer, into, wanted, sums)


class Views(NamedTuple):
    """Views of the arrays of a forward: x and y (N, C, S), the parameters and states (C,), batches (1,), saved (3, C)."""

    x: Array
    y: Array
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    batches: Array
    saved: Array


def views(
    layer: Description, x: Any, parameters: dict[str, Any], states: list[Any], y: Any, saved: Any, wanted: list[int]
) -> Views:
    """View the arrays of a forward, given as to ``forward``; new arrays take the place of those that are absent or not wanted."""
    shape, kind = layer.by_channel(x.shape), type_name(x)
    channels = shape[1]
    values, its_y = view("x", x, kind, shape), view("y", y, kind, shape, x)
    gamma, beta = (vector(layer, parameters, name, x) for name in ("gamma", "beta"))
    mean, var = (view(name, state, state_type(x), (channels,)) for name, state in zip(layer.states, states[:2], strict=False))
    batches = view("num_batches_tracked", states[2], "int64", (1,)) if len(states) == 3 else np.zeros(1, np.int64)
    its_saved = np.zeros((3, channels)) if wanted[1] == NULL else view("saved", saved, "float64", (3, channels))
    return Views(values, its_y, gamma, beta, mean, var, batches, its_saved)


def write_sums(layer: Description, into: dict[str, Array], wanted: dict[str, int], sums: dict[str, Array]) -> None:
    """Write the gradients of gamma and beta into their targets; 0 for a parameter that the spec does not use."""
    for name, counts in (("gamma", layer.spec.scale), ("beta", layer.spec.center)):
        if name in into:
            into[name][:] = (into[name] if wanted[name] == ADD else 0) + (sums[name] if counts else 0)


def targets(layer: Description, x: Any, gradients: dict[str, Any], wanted: dict[str, int]) -> dict[str, Array]:
    """Return NumPy views of the requested gradients, named as in ``backward``: (N, C, S) for x, (C,) for gamma and beta."""
    shape = layer.by_channel(x.shape)
    found = {}
    for name, array in gradients.items():
        if wanted.get(name, NULL) != NULL:
            kind, its_shape, like = (type_name(x), shape, x) if name == "x" else (state_type(x), (shape[1],), None)
            found[name] = view(f"the gradient of {name}", array, kind, its_shape, like)
    return found


def _begin(layer: Description, bits: Array, gamma: Array, beta: Array, mean: Array, var: Array) -> None:
    """Set gamma and beta of an untouched layer so that the layer is the identity on x.

    gamma and beta are inputs of the operator, but safe to write: an operator that holds the moving statistics has exclusive use
    of the layer.
    """
    if identity.untouched(gamma, beta, mean, var):
        values = _wide(bits) if bits.dtype == np.uint16 else bits.view(np.float16) if bits.dtype == np.int16 else bits
        gamma[:], beta[:] = identity.parameters(values, layer.spec.eps, gamma.dtype)


def view(name: str, array: Any, kind: str, shape: tuple[int, ...], like: Any = None) -> Array:
    """Return a NumPy view of a CPU NDArray, of half types as their bits, without waiting for pending writes.

    Args:
        name: name of the array, for the message.
        array: an NDArray; a NumPy array is returned as it is.
        kind, shape: type and shape of the view; the array must have this type and as many values.
        like: an NDArray whose shape the array must have, or None.

    Raises:
        MXNetError: the array has another type, shape or number of values, is sparse, or is not on a CPU.
    """
    if isinstance(array, np.ndarray):
        return array
    dtype = np.dtype(_BITS.get(kind, kind))
    if 0 in shape:
        return np.empty(shape, dtype)
    size = math.prod(shape)
    memory: Any = (ctypes.c_char * (size * dtype.itemsize)).from_address(gate.address(name, array, kind, size, like))
    return np.ndarray(shape, dtype, memory)


def check_apart(**arrays: Array) -> None:
    """Raise MXNetError if one of the first two arrays, which are written to, shares memory with another."""
    for i, (written, its) in enumerate(list(arrays.items())[:2]):
        for name, other in list(arrays.items())[i + 1 :]:
            if np.may_share_memory(its, other):
                raise MXNetError(f"{written} is updated in place, but shares memory with {name}. Give each an array of its own.")


def add(target: Array, values: Array) -> None:
    """Compute ``target += values``, where int16 and uint16 are the bits of float16 and bfloat16."""
    if target.dtype == np.uint16:  # bfloat16: the upper half of a float32, rounded to nearest even by a carry
        total = _wide(target) + _wide(values)
        bits = total.view(np.uint32)
        target[:] = np.where(np.isnan(total), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    else:
        kind = np.float16 if target.dtype == np.int16 else target.dtype
        its = target.view(kind)
        its += values.view(kind)


def _wide(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def state_type(x: Any) -> str:
    """Return the type of parameters and statistics for input x (BN-10)."""
    return PARAMETER_TYPE[type_name(x)]


def values_per_channel(layer: Description, x: Any) -> int:
    """Return m of the clauses, the number of values per channel."""
    before, _, after = layer.by_channel(x.shape)
    return before * after


def vector(layer: Description, parameters: dict[str, Any], name: str, x: Any) -> Array:
    """Return gamma or beta for an input x; ones or zeros if the layer has none or the spec does not use it."""
    counts = layer.spec.scale if name == "gamma" else layer.spec.center
    channels = x.shape[layer.axis]
    if name in parameters and counts:
        return view(name, parameters[name], state_type(x), (channels,))
    return np.full(channels, 1.0 if name == "gamma" else 0.0, state_type(x))
