"""The Custom operator ``multibn``, by which MXNet runs the kernel: imperatively, hybridized, and in exported models.

Inputs are x, gamma and beta if the layer has them, and the states running_mean, running_var and, for momentum None,
num_batches_tracked. Outputs are y and ``saved``, which backward needs: float64 (3, C), the mean and 1/sqrt(var+eps) that
normalised x, and whether gradients flow through both (BN-08). The operator itself has no state, so a graph may use a layer many
times, and many forwards may precede a backward. The moving statistics change in forward (BN-05).

On small input, the overhead of ``mx.operator.register`` exceeds the whole cost of MXNet's own BatchNorm, so this module registers
the operator by the C API beneath. ``native.py`` has the callbacks for the common case, ``callbacks.py`` those for all others.
"""

from __future__ import annotations

import atexit
import ctypes
from functools import cache
from typing import Any

import mxnet as mx
import numpy as np

from multibn_mxnet.compat import LIB, check_call
from multibn_mxnet.description import Description

from .callbacks import CALLBACKS, layers, refusing

NAME = "multibn"
_SHAPES = 1 << 16  # channel counts in the table of shapes of ``saved``
_int, _pointer = ctypes.c_int, ctypes.c_void_p
_CREATOR = ctypes.CFUNCTYPE(
    _int, ctypes.c_char_p, _int, ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_char_p), _pointer
)


class _Operator:
    """Configuration and callback lists of one layer, in MXNet's format; kept until the process ends, as graphs may use them."""

    def __init__(self, layer: Description) -> None:
        from multibn import kernel
        from multibn.kernel import threads

        from . import native

        self._kept: list[Any] = []
        bodies = kernel.prepare("float32")
        self._config = np.zeros((), native.CONFIG)
        self.address = self._config.ctypes.data
        layers[self.address] = layer
        spec, inputs = layer.spec, 1 + len(layer.parameters)
        place = {name: 1 + i for i, name in enumerate(layer.parameters)}
        dependencies = [0, 2, inputs + 3] + [2 + place[name] for name in layer.parameters if name == "gamma" and spec.scale]
        description, operator, python_operator = _callbacks()
        by_python = layer.implementation == "framework" or layer.init == "identity" or layer.peers > 0
        values = {
            "arguments": self._strings("data", *layer.parameters),
            "outputs": self._strings("output", "saved"),
            "states": self._strings(*layer.states),
            "dependencies": self._keep((_int * len(dependencies))(*dependencies)),
            "dependency_count": len(dependencies),
            "operator": self._list(python_operator if by_python else operator),
            "python_operator": self._list(python_operator),
            "inputs": inputs,
            "gamma": place.get("gamma", 0),
            "beta": place.get("beta", 0),
            "scale": spec.scale,
            "center": spec.center,
            "axis": layer.axis,
            "rank": layer.rank or 0,
            "within": layer.within,
            "unbiased": spec.moving_variance == "unbiased",
            "normalize_with_batch": spec.normalize_with == "batch",
            "update": spec.update_statistics,
            "average": spec.momentum is None,
            "saved_shapes": _saved_shapes().ctypes.data,
            "saved_shapes_count": _SHAPES,
            "eps": spec.eps,
            "momentum": 0 if spec.momentum is None else spec.momentum,
            "starters": threads.starters(),
            "threads": threads.limit(),
            "forward": bodies.forward.address,
            "backward": bodies.backward.address,
        }
        for name, value in values.items():
            self._config[name] = value
        self.description = np.array(self._list(description))

    def _keep(self, thing: Any) -> int:
        self._kept.append(thing)
        return ctypes.addressof(thing)

    def _strings(self, *names: str) -> int:
        return self._keep((ctypes.c_char_p * (len(names) + 1))(*(name.encode() for name in names), None))

    def _list(self, callbacks: list[int]) -> list[int]:
        """Return an MXCallbackList: the number of callbacks, their addresses, and the state of each."""
        many = _pointer * len(callbacks)
        return [len(callbacks), self._keep(many(*callbacks)), self._keep(many(*[self.address] * len(callbacks)))]


@cache
def _callbacks() -> tuple[list[int], list[int], list[int]]:
    """Return the addresses of the callbacks of the operator's description, of the operator, and of the operator in Python."""
    from . import native

    addresses = {name: ctypes.cast(function, _pointer).value or 0 for name, function in CALLBACKS.items()}
    native.link(addresses)
    compiled = native.compile_callbacks()
    _compiled.extend(compiled)
    description, operator = ([callback.address for callback in callbacks] for callbacks in compiled)
    return description, operator, [operator[0], addresses["forward"], addresses["backward"]]


@cache
def calls(python_backward: int) -> tuple[Any, Any, Any]:
    """Compile the forward, backward and end of a call of ``direct/call.py``, given the address of its backward in Python."""
    from . import native

    _callbacks()
    native.link({"call_backward": python_backward})
    return native.compile_calls()


@cache
def _saved_shapes() -> Any:
    """Return a table with the shape (3, C) in row C."""
    return np.array([np.full(_SHAPES, 3), np.arange(_SHAPES)], np.int32).T.copy()


_compiled: list[Any] = []  # kept alive, because MXNet holds the addresses
_by_attribute: dict[str, _Operator] = {}


def configuration(attribute: str) -> int:
    """Return the address of the configuration of the layer that an attribute describes: the state of its callbacks."""
    return _operator(attribute).address


def _operator(attribute: str) -> _Operator:
    operator = _by_attribute.get(attribute)
    if operator is None:
        operator = _by_attribute.setdefault(attribute, _Operator(Description.parse(attribute)))
    return operator


def _create(_: bytes, count: int, keys: Any, values: Any, out: int) -> None:
    ctypes.memmove(out, _nothing.ctypes.data, _nothing.nbytes)  # on failure, MXNet calls the delete callback in ``out``
    text = next(values[i] for i in range(count) if keys[i] == b"layer")
    operator = _operator(text.decode())
    ctypes.memmove(out, operator.description.ctypes.data, operator.description.nbytes)


_delete = ctypes.CFUNCTYPE(_int, _pointer)(lambda state: 1)
_deletes = (_pointer * 1)(ctypes.cast(_delete, _pointer))
_nothing = np.array([1, ctypes.addressof(_deletes), ctypes.addressof(_deletes)])
_creator = _CREATOR(refusing(_create))
check_call(LIB.MXCustomOpRegister(NAME.encode(), _creator))
atexit.register(mx.nd.waitall)  # pending operators may call Python, so finish them before it ends
