"""`.params` files: the bits that MXNet reads, the bytes that it writes, and what is refused."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from port_checkpoints import mxnet

from multibn.port import Params, ParamsError, load_params, save_params
from multibn.port.params import MAGIC, Layout, format_params, parse_params

HEADER = struct.pack("<QQQ", 0x112, 0, 1)
FOOTER = struct.pack("<QQ", 1, 1) + b"w"
FLOATS = np.array([[1.5, -2.0, 0.25], [np.pi, -0.0, 3e-42]], np.float32)
V2 = next(magic for magic, version in MAGIC.items() if version == "V2")

ONE = {
    "legacy": struct.pack("<IIIiii", 2, 2, 3, 1, 0, 0) + FLOATS.tobytes(),
    "V1": struct.pack("<Iiqqiii", 0xF993FAC8, 2, 2, 3, 1, 0, 0) + FLOATS.tobytes(),
    "V2": struct.pack("<Iiiqqiii", 0xF993FAC9, 0, 2, 2, 3, 1, 0, 0) + FLOATS.tobytes(),
    "V3": struct.pack("<Iiiqqiii", 0xF993FACA, 0, 2, 2, 3, 1, 0, 0) + FLOATS.tobytes(),
}
"""The same array in each version of the format, as MXNet's source writes it."""


def file(array: bytes = ONE["V2"], header: bytes = HEADER, footer: bytes = FOOTER) -> bytes:
    return header + array + footer


def damaged(at: int, form: str, *values: int) -> bytes:
    """The V2 file with numbers overwritten."""
    raw = bytearray(file())
    struct.pack_into(f"<{form}", raw, at, *values)
    return bytes(raw)


def same(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


@pytest.mark.parametrize("version", ONE)
def test_each_version_is_read_and_rewritten_byte_for_byte(tmp_path: Path, version: str) -> None:
    (tmp_path / "a.params").write_bytes(file(ONE[version]))
    read = load_params(tmp_path / "a.params")
    assert same(read["w"], FLOATS)
    assert read.layouts["w"].version == version
    save_params(tmp_path / "b.params", read)
    assert (tmp_path / "b.params").read_bytes() == file(ONE[version])


@pytest.mark.parametrize("version", ["legacy", "V1", "V2"])
def test_each_version_has_the_bits_that_mxnet_reads(tmp_path: Path, version: str) -> None:
    mx = mxnet()
    (tmp_path / "a.params").write_bytes(file(ONE[version]))
    assert same(load_params(tmp_path / "a.params")["w"], mx.nd.load(str(tmp_path / "a.params"))["w"].asnumpy())


def test_v3_has_the_bits_that_mxnet_writes(tmp_path: Path) -> None:
    mx = mxnet()
    path = tmp_path / "a.params"
    with mx.util.np_shape(True):
        mx.nd.save(
            str(path),
            {"scalar": mx.nd.array(FLOATS).sum().reshape(()), "plain": mx.nd.array(FLOATS), "none": mx.nd.zeros((2, 0))},
        )
        wanted = {name: array.asnumpy() for name, array in mx.nd.load(str(path)).items()}
    read = load_params(path)
    assert {name: layout.version for name, layout in read.layouts.items()} == dict.fromkeys(wanted, "V3")
    assert all(same(read[name], wanted[name]) for name in wanted)
    assert (read["scalar"].shape, read["none"].shape) == ((), (2, 0))
    assert format_params(read) == path.read_bytes()


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool"])
def test_each_type_has_the_bits_that_mxnet_writes(tmp_path: Path, kind: str) -> None:
    mx = mxnet()
    path = tmp_path / "a.params"
    mx.nd.save(
        str(path), {"arg:w": mx.nd.array(np.arange(6).reshape(2, 3)).astype(kind), "aux:v": mx.nd.array([1, 0]).astype(kind)}
    )
    read, wanted = load_params(path), mx.nd.load(str(path))
    assert list(read) == list(wanted)
    assert all(same(read[name], wanted[name].asnumpy()) for name in wanted)
    assert format_params(read) == path.read_bytes()
    (tmp_path / "plain.params").write_bytes(format_params(dict(read)))
    assert all(same(array.asnumpy(), read[name]) for name, array in mx.nd.load(str(tmp_path / "plain.params")).items())


def test_bfloat16_has_the_bits_that_mxnet_writes(tmp_path: Path) -> None:
    mx = mxnet()
    path = tmp_path / "a.params"
    kind = np.dtype([("bfloat16", np.uint16)])
    mx.nd.save(str(path), {"w": mx.nd.amp_cast(mx.nd.array([1.5, -2, 3.140625]), dtype=kind)})
    read = load_params(path)
    assert read.layouts["w"] == Layout(bfloat16=True)
    assert read["w"].tolist() == [1.5, -2, 3.140625]
    assert ((read["w"].view("<u4") >> 16) == mx.nd.load(str(path))["w"].asnumpy().view(np.uint16)).all()
    assert format_params(read) == path.read_bytes()


def test_a_list_without_names_stays_one(tmp_path: Path) -> None:
    mx = mxnet()
    path = tmp_path / "a.params"
    mx.nd.save(str(path), [mx.nd.array([1, 2]), mx.nd.array([3])])
    read = load_params(path)
    assert not read.named
    assert {name: array.tolist() for name, array in read.items()} == {"0": [1, 2], "1": [3]}
    assert format_params(read) == path.read_bytes()


def test_the_device_is_kept() -> None:
    raw = damaged(24 + 4 + 4 + 4 + 16, "ii", 2, 3)
    read = parse_params(raw, "a.params")
    assert read.layouts["w"].device == (2, 3)
    assert format_params(read) == raw


def test_an_empty_file_of_arrays_is_read() -> None:
    assert parse_params(struct.pack("<QQQQ", 0x112, 0, 0, 0), "a.params") == {}


def test_a_changed_array_is_written_as_it_is() -> None:
    read = parse_params(file(ONE["legacy"]), "a.params")
    read["w"] = read["w"] + 1
    assert same(parse_params(format_params(read), "b.params")["w"], FLOATS + 1)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for arrays, message in {
        "complex": ({"w": np.zeros(2, np.complex64)}, "w: MXNet has no type complex64. Convert the array to float32 first."),
        "scalar": (
            Params({"w": np.float32(1)}, {"w": Layout("V2")}), "w: version V2 of the format holds no array of shape (). Use V3.",  # type: ignore[dict-item]
        ),
        "bfloat16": (
            Params({"w": FLOATS}, {"w": Layout(bfloat16=True)}),
            "w was stored as bfloat16, which does not hold its new values. Give them as a plain dict to write float32.",
        ),
    }.values():  # fmt: skip
        with pytest.raises(ParamsError) as error:
            save_params(tmp_path / "a.params", arrays)
        assert str(error.value) == message
        assert not (tmp_path / "a.params").exists()


CUT = "The file is cut short or damaged; fetch it again."
DAMAGED = "The file is damaged; fetch it again."
NEVER = "was never allocated, or the file is damaged. In MXNet, initialize the network, run it and save it again."
REFUSED = {
    "nothing": (b"", f"at byte 0 of 0: the header needs 8 bytes, 0 are left. {CUT}"),
    "text": (
        b"hello world, this is not it",
        "at byte 0 of 27: this is no list of arrays of MXNet: it begins with 68656c6c6f20776f, not 1201000000000000. "
        "Give the .params file.",
    ),
    "reserved word": (damaged(8, "Q", 7), f"at byte 16 of 105: the reserved word of the header is not 0. {DAMAGED}"),
    "half": (file()[:60], f"at byte 60 of 60: array 0 needs 4 bytes, 0 are left. {CUT}"),
    "values cut": (file()[:70], f"at byte 64 of 70: array 0 of shape (2, 3) needs 24 bytes, 6 are left. {CUT}"),
    "one byte short": (file()[:-1], f"at byte 104 of 104: name 0 needs 1 bytes, 0 are left. {CUT}"),
    "one byte more": (file() + b"x", f"at byte 105 of 106: 1 bytes after the last name. {DAMAGED}"),
    "count 2**60": (damaged(16, "Q", 2**60), f"at byte 24 of 105: {2**60} arrays do not fit in 81 bytes. {CUT}"),
    "one array more": (damaged(16, "Q", 2), f"at byte 96 of 105: array 1 {NEVER}"),
    "names 2**60": (damaged(88, "Q", 2**60), f"at byte 96 of 105: {2**60} names do not fit in 9 bytes. {CUT}"),
    "name of 2**63 bytes": (damaged(96, "Q", 2**63), f"at byte 104 of 105: name 0 needs {2**63} bytes, 1 are left. {CUT}"),
    "name not UTF-8": (damaged(104, "B", 255), f"at byte 105 of 105: name 0 is not UTF-8. {DAMAGED}"),
    "dimensions -5": (damaged(32, "i", -5), f"at byte 36 of 105: array 0 has -5 dimensions, not 0 to 32. {DAMAGED}"),
    "dimensions 2**30": (damaged(32, "i", 2**30), f"at byte 36 of 105: array 0 has {2**30} dimensions, not 0 to 32. {DAMAGED}"),
    "size -3": (damaged(36, "q", -3), f"at byte 52 of 105: array 0 has the negative size of (-3, 3). {DAMAGED}"),
    "size 2**62": (
        damaged(36, "q", 2**62), f"at byte 64 of 105: array 0 of shape ({2**62}, 3) needs {3 * 2**64} bytes, 41 are left. {CUT}",
    ),
    "sizes 2**33": (
        damaged(36, "qq", 2**33, 2**33),
        f"at byte 64 of 105: array 0 of shape ({2**33}, {2**33}) needs {2**68} bytes, 41 are left. {CUT}",
    ),
    "never allocated": (
        damaged(36, "q", 0),
        f"at byte 52 of 105: array 0 {NEVER}",
    ),
    "type 99": (damaged(60, "i", 99), f"at byte 64 of 105: array 0 has type flag 99; MXNet 1.9's are 0 to 12. {DAMAGED}"),
    "device 77": (damaged(52, "i", 77), f"at byte 60 of 105: array 0 has device type 77, not one of (1, 2, 3, 5). {DAMAGED}"),
    "magic": (
        damaged(24, "I", 0x12345678),
        f"at byte 28 of 105: array 0 begins with 0x12345678, which is no magic number of MXNet. {DAMAGED}",
    ),
    "sparse": (
        damaged(28, "i", 1),
        "at byte 32 of 105: array 0 is sparse (storage type 1); only dense arrays are read. In MXNet: array.tostype('default'), "
        "then save again.",
    ),
    "too large for NumPy": (
        HEADER + struct.pack("<Iiiqqiii", 0xF993FACA, 0, 2, 2**62, 0, 1, 0, 0) + FOOTER,
        f"at byte 64 of 81: array 0 has shape ({2**62}, 0), which NumPy cannot hold.",
    ),
    "a name twice": (
        struct.pack("<QQQ", 0x112, 0, 2) + ONE["V2"] * 2 + struct.pack("<Q", 2) + FOOTER[8:] * 2,
        f"at byte 178 of 178: the name 'w' is there twice. {DAMAGED}",
    ),
    "names missing": (
        struct.pack("<QQQ", 0x112, 0, 2) + ONE["V2"] * 2 + FOOTER,
        f"at byte 160 of 169: 1 names for 2 arrays. {DAMAGED}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_file_is_refused_in_little_memory(case: str) -> None:
    raw, message = REFUSED[case]
    tracemalloc.start()
    try:
        with pytest.raises(ParamsError) as error:
            parse_params(raw, "a.params")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert str(error.value) == f"a.params: {message}"


def test_sparse_arrays_of_mxnet_are_refused(tmp_path: Path) -> None:
    mx = mxnet()
    path = tmp_path / "a.params"
    mx.nd.save(str(path), {"w": mx.nd.sparse.row_sparse_array(([[1, 2]], [1]), shape=(3, 2))})
    with pytest.raises(ParamsError, match="array 0 is sparse"):
        load_params(path)


def test_other_files_are_refused_by_what_they_are() -> None:
    with pytest.raises(ParamsError) as error:
        parse_params(b"version https://git-lfs.github.com/spec/v1\noid sha256:97\nsize 1\n", "a.params")
    assert str(error.value) == "a.params is a Git LFS pointer, not the arrays themselves. Run `git lfs pull` in its repository."
    with pytest.raises(ParamsError) as error:
        parse_params(b"PK\x03\x04....", "a.params")
    assert str(error.value) == (
        "a.params is a zip archive, as MXNet 2 writes. Read it with numpy.load, and write it with save_params."
    )


def test_damage_anywhere_gives_arrays_or_an_error() -> None:
    """A small share of tests/fuzz_port.py."""
    from fuzz_port import params_files

    outcomes = {True: 0, False: 0}
    for raw in params_files(random.Random(0), 3000):
        try:
            read = parse_params(raw, "a.params")
        except ParamsError:
            outcomes[False] += 1
        else:
            assert sum(array.nbytes for array in read.values()) <= 2 * len(raw)
            assert parse_params(format_params(read), "b.params").keys() == read.keys()
            outcomes[True] += 1
    assert min(outcomes.values()) > 50
