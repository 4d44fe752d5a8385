"""Read and write MXNet's ``.params`` files with NumPy alone.

Such a file is what ``mx.nd.save`` writes (src/ndarray/ndarray.cc of MXNet 1.9.1, NDArray::Save and Load): little endian; uint64
0x112, uint64 0, uint64 number of arrays, the arrays, uint64 number of names, the names (uint64 length, UTF-8). An array is

- V2 and V3 (magic numbers 0xF993FAC9 and 0xF993FACA): int32 storage type, int32 number of dimensions, an int64 each;
- V1 (0xF993FAC8): int32 number of dimensions, an int64 each;
- before that (2015 to 2017) no magic number: uint32 number of dimensions, a uint32 each;

and then int32 device type, int32 device id, int32 type flag, and the values. Only V3, written under NumPy semantics, has scalars
(no dimensions) and arrays without values; elsewhere both stand for an array that was never allocated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import numpy as np

from multibn.layer.types import Array

from .errors import PortError

Version = Literal["legacy", "V1", "V2", "V3"]

LIST: Final = 0x112
MAGIC: Final[Mapping[int, Version]] = {0xF993FAC8: "V1", 0xF993FAC9: "V2", 0xF993FACA: "V3"}
TYPES: Final = ("<f4", "<f8", "<f2", "|u1", "<i4", "|i1", "<i8", "|b1", "<i2", "<u2", "<u4", "<u8")
"""Type flag of MXNet 1.9 -> NumPy's type; BFLOAT16 is another flag."""
BFLOAT16: Final = 12
DEVICES: Final = (1, 2, 3, 5)
"""CPU, GPU, pinned memory, shared memory."""
MAX_DIMENSIONS: Final = 32
"""Largest number of dimensions in NumPy."""


class ParamsError(PortError):
    """The file is not a readable list of arrays, or the arrays cannot be written as one."""


@dataclass(frozen=True)
class Layout:
    """How a file stores an array, apart from its values, shape and type.

    Args:
        version: of the format.
        device: type and id of the device that the array was on.
        bfloat16: stored as bfloat16, which NumPy lacks; the values are returned as float32, which holds them exactly.
    """

    version: Version = "V2"
    device: tuple[int, int] = (1, 0)
    bfloat16: bool = False


class Params(dict[str, Array]):
    """The arrays of a file by name, in the file's order.

    Args:
        arrays: name -> array.
        layouts: name -> how the file stored it, so that ``save_params`` writes the same bytes.
        named: whether the file has names; otherwise they are "0", "1" and so on.
    """

    def __init__(
        self, arrays: Mapping[str, Array] | None = None, layouts: Mapping[str, Layout] | None = None, named: bool = True
    ) -> None:
        super().__init__(arrays or {})
        self.layouts, self.named = dict(layouts or {}), named


def load_params(path: str | Path) -> Params:
    """Load the arrays of a ``.params`` file, with the same bits as ``mx.nd.load``.

    Sizes are checked against the length of the file before allocating, so that the memory is proportional to that length.

    Raises:
        ParamsError: the file is of another format, truncated, damaged or sparse, or has an array that was never allocated. The
            message gives the position in the file.
        OSError: the file cannot be read.
    """
    return parse_params(Path(path).read_bytes(), str(path))


def parse_params(data: bytes, name: str) -> Params:
    """Load the arrays from a file's content; ``name`` is for messages."""
    if data.startswith(b"version https://git-lfs"):
        raise ParamsError(f"{name} is a Git LFS pointer, not the arrays themselves. Run `git lfs pull` in its repository.")
    if data.startswith(b"PK\x03\x04"):
        raise ParamsError(f"{name} is a zip archive, as MXNet 2 writes. Read it with numpy.load, and write it with save_params.")
    return _Reader(data, name).read()


def save_params(path: str | Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays as ``mx.nd.load`` and Gluon's ``load_parameters`` read them.

    Args:
        path: the file; not written if an array cannot be stored.
        arrays: name -> array. Arrays of ``load_params`` are written in their stored layout, so that an unchanged file is the same
            byte for byte; others as V2 on the CPU, or as V3 if one of them is a scalar or has no values.

    Raises:
        ParamsError: a type that MXNet does not have, or an array that its layout cannot hold.
    """
    Path(path).write_bytes(format_params(arrays))


def format_params(arrays: Mapping[str, Array]) -> bytes:
    """Return the content of the file."""
    layouts = arrays.layouts if isinstance(arrays, Params) else {}
    named = arrays.named if isinstance(arrays, Params) else True
    default = Layout("V3" if any(not a.ndim or not a.size for a in map(np.asarray, arrays.values())) else "V2")
    parts = [struct.pack("<QQQ", LIST, 0, len(arrays))]
    parts += [_format_array(name, np.asarray(array), layouts.get(name, default)) for name, array in arrays.items()]
    names = [name.encode() for name in arrays] if named else []
    parts.append(struct.pack("<Q", len(names)))
    parts += [struct.pack("<Q", len(name)) + name for name in names]
    return b"".join(parts)


def _format_array(name: str, array: Array, layout: Layout) -> bytes:
    kind = array.dtype.newbyteorder("<").str
    if kind not in TYPES:
        raise ParamsError(f"{name}: MXNet has no type {array.dtype}. Convert the array to float32 first.")
    flag, values = TYPES.index(kind), array.astype(kind, copy=False)
    if layout.bfloat16:
        if kind != "<f4" or (values.view("<u4") & 0xFFFF).any():
            raise ParamsError(
                f"{name} was stored as bfloat16, which does not hold its new values. Give them as a plain dict to write float32."
            )
        flag, values = BFLOAT16, (values.view("<u4") >> 16).astype("<u2")
    if layout.version != "V3" and (not array.ndim or not array.size):
        raise ParamsError(f"{name}: version {layout.version} of the format holds no array of shape {array.shape}. Use V3.")
    version = next((magic for magic, its in MAGIC.items() if its == layout.version), None)
    head = b"" if version is None else struct.pack("<I", version)
    head += struct.pack("<i", 0) if layout.version in ("V2", "V3") else b""
    head += struct.pack(f"<I{array.ndim}{'I' if version is None else 'q'}", array.ndim, *array.shape)
    return head + struct.pack("<iii", *layout.device, flag) + values.tobytes()


class _Reader:
    """The content of a file, with a position."""

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.at, self.name = memoryview(data), 0, name

    def fail(self, why: str) -> NoReturn:
        raise ParamsError(f"{self.name}: at byte {self.at} of {len(self.data)}: {why}")

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> memoryview:
        if count > self.left:
            self.fail(f"{what} needs {count} bytes, {self.left} are left. The file is cut short or damaged; fetch it again.")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str) -> int:
        value: int = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), what))[0]
        return value

    def read(self) -> Params:
        if self.number("Q", "the header") != LIST:
            self.at = 0
            self.fail(
                f"this is no list of arrays of MXNet: it begins with {bytes(self.data[:8]).hex()}, not 1201000000000000. "
                "Give the .params file."
            )
        if self.number("Q", "the header") != 0:
            self.fail("the reserved word of the header is not 0. The file is damaged; fetch it again.")
        count = self.count("arrays", 21)  # least size of an array in bytes
        read = [self.array(f"array {i}") for i in range(count)]
        named = self.count("names", 8)
        if named not in (0, count):
            self.fail(f"{named} names for {count} arrays. The file is damaged; fetch it again.")
        names = [self.text(f"name {i}") for i in range(named)] if named else [str(i) for i in range(count)]
        if self.left:
            self.fail(f"{self.left} bytes after the last name. The file is damaged; fetch it again.")
        arrays: dict[str, Array] = {}
        layouts: dict[str, Layout] = {}
        for name, (values, layout) in zip(names, read, strict=True):
            if name in arrays:
                self.fail(f"the name {name!r} is there twice. The file is damaged; fetch it again.")
            arrays[name], layouts[name] = values, layout
        return Params(arrays, layouts, named=bool(named) or not count)

    def count(self, what: str, least: int) -> int:
        count = self.number("Q", f"the number of {what}")
        if count * least > self.left:
            self.fail(f"{count} {what} do not fit in {self.left} bytes. The file is cut short or damaged; fetch it again.")
        return count

    def text(self, who: str) -> str:
        raw = bytes(self.take(self.number("Q", f"the length of {who}"), who))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{who} is not UTF-8. The file is damaged; fetch it again.")

    def array(self, who: str) -> tuple[Array, Layout]:
        first = self.number("I", who)
        version: Version = MAGIC.get(first, "legacy")
        if version in ("V2", "V3") and (storage := self.number("i", who)) != 0:
            self.fail(
                f"{who} is sparse (storage type {storage}); only dense arrays are read. In MXNet: "
                "array.tostype('default'), then save again."
            )
        shape = self.shape(who, version, first if version == "legacy" else self.number("i", who))
        device = self.number("i", who), self.number("i", who)
        if device[0] not in DEVICES:
            self.fail(f"{who} has device type {device[0]}, not one of {DEVICES}. The file is damaged; fetch it again.")
        flag = self.number("i", who)
        if not 0 <= flag <= BFLOAT16:
            self.fail(f"{who} has type flag {flag}; MXNet 1.9's are 0 to {BFLOAT16}. The file is damaged; fetch it again.")
        kind = np.dtype("<u2" if flag == BFLOAT16 else TYPES[flag])
        raw = self.take(math.prod(shape) * kind.itemsize, f"{who} of shape {shape}")  # Python's integers cannot overflow
        values: Any = np.frombuffer(raw, kind) if len(raw) else np.empty(0, kind)
        if flag == BFLOAT16:
            values = (values.astype("<u4") << 16).view("<f4")
        try:
            values = values.reshape(shape).astype(values.dtype.newbyteorder("="))
        except ValueError:
            self.fail(f"{who} has shape {shape}, which NumPy cannot hold.")
        return values, Layout(version, device, flag == BFLOAT16)

    def shape(self, who: str, version: Version, ndim: int) -> tuple[int, ...]:
        if version == "legacy" and ndim > MAX_DIMENSIONS:
            self.fail(f"{who} begins with {ndim:#x}, which is no magic number of MXNet. The file is damaged; fetch it again.")
        if not -1 <= ndim <= MAX_DIMENSIONS:
            self.fail(f"{who} has {ndim} dimensions, not 0 to {MAX_DIMENSIONS}. The file is damaged; fetch it again.")
        form = f"<{max(ndim, 0)}{'I' if version == 'legacy' else 'q'}"
        shape = struct.unpack(form, self.take(struct.calcsize(form), f"the shape of {who}"))
        if any(size < 0 for size in shape):
            self.fail(f"{who} has the negative size of {shape}. The file is damaged; fetch it again.")
        if ndim < 0 or (version != "V3" and (ndim == 0 or 0 in shape)):
            self.fail(
                f"{who} was never allocated, or the file is damaged. In MXNet, initialize the network, run it and save it again."
            )
        return shape
