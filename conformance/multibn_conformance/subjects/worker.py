"""The process that an external subject runs in. It needs Python 3.8 and NumPy, and nothing of this project.

``python worker.py package.module:make device reads writes`` answers requests from the pipe ``reads`` into the pipe ``writes``.
What the subject prints goes elsewhere. A message is a length, JSON of that length, and the bytes of its arrays.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib
import json
import os
import platform
import struct
import sys
from typing import Any, BinaryIO

import numpy as np

FRAMEWORKS = ("torch", "mxnet", "tensorflow", "keras", "jax", "flax", "haiku", "equinox", "onnx", "onnxruntime", "paddle")
"""Frameworks whose versions are reported if the subject has imported them."""


LONGEST = 10000
"""Characters of an exception's message that are sent."""

MOST = 256 << 20
"""Bytes that an array may span in memory to be rebuilt with its strides."""


class Other:
    """The name of the type of an answer that is not an array, None, a number, text, or a list, tuple or dict of these."""

    def __init__(self, name: str) -> None:
        self.name = name


def send(pipe: Any, value: Any) -> None:
    """Write one message: None, booleans, numbers, strings, lists, tuples, dicts by string, and arrays, whose strides are kept.

    Nothing is written where the value cannot be encoded, which raises an exception.
    """
    buffers = []  # type: list[bytes]
    text = json.dumps(_encoded(value, buffers)).encode()
    pipe.write(struct.pack("<Q", len(text)) + text)
    for buffer in buffers:
        pipe.write(buffer)
    pipe.flush()


def receive(pipe: Any) -> Any:
    """Read one message. Raise EOFError if there is none, or only a part of it; other exceptions for what is not a message."""
    (length,) = struct.unpack("<Q", _exactly(pipe, 8))
    return _decoded(json.loads(_exactly(pipe, length)), pipe)


def _exactly(pipe: Any, count: int) -> bytes:
    data = pipe.read(count)  # type: bytes
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
    if isinstance(value, np.ndarray):
        a = np.asarray(value)  # not of a subclass, which may pretend anything
        if a.dtype.kind in "biufc":
            buffers.append(a.tobytes())
            return {"array": [a.dtype.str, a.shape, a.strides, len(buffers[-1])]}
        return {"other": f"ndarray of {a.dtype}"}
    return {"other": value.name if isinstance(value, Other) else type(value).__name__}


def _decoded(value: Any, pipe: Any) -> Any:
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
        if np.dtype(dtype).kind not in "biufc" or min(shape, default=0) < 0 or len(strides) != len(shape):
            raise ValueError("not an array")
        return _laid_out(np.frombuffer(_exactly(pipe, length), dtype).reshape(shape), strides)
    if kind == "other" and isinstance(content, str):
        return Other(content)
    raise ValueError("not a message")


def _laid_out(values: Any, strides: list[int]) -> Any:
    """The values in memory of their own, with these strides unless values would overlap or span more than ``MOST`` bytes."""
    if values.size == 0 or any(step == 0 and n > 1 for n, step in _pairs(values.shape, strides)):
        return values.copy()
    reach = [(n - 1) * step for n, step in _pairs(values.shape, strides)]
    if sum(abs(step) for step in reach) > MOST:
        return values.copy()
    before = -sum(step for step in reach if step < 0)
    memory = np.zeros(before + sum(step for step in reach if step > 0) + values.itemsize, np.uint8)
    made = np.ndarray(values.shape, values.dtype, memory.data, before, strides)  # type: Any
    made[...] = values
    return made


def _pairs(shape: Any, strides: Any) -> Any:
    return [(shape[i], strides[i]) for i in range(len(shape))]


def spec_of(values: dict[str, Any] | None) -> Any:
    """A BatchNormSpec if multibn is installed in this interpreter, else a named tuple with the same attributes."""
    if values is None:
        return None
    try:
        from multibn.spec.batchnorm import BatchNormSpec
    except ImportError:
        return collections.namedtuple("BatchNormSpec", list(values))(**values)
    return BatchNormSpec(**values)


def found(name: str) -> Any:
    """Import ``package.module:make``. Raise ImportError or AttributeError if that fails."""
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
    """Answer until the requests end.

    An answer is {"returned": a value} or {"raised": [name of the class, message, whether it is an Exception, unlike SystemExit]}.
    "changed" holds the arrays that the subject changed, of all that its calls were given so far: each by its number, as text.
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
    lent = {}  # type: dict[int, list[tuple[Any, bytes]]]
    while True:
        try:
            method, arguments, number = receive(requests)
        except EOFError:
            return
        given = lent.setdefault(number, [])
        given += [(a, a.tobytes()) for a in arguments if isinstance(a, np.ndarray)]
        try:
            with np.errstate(all="ignore"):
                if method == "make":
                    for gone in arguments[2]:
                        subjects.pop(gone, None)
                        lent.pop(gone, None)
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
        changed = {str(i): a for i, (a, before) in enumerate(given) if a.tobytes() != before}
        if changed:
            answer["changed"] = changed
        try:
            send(answers, answer)
        except OSError:
            raise
        except Exception:  # nested too deeply, in itself, an integer too long to print
            send(answers, {"returned": Other(type(answer["returned"]).__name__)})


def _told(error: BaseException) -> list[Any]:
    try:
        return [type(error).__name__, str(error)[:LONGEST], isinstance(error, Exception)]
    except Exception:
        return [type(error).__name__, "(its message cannot be read)", True]


def _adopt() -> None:
    """Let descendants that lose their parent become children of this process, so that they are found (Linux only)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # instead of this file's folder, whose modules are none of the subject's
    _adopt()
    fds = [int(each) for each in sys.argv[3:5]]
    for fd in fds:
        os.set_inheritable(fd, False)
    serve(sys.argv[1], sys.argv[2], open(fds[0], "rb"), open(fds[1], "wb"))  # noqa: SIM115
