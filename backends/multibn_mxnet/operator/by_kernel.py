"""The operator on CPU for what is rare, and for input that is worth huge pages: see ``native.py``."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from mxnet.base import _LIB, check_call

from multibn import identity, kernel, memory
from multibn.layer.types import PARAMETER_TYPE, Array
from multibn_mxnet.description import Layer, type_name

NULL, ADD = 0, 3
_BITS = {"float16": "int16", "bfloat16": "uint16"}


def forward(
    layer: Layer, x: Any, parameters: dict[str, Any], states: list[Any], y: Any, saved: Any, wanted: list[int], training: bool
) -> int:
    """Fill y and saved, update the states; return how many channels' moving statistics were left as they were (BN-11).

    Arrays are NDArrays; wanted: MXNet's requests for y and saved.
    """
    spec, shape, m = layer.spec, layer.by_channel(x.shape), values_per_channel(layer, x)
    channels = shape[1]
    mean, var = (view(state, (channels,)) for state in states[:2])
    its_saved = np.zeros((3, channels)) if wanted[1] == NULL else view(saved, (3, channels))
    out = np.empty(shape, values_type(x)) if wanted[0] in (NULL, ADD) else view(y, shape)
    if wanted[0] not in (NULL, ADD):
        memory.advise(out.ctypes.data, out.nbytes)
    use_batch = training and spec.normalize_with == "batch"
    update = training and spec.update_statistics and m > 0
    if layer.init == "identity" and use_batch and m > 0:
        _begin(layer, x, parameters, mean, var)
    batches = view(states[2], (1,)) if len(states) == 3 else np.zeros(1, np.int64)
    left = kernel.run_forward(
        view(x, shape), out, vector(layer, parameters, "gamma", x), vector(layer, parameters, "beta", x), mean, var,
        its_saved[:2], spec.eps, spec.weight_of_old(int(batches[0])), spec.moving_variance == "unbiased", use_batch, update,
    )  # fmt: skip
    its_saved[2] = use_batch
    batches += update
    if wanted[0] == ADD:
        add(view(y, shape), out, x)
    return left


def backward(
    layer: Layer, dy: Any, x: Any, parameters: dict[str, Any], saved: Any, gradients: dict[str, Any], wanted: dict[str, int]
) -> None:
    """Fill the gradients, named "x", "gamma", "beta", each as MXNet's request of the same name says."""
    shape = layer.by_channel(x.shape)
    kind, its_saved = state_type(x), view(saved, (3, shape[1]))
    direct = wanted["x"] not in (NULL, ADD)
    dx = view(gradients["x"], shape) if direct else np.empty(shape, values_type(x))
    if direct:
        memory.advise(dx.ctypes.data, dx.nbytes)
    sums = {"gamma": np.zeros(shape[1], kind), "beta": np.zeros(shape[1], kind)}
    kernel.run_backward(
        view(x, shape), view(dy, shape), dx, vector(layer, parameters, "gamma", x), its_saved[:2],
        sums["gamma"], sums["beta"], bool(its_saved[2].any()),
    )  # fmt: skip
    if wanted["x"] == ADD:
        add(view(gradients["x"], shape), dx, x)
    for name, counts in (("gamma", layer.spec.scale), ("beta", layer.spec.center)):
        if wanted.get(name, NULL) != NULL:
            out = view(gradients[name], (shape[1],))
            out[:] = (out if wanted[name] == ADD else 0) + (sums[name] if counts else 0)


def _begin(layer: Layer, x: Any, parameters: dict[str, Any], mean: Array, var: Array) -> None:
    """Make an untouched layer the identity on x.

    That gamma and beta are inputs of the operator does no harm: who holds the moving statistics is alone with the layer.
    """
    gamma, beta = (view(parameters[name], mean.shape) for name in ("gamma", "beta"))
    if identity.untouched(gamma, beta, mean, var):
        bits = view(x, layer.by_channel(x.shape))
        values = _wide(bits) if bits.dtype == np.uint16 else bits.view(np.float16) if bits.dtype == np.int16 else bits
        gamma[:], beta[:] = identity.parameters(values, layer.spec.eps, gamma.dtype)


def view(array: Any, shape: tuple[int, ...]) -> Array:
    """A CPU NDArray as NumPy sees it, without a copy, halves as their bits. For callbacks: it waits for no pending writes.

    What is a NumPy array already stays as it is.
    """
    if isinstance(array, np.ndarray):
        return array
    dtype = np.dtype(values_type(array))
    if 0 in shape:
        return np.empty(shape, dtype)
    address = ctypes.c_void_p()
    check_call(_LIB.MXNDArrayGetData(array.handle, ctypes.byref(address)))
    size = math.prod(shape) * dtype.itemsize
    memory: Any = (ctypes.c_char * size).from_address(address.value or 0)
    return np.ndarray(shape, dtype, memory)


def add(target: Array, values: Array, like: Any) -> None:
    """``target += values`` in the type of ``like``, which for float16 is not that of the bits."""
    if target.dtype == np.uint16:  # bfloat16: the upper half of a float32, which rounds to nearest even by carrying
        total = _wide(target) + _wide(values)
        bits = total.view(np.uint32)
        target[:] = np.where(np.isnan(total), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    else:
        kind = np.float16 if target.dtype == np.int16 else target.dtype
        its = target.view(kind)
        its += values.view(kind)


def _wide(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def values_type(array: Any) -> str:
    """The type of the array's values in the kernel."""
    name = type_name(array)
    return _BITS.get(name, name)


def state_type(x: Any) -> str:
    """The type of parameters and statistics for input x (BN-10)."""
    return PARAMETER_TYPE[type_name(x)]


def values_per_channel(layer: Layer, x: Any) -> int:
    """m of the clauses."""
    before, _, after = layer.by_channel(x.shape)
    return before * after


def vector(layer: Layer, parameters: dict[str, Any], name: str, x: Any) -> Array:
    """gamma or beta for an input x, or what stands for one that there is not or that does not count."""
    counts = layer.spec.scale if name == "gamma" else layer.spec.center
    channels = x.shape[layer.axis]
    if name in parameters and counts:
        return view(parameters[name], (channels,))
    return np.full(channels, 1.0 if name == "gamma" else 0.0, state_type(x))
