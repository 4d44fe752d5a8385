"""Private parts of MXNet that the blocks use. Importing the package raises ImportError if the release lacks one."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import mxnet

_ARRAYS = "hand arrays to the kernel"
_DIRECT = "call the kernel without an operator"
_BLOCKS = "stand in for gluon.nn.BatchNorm"

PARTS: Final = {
    "mxnet.base:NDArrayHandle": _ARRAYS,
    "mxnet.base:check_call": _ARRAYS,
    "mxnet.base:_LIB.MXAutogradMarkVariables": _DIRECT,
    "mxnet.base:_LIB.MXCustomFunctionRecord": _DIRECT,
    "mxnet.base:_LIB.MXCustomOpRegister": "run in hybridized and exported networks",
    "mxnet.base:_LIB.MXEnginePushSyncND": _DIRECT,
    "mxnet.base:_LIB.MXNDArrayDetach": _DIRECT,
    "mxnet.base:_LIB.MXNDArrayFree": _ARRAYS,
    "mxnet.base:_LIB.MXNDArrayFromDLPackEx": "lend memory to large outputs",
    "mxnet.base:_LIB.MXNDArrayGetContext": _ARRAYS,
    "mxnet.base:_LIB.MXNDArrayGetData": _ARRAYS,
    "mxnet.base:_LIB.MXNDArrayGetDType": _ARRAYS,
    "mxnet.base:_LIB.MXNDArrayGetShapeEx": _ARRAYS,
    "mxnet.base:_LIB.MXNDArrayGetStorageType": _ARRAYS,
    "mxnet.base:_LIB.MXNDArrayWaitToRead": _ARRAYS,
    "mxnet.base:_LIB.MXShallowCopyNDArray": _DIRECT,
    "mxnet.gluon.nn:BatchNorm()._active": _BLOCKS,
    "mxnet.gluon.nn:BatchNorm()._build_cache": "export blocks",
    "mxnet.gluon.nn:BatchNorm()._cached_graph": "export blocks",
    "mxnet.gluon.nn:BatchNorm()._cached_op": "export blocks",
    "mxnet.gluon.nn:BatchNorm()._children": "measure networks",
    "mxnet.gluon.nn:BatchNorm()._clear_cached_op": "trace swapped networks again",
    "mxnet.gluon.nn:BatchNorm()._kwargs": _BLOCKS,
    "mxnet.gluon.nn:BatchNorm()._reg_params": _BLOCKS,
    "mxnet.gluon.nn:BatchNorm().beta._differentiable": _BLOCKS,
    "mxnet.gluon.nn:BatchNorm().beta._finish_deferred_init": _BLOCKS,
    "mxnet.gluon.parameter:DeferredInitializationError": _BLOCKS,
    "mxnet.ndarray.ndarray:DLContext": "lend memory to large outputs",
    "mxnet.ndarray.ndarray:DLDataType": "lend memory to large outputs",
    "mxnet.ndarray.ndarray:DLTensor": "lend memory to large outputs",
}
"""``module:name`` -> what the blocks need the part for. ``()`` means an instance of the class."""


def part(place: str) -> Any:
    """Return a private part of MXNet.

    Args:
        place: a key of ``PARTS``.

    Raises:
        ImportError: the installed release lacks the part; the message names what does not work and the release to install.
    """
    module, _, names = place.partition(":")
    try:
        found: Any = import_module(module)
        for name in names.split("."):
            found = getattr(found, name.removesuffix("()"))
            found = found(prefix="multibn_") if name.endswith("()") else found
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"MXNet {mxnet.__version__} has no {module}.{names}, without which multibn_mxnet cannot {PARTS[place]}. "
            "Install the release that multibn is tested with: pip install 'mxnet==1.9.1'."
        ) from error
    return found


for _place in PARTS:
    part(_place)

LIB = import_module("mxnet.base")._LIB
"""MXNet's C API."""
NULL, ADD = 0, 3
"""MXNet's write requests (``OpReqType``) not to write an array, and to add to it; any other overwrites it."""
NDArrayHandle = part("mxnet.base:NDArrayHandle")
check_call = part("mxnet.base:check_call")
DeferredInitializationError = part("mxnet.gluon.parameter:DeferredInitializationError")
DLContext, DLDataType, DLTensor = (part(f"mxnet.ndarray.ndarray:{name}") for name in ("DLContext", "DLDataType", "DLTensor"))
