"""Call a block with CPU arrays: run the kernel in the caller's thread, without the Custom operator.

MXNet switches threads six times per Custom operator, which takes longer than the work on small input; and if oneDNN may have
computed the gradient of the output, that gradient has to be copied first (``block.py``). So forward waits for its arrays and runs
immediately, and backward is recorded like the backward of ``mxnet.autograd.Function``.

MXNet makes such a backward wait only for the gradient of y. To keep x from being overwritten before backward has run, backward is
also recorded for an additional array, the anchor: its gradient array is x, with the request to add, but backward adds nothing.
``mxnet.autograd.grad`` computes only the gradients that it is asked for, so with it x must stay unchanged until the gradients are
computed, as for any ``mxnet.autograd.Function``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd

from multibn_mxnet import gate
from multibn_mxnet.compat import ADD, LIB, NDArrayHandle, check_call
from multibn_mxnet.description import Description, type_name
from multibn_mxnet.operator import by_kernel
from multibn_mxnet.operator.callbacks import layers, refusing
from multibn_mxnet.operator.native import RECORD_SIZE, WORTH_PYTHON, Record
from multibn_mxnet.operator.register import calls, configuration

from . import output_memory

_int, _pointer = ctypes.c_int, ctypes.c_void_p
_ASYNC = ctypes.c_int(4)  # MXNet's FnProperty::kAsync: the engine runs the function in the thread that pushes it
_ADD = ctypes.c_uint(ADD)
_C = ctypes.CDLL(None)
_C.malloc.restype, _C.malloc.argtypes = _pointer, [ctypes.c_size_t]
_NOTHING = ctypes.cast(_C.getpid, _pointer)  # a function without side effects, for the engine to call


def takes(layer: Description, x: Any) -> bool:
    """Return whether ``normalize`` supports this layer and input."""
    return (
        layer.implementation in ("auto", "kernel")
        and layer.init == "standard"
        and not layer.peers
        and type(x) is (mx.np.ndarray if mx.util.is_np_array() else mx.nd.NDArray)  # dense, and of the active interface
        and x.context.device_type == "cpu"
        and x.size > 0
    )


def normalize(layer: Description, attribute: str, x: Any, arrays: list[Any]) -> tuple[Any, int]:
    """Normalise a valid input; return y, recorded for autograd, and the result of ``by_kernel.forward``.

    Args:
        attribute: the layer's ``attribute()``.
        arrays: the layer's parameters and states, in the layer's order.
    """
    inputs = len(layer.parameters)
    shape, context, states, training = x.shape, x.context, arrays[inputs:], autograd.is_training()
    its = [array.handle for array in arrays]
    handles = (_pointer * (len(its) + 3))(x.handle, *its[:inputs], None, None, *its[inputs:])
    found = gate.wait()(ctypes.addressof(handles), len(handles), inputs + 3)
    check_call(found if found == gate.FAILED else 0)
    if found == gate.REFUSED:
        _refuse(layer, x, arrays, training)
    if training:
        _wait_to_write(context, states)
    n, channels, s = layer.by_channel(shape)
    compiled = type_name(x) == "float32" and x.size < WORTH_PYTHON
    y = output_memory.empty(shape, context, x.dtype)
    run, functions = _functions(compiled)
    at = _C.malloc(RECORD_SIZE + 32 * channels)
    record = Record.from_address(at)
    record.count, record.functions, record.contexts, record.at[:] = 2, functions, at + Record.at.offset, (at, at)
    record.configuration, record.n, record.channels, record.s, record.x = configuration(attribute), n, channels, s, 0
    try:
        if compiled:
            handles[1 + inputs] = y.handle.value
            left = run(ctypes.addressof(handles), training, at)
        if not compiled or left < 0:  # if the gate refused an array, Python raises with the message
            saved, gamma = _parts(record, x)
            parameters = dict(zip(layer.parameters, arrays, strict=False))
            gamma[:] = by_kernel.vector(layer, parameters, "gamma", x)
            left = by_kernel.forward(layer, x, parameters, states, y, saved, [1, 1], training)
    except BaseException:
        _end(at)
        raise
    if type(x) is not mx.nd.NDArray:
        y = y.as_np_ndarray()
    if not autograd.is_recording():
        _end(at)
        return y, left
    handle = NDArrayHandle()
    check_call(LIB.MXNDArrayDetach(x.handle, ctypes.byref(handle)))
    record.x = handle.value
    anchor = x.detach()
    check_call(LIB.MXAutogradMarkVariables(1, ctypes.byref(anchor.handle), ctypes.byref(_ADD), ctypes.byref(handle)))
    given = (_pointer * (inputs + 2))(x.handle, *(array.handle for array in arrays[:inputs]), anchor.handle)
    check_call(LIB.MXCustomFunctionRecord(inputs + 2, given, 1, ctypes.byref(y.handle), _pointer(at)))
    return y, left


def _refuse(layer: Description, x: Any, arrays: list[Any], training: bool) -> None:
    """Raise MXNetError for an array without memory and, in training, for moving statistics that share memory."""
    named = dict(zip((*layer.parameters, *layer.states), arrays, strict=True))
    for name, array in {"x": x, **named}.items():
        gate.check_memory(name, array)
    if training:
        kind, shape = by_kernel.state_type(x), (x.shape[layer.axis],)
        by_kernel.check_apart(**{name: by_kernel.view(name, named[name], kind, shape) for name in layer.states[:2]})


def _wait_to_write(context: Any, arrays: list[Any]) -> None:
    """Wait for all pending reads of the arrays; ``MXNDArrayWaitToWrite`` would switch threads for each array.

    Each is pushed alone: MXNet's engine never starts a function that writes to two slices of one array.
    """
    place = ctypes.byref(ctypes.c_uint64(context.device_id << 32 | context.device_typeid))
    for array in arrays:
        handle = ctypes.byref(array.handle)
        check_call(LIB.MXEnginePushSyncND(_NOTHING, None, None, place, None, 0, handle, 1, ctypes.byref(_ASYNC), 0, None))
    for array in arrays:
        check_call(LIB.MXNDArrayWaitToRead(array.handle))


def _backward(outputs: int, inputs: int, handles: Any, requests: Any, training: int, at: int) -> None:
    """Fill the gradients of x and the parameters; the handles are dy, these gradients, and the anchor's, which is not written."""
    arrays = [mx.nd.NDArray(NDArrayHandle(handles[i])) for i in range(outputs + inputs)]  # NDArrays free their handles
    record = Record.from_address(at)
    layer, x = layers[record.configuration], NDArrayHandle()
    check_call(LIB.MXShallowCopyNDArray(NDArrayHandle(record.x), ctypes.byref(x)))
    its_x = mx.nd.NDArray(x)
    saved, gamma = _parts(record, its_x)
    gradients = dict(zip(("x", *layer.parameters), arrays[1:], strict=False))
    wanted = dict(zip(gradients, requests, strict=False))
    by_kernel.backward(layer, arrays[0], its_x, {"gamma": gamma}, saved, gradients, wanted)


def _parts(record: Record, x: Any) -> tuple[Any, Any]:
    """Return views of ``saved`` and of the copy of gamma, which follow a record."""
    channels = record.channels
    memory: Any = (ctypes.c_char * (32 * channels)).from_address(record.at[0] + RECORD_SIZE)
    kind = by_kernel.state_type(x)
    return np.ndarray((3, channels), np.float64, memory), np.ndarray(channels, kind, memory, 24 * channels)


@cache
def _functions(compiled: bool) -> tuple[Any, int]:
    """Return the compiled forward, and the address of an array with the addresses of the backward and the end."""
    forward, backward, end = _calls()
    both = (_pointer * 2)(backward.address if compiled else ctypes.cast(_in_python, _pointer).value, end.address)
    _kept.append(both)
    return forward.ctypes, ctypes.addressof(both)


def _calls() -> tuple[Any, Any, Any]:
    return calls(ctypes.cast(_in_python, _pointer).value or 0)


def _end(at: int) -> None:
    _calls()[2].ctypes(at)


_kept: list[Any] = []
_in_python = ctypes.CFUNCTYPE(_int, _int, _int, ctypes.POINTER(_pointer), ctypes.POINTER(_int), _int, _pointer)(
    refusing(_backward)
)
