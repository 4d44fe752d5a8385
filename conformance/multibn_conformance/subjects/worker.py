"""The process that a subject from outside runs in. It needs Python 3.8 and NumPy, nothing of this project.

``python worker.py package.module:make device reads writes`` answers requests from the pipe ``reads`` into the pipe ``writes``.
What the subject prints goes elsewhere. A message is a length, JSON of that length, and the bytes of its arrays.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import platform
import struct
import sys
from typing import Any, BinaryIO

import numpy as np

FRAMEWORKS = ("torch", "mxnet", "tensorflow", "keras", "jax", "flax", "haiku", "equinox", "onnx", "onnxruntime", "paddle")
"""Whose versions are told, if the subject has loaded them."""


class Other:
    """An answer that is no array, None or tuple of these: only the name of its type travels."""

    def __init__(self, name: str) -> None:
        self.name = name


def send(pipe: BinaryIO, value: Any) -> None:
    """Write one message: None, truths, numbers, strings, lists, tuples, dicts by string, and arrays, whose strides are kept."""
    buffers = []  # type: list[bytes]
    text = json.dumps(_encoded(value, buffers)).encode()
    pipe.write(struct.pack("<Q", len(text)) + text)
    for buffer in buffers:
        pipe.write(buffer)
    pipe.flush()


def receive(pipe: BinaryIO) -> Any:
    """Read one message; EOFError if there is none, or not all of it."""
    (length,) = struct.unpack("<Q", _exactly(pipe, 8))
    return _decoded(json.loads(_exactly(pipe, length)), pipe)


def _exactly(pipe: BinaryIO, count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _encoded(value: Any, buffers: list[bytes]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is dict:
        return {"dict": {key: _encoded(each, buffers) for key, each in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encoded(each, buffers) for each in value]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        buffers.append(value.tobytes())
        return {"array": [value.dtype.str, value.shape, value.strides, len(buffers[-1])]}
    return {"other": f"ndarray of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__}


def _decoded(value: Any, pipe: BinaryIO) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _decoded(each, pipe) for key, each in content.items()}
    if kind in ("list", "tuple"):
        made = [_decoded(each, pipe) for each in content]
        return made if kind == "list" else tuple(made)
    if kind == "array":
        dtype, shape, strides, length = content
        return _laid_out(np.frombuffer(_exactly(pipe, length), dtype).reshape(shape), strides)
    return Other(content)


def _laid_out(values: Any, strides: list[int]) -> Any:
    """The values in memory of their own, with these strides, where each has its own place."""
    if values.size == 0 or any(step == 0 and n > 1 for n, step in _pairs(values.shape, strides)):
        return values.copy()
    reach = [(n - 1) * step for n, step in _pairs(values.shape, strides)]
    before = -sum(step for step in reach if step < 0)
    memory = np.zeros(before + sum(step for step in reach if step > 0) + values.itemsize, np.uint8)
    made = np.ndarray(values.shape, values.dtype, memory.data, before, strides)  # type: Any
    made[...] = values
    return made


def _pairs(shape: Any, strides: Any) -> Any:
    return [(shape[i], strides[i]) for i in range(len(shape))]


def spec_of(values: dict[str, Any] | None) -> Any:
    """A BatchNormSpec of the multibn that is installed here; if none is, a named tuple with the same attributes."""
    if values is None:
        return None
    try:
        from multibn.spec.batchnorm import BatchNormSpec
    except ImportError:
        return collections.namedtuple("BatchNormSpec", list(values))(**values)
    return BatchNormSpec(**values)


def found(name: str) -> Any:
    """What ``package.module:make`` names. ImportError or AttributeError if it does not."""
    module, _, path = name.partition(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    if not callable(value):
        raise AttributeError(f"{name} is not callable, but {type(value).__name__}")
    return value


BACKEND = "@"
"""What a name begins with that is a backend's: an entry point of the group ``multibn.backends``, which needs multibn."""


def backend(name: str) -> Any:
    """The backend that is registered by this name. ImportError, or what its import raises, if it cannot be loaded."""
    from importlib.metadata import entry_points

    points = entry_points(group="multibn.backends", name=name)  # type: Any
    for point in points:
        return point.load()
    raise ImportError(f"no backend {name!r} is registered")


def described(its: Any) -> dict[str, Any]:
    """A backend's fields, apart from its functions."""
    return {
        "versions": dict(its.versions),
        "implementations": dict(its.implementations),
        "devices": list(its.devices()),
        "whitens": its.whitening is not None,
        "no_whitening": list(its.no_whitening),
        "title": its.title,
        "exact_on": list(its.exact_on),
    }


def made_by(its: Any, num_features: int, spec: dict[str, Any], kind: str, device: str, implementation: str) -> Any:
    """A backend's subject."""
    if kind == "make":
        return its.make(num_features, spec_of(spec), device, implementation)
    from multibn.whitening.spec import WhiteningSpec

    return its.whitening(num_features, WhiteningSpec(**spec), device, implementation)


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), "NumPy": np.__version__}
    for name in FRAMEWORKS:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            versions[name] = str(version)
    return versions


def serve(name: str, device: str, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the requests end. An answer is {"returned", "changed": the arrays of the call if the subject wrote into them}
    or {"raised": name of the class, message, whether it is an Exception: SystemExit is none}.
    """
    its = None
    try:
        if name.startswith(BACKEND):
            its = backend(name[len(BACKEND) :])
        else:
            make = found(name)
    except BaseException as error:
        send(answers, {"raised": _told(error)})
        return
    send(answers, {"returned": _versions()})
    subjects = {}  # type: dict[int, Any]
    while True:
        try:
            method, arguments, number = receive(requests)
        except EOFError:
            return
        before = [a.copy() if isinstance(a, np.ndarray) else None for a in arguments]
        try:
            with np.errstate(all="ignore"):
                if method == "make":
                    for gone in arguments[2]:
                        subjects.pop(gone, None)
                    if its is None:
                        subjects[number] = make(arguments[0], spec_of(arguments[1]), device)
                    else:
                        subjects[number] = made_by(its, *arguments[:2], *arguments[3:])
                    returned = None
                elif method == "versions":
                    returned = _versions()
                elif method == "describe":
                    returned = described(its)
                else:
                    returned = getattr(subjects[number], method)(*arguments)
            answer = {"returned": returned}  # type: dict[str, Any]
        except BaseException as error:
            answer = {"raised": _told(error)}
        if any(old is not None and old.tobytes() != arguments[i].tobytes() for i, old in enumerate(before)):
            answer["changed"] = arguments
        send(answers, answer)


def _told(error: BaseException) -> list[Any]:
    try:
        return [type(error).__name__, str(error), isinstance(error, Exception)]
    except Exception:
        return [type(error).__name__, "(its message cannot be read)", True]


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # instead of this file's folder, whose modules are none of the subject's
    fds = [int(each) for each in sys.argv[3:5]]
    for fd in fds:
        os.set_inheritable(fd, False)
    serve(sys.argv[1], sys.argv[2], open(fds[0], "rb"), open(fds[1], "wb"))  # noqa: SIM115
