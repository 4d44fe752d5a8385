"""Read the files of a folder that a stranger filled: regular files below it only, of limited size, as JSON or as an array."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from multibn.layer.types import Array

MOST_JSON = 32 << 20
"""Bytes of a JSON file; parsed it takes about ten times as much memory."""

MOST_VALUES = 1 << 24
"""Values of an array, about a hundred times as many as the largest right answer has."""

TYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
"""Types that an array may have."""

_MOST_AXES = 32


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file of the folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file below the folder, too large, or not JSON.
    """
    text = _read(folder, name, MOST_JSON)
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("is not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None


def read_array(given: object, folder: Path) -> Array:
    """An array as an answer describes it; ``file`` is looked up in the folder.

    Raises:
        ValueError: it is not described as ``answer.schema.json`` says, or too large.
    """
    if not isinstance(given, Mapping) or not {"dtype", "shape"} <= {*given} or not {"values", "file"} & {*given}:
        raise ValueError('must be null or {"dtype": "float32", "shape": [2, 3], "values": ["0x1.8p+1", ...]}.')
    dtype, shape = given["dtype"], given["shape"]
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise ValueError(f"unknown dtype {_short(dtype)}; choose from {', '.join(TYPES)}.")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"shape must be a list of at most {_MOST_AXES} integers >= 0, got {_short(shape)}.")
    size = math.prod(shape)
    if size > MOST_VALUES or max(shape, default=0) > MOST_VALUES:
        raise ValueError(f"shape {_short(shape)} has more than {MOST_VALUES} values.")
    if "file" in given:
        return _from_file(folder, given["file"], np.dtype(dtype), tuple(shape), size)
    values = given["values"]
    if not isinstance(values, list):
        raise ValueError(f"values must be a list of numbers, got {type(values).__name__}.")
    if len(values) != size:
        raise ValueError(f"{len(values)} values for shape {tuple(shape)}, which has {size}.")
    with np.errstate(all="ignore"):
        return np.array([_number(each) for each in values], np.float64).astype(dtype).reshape(shape)


def _from_file(folder: Path, name: object, dtype: np.dtype[Any], shape: tuple[int, ...], size: int) -> Array:
    if not isinstance(name, str):
        raise ValueError(f"file must be the name of a file, got {_short(name)}.")
    try:
        data = _read(folder, name, size * dtype.itemsize)
    except FileNotFoundError:
        raise ValueError(f"no file {_short(name)}.") from None
    except ValueError as error:
        raise ValueError(f"file {_short(name)} {error}.") from None
    if len(data) != size * dtype.itemsize:
        raise ValueError(f"file {_short(name)} has {len(data)} bytes for shape {shape}, which has {size * dtype.itemsize}.")
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def _read(folder: Path, name: str, most: int) -> bytes:
    """The bytes of a regular file below the folder. Nothing else is opened to be read: a FIFO or a device would block."""
    if "\0" in name:
        raise ValueError("cannot be read: a name has no NUL")
    try:
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder.resolve()):
            raise ValueError("lies outside the folder of the answers")
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("is not a regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size > most:
                raise ValueError(f"has {size} bytes, more than {most}")
            return file.read(most)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _number(value: object) -> float:
    """A JSON number, or a text such as ``0x1.8p+1``, ``3.0``, ``nan`` or ``-inf``."""
    try:
        if isinstance(value, str):
            return float.fromhex(value) if "x" in value.lower() else float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{_short(value)} is not a number.")


def _short(value: object) -> str:
    """A value for a message: its beginning, if it is long, or its type, if it holds others."""
    if isinstance(value, (str, bool, float)) or value is None:
        return repr(value)[:80]
    if isinstance(value, list) and len(value) <= _MOST_AXES and all(type(each) is int and abs(each) < 1 << 70 for each in value):
        return repr(value)
    return f"{value}" if type(value) is int and abs(value) < 1 << 70 else f"a value of type {type(value).__name__}"
