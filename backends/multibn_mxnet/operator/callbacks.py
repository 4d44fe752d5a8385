"""The Custom operator's callbacks in Python, for what ``native.py`` does not handle: errors, large input, other types, devices.

MXNet calls them from its own threads. They return 1, or 0 for an error; MXNet then raises MXNetError with a message of its own,
so the callbacks print ours to stderr.
"""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

import mxnet as mx
import numpy as np
from mxnet.base import MXNetError

from multibn_mxnet.compat import NDArrayHandle
from multibn_mxnet.description import Description, type_name

layers: dict[int, Description] = {}
"""Address of a configuration, which MXNet passes to the callbacks as their state -> the layer's description."""

_TYPES = {0: "float32", 1: "float64", 2: "float16", 3: "uint8", 4: "int32", 5: "int8", 6: "int64", 7: "bool", 12: "bfloat16"}
_int, _pointer = ctypes.c_int, ctypes.c_void_p
_INFER_SHAPE = ctypes.CFUNCTYPE(_int, _int, _pointer, _pointer, _pointer)
_INFER_TYPE = ctypes.CFUNCTYPE(_int, _int, _pointer, _pointer)
_RUN = ctypes.CFUNCTYPE(_int, _int, _pointer, _pointer, _pointer, _int, _pointer)


def refusing(callback: Callable[..., None]) -> Callable[..., int]:
    """Wrap a callback for C: return 1; if the callback raises, print the error to stderr and return 0."""

    def answer(*arguments: Any) -> int:
        try:
            callback(*arguments)
        except MXNetError as error:
            print(f"multibn: {error}", file=sys.stderr)
        except Exception:
            traceback.print_exc()
        else:
            return 1
        return 0

    return answer


def _infer_shape(count: int, rank_list: int, shape_list: int, state: int) -> None:
    layer = layers[state]
    ranks = (_int * count).from_address(rank_list)
    shapes = (_pointer * count).from_address(shape_list)
    shape = tuple((_int * ranks[0]).from_address(shapes[0] or 0)) if ranks[0] else ()
    channels = shape[layer.axis] if -len(shape) <= layer.axis < len(shape) else 1
    wanted = channels
    for i in range(1, 1 + len(layer.parameters)):
        known = _int.from_address(shapes[i] or 0).value if ranks[i] == 1 else 0
        wanted = known if known > 0 and channels > 0 else wanted  # MXNet passes 0 or -1 for an unknown length
    problem = layer.objection(shape, "float32", training=False, channels=wanted)
    if problem:
        raise MXNetError(problem)
    inputs, axis = 1 + len(layer.parameters), layer.axis % ranks[0]
    for i in range(1, count):
        ranks[i], shapes[i] = 1, (shapes[0] or 0) + 4 * axis
    ranks[inputs], shapes[inputs] = ranks[0], shapes[0]
    ranks[inputs + 1], shapes[inputs + 1] = 2, _saved_shape(channels).ctypes.data
    if len(layer.states) == 3:
        shapes[inputs + 4] = _saved_shape(1)[1:].ctypes.data


def _infer_type(count: int, type_list: int, state: int) -> None:
    layer = layers[state]
    types = (_int * count).from_address(type_list)
    inputs = 1 + len(layer.parameters)
    its = {name: types[i] for i, name in enumerate(layer.parameters, 1)}
    its.update({name: types[inputs + 2 + i] for i, name in enumerate(layer.states[:2])})
    parameters = {name: ((2,), _TYPES[code]) for name, code in its.items() if code >= 0}
    raise MXNetError(layer.objection((2,) * (layer.rank or 2 + layer.within), _TYPES[types[0]], False, 2, parameters))


def _forward(count: int, handles: int, tags: int, requests: int, train: int, state: int) -> None:
    layer, arrays = layers[state], _arrays(count, handles)
    inputs = 1 + len(layer.parameters)
    parameters = dict(zip(layer.parameters, arrays[1:inputs], strict=True))
    x, y, saved, states = arrays[0], arrays[inputs], arrays[inputs + 1], arrays[inputs + 2 :]
    problem = layer.objection(x.shape, type_name(x), bool(train), states[0].shape[0])
    if problem:
        if layer.peers and layer.spec.uses_batch(bool(train)):
            from . import by_group

            by_group.refuse(layer, states[0].shape[0], x, problem)
        raise MXNetError(problem)
    _ways(layer, x).forward(layer, x, parameters, states, y, saved, list((_int * 2).from_address(requests)), bool(train))


def _backward(count: int, handles: int, tags: int, requests: int, train: int, state: int) -> None:
    layer, arrays = layers[state], _arrays(count, handles)
    inputs = 1 + len(layer.parameters)
    parameters = dict(zip(layer.parameters, arrays[3 : 2 + inputs], strict=True))
    gradients = dict(zip(("x", *layer.parameters), arrays[4 + inputs :], strict=False))
    wanted = dict(zip(gradients, (_int * inputs).from_address(requests), strict=True))
    dy, x, saved = arrays[0], arrays[2], arrays[3 + inputs]
    _ways(layer, x).backward(layer, dy, x, parameters, saved, gradients, wanted)


@cache
def _saved_shape(channels: int) -> Any:
    return np.array([3, channels], np.int32)


def _arrays(count: int, handles: int) -> list[Any]:
    """Wrap handles in NDArrays, which free the handles."""
    return [mx.nd.NDArray(NDArrayHandle(handle)) for handle in (_pointer * count).from_address(handles)]


def _ways(layer: Description, x: Any) -> Any:
    from multibn_mxnet.framework import operators as by_framework

    from . import by_group, by_kernel

    on_cpu = x.context.device_type.startswith("cpu")
    if layer.implementation == "kernel" and not on_cpu:
        raise MXNetError(f"implementation='kernel' needs x on a CPU, got {x.context}. Use implementation='auto'.")
    if layer.peers:
        if not on_cpu:
            raise MXNetError(f"SyncBatchNorm computes on a CPU, got {x.context}. Move the network, or use BatchNorm.")
        return by_group
    return by_kernel if on_cpu and layer.implementation != "framework" else by_framework


CALLBACKS: dict[str, Any] = {
    "infer_shape": _INFER_SHAPE(refusing(_infer_shape)),
    "infer_type": _INFER_TYPE(refusing(_infer_type)),
    "forward": _RUN(refusing(_forward)),
    "backward": _RUN(refusing(_backward)),
}
