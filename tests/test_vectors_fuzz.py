"""Hostile answers to vectors: each file, whatever its content, gets a judgement with one message; no file outside the folder is
read.

``MULTIBN_FUZZ=100000 pytest -s tests/test_vectors_fuzz.py`` tries more files; ``MULTIBN_FUZZ_SEED`` gives others.
``--basetemp`` on a file system in memory, such as ``/dev/shm/fuzz``, makes it several times faster.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from multibn.numpy_backend import ReferenceSubject
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.judging.judge import Judgement
from multibn_conformance.judging.perform import perform
from multibn_conformance.vectors import answers

COUNT = int(os.environ.get("MULTIBN_FUZZ", "1500"))
SEED = int(os.environ.get("MULTIBN_FUZZ_SEED", "0"))
NAMES = ("BN-01-rank-2-float32", "BN-04-no-scale-no-center", "BN-05-momentum-none", "BN-12-refuses-one-value-rank-2")
SECRET = "a secret outside of the folder"
DEEP = "[" * 100_000 + "]" * 100_000

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e400, float("nan"), "", "x", "nan", "-inf",
    "0x1p+9999999", "0xzz", "1e999999", "1_0", "\u0661", "\ud800", "\x1b[2J\x1b]0;t\x07", "\0", "a\nb", "9" * 5000, "y" * 100_000,
    [], [0], [-1], [1.5], [True], [2**32, 2**32], [10**30], [1] * 40, [[1]], ["1"], [[]] * 50, {}, {"a": 1}, [0] * 1000,
    "O", "V0", "S0", "U2000000000",
    "f4,f4", "c8", "M8[s]", "(1000000,1000000)f8", ">f4", "longdouble", "int8", "float64", "bool",
    "../secret.bin", "/etc/passwd", "/dev/zero", "fifo", ".", "..", "loop", "link", "sparse", "locked", "folder",
    "x" * 300, "a\0b",
]  # fmt: skip
"""Hostile in one place or another: as a number, a type, a shape, the name of a file or a whole part of the answer."""

KEYS = (
    "dtype",
    "shape",
    "values",
    "file",
    "raised",
    "y",
    "dx",
    "dgamma",
    "dbeta",
    "moving_mean",
    "moving_var",
    "steps",
    "case",
    "more",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of answers with files in it that must not be read."""
    made = tmp_path_factory.mktemp("answers") / "inside"
    made.mkdir()
    (made.parent / "secret.bin").write_text(SECRET)
    os.mkfifo(made / "fifo")
    (made / "loop").symlink_to("loop")
    (made / "link").symlink_to("../secret.bin")
    (made / "folder").mkdir()
    (made / "locked").write_bytes(b"\0" * 144)
    (made / "locked").chmod(0)
    with (made / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 40)
    return made


def right(name: str) -> dict[str, Any]:
    """Return the right answer to a case."""

    def told(a: Any) -> Any:
        return a if a is None else {"dtype": a.dtype.name, "shape": list(a.shape), "values": a.ravel().tolist()}

    case, steps = CASES[name], []
    moving: dict[str, Any] = {}

    class Shown(ReferenceSubject):
        def moving(self) -> Any:
            found = super().moving()
            moving.update(moving_mean=told(found[0]), moving_var=told(found[1]))
            return found

    with np.errstate(all="ignore"):
        for answer in perform(case, Shown):
            steps.append({**{each: told(a) for each, a in answer.arrays.items()}, **moving})
    return {"case": name, "steps": steps}


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container and key of a value; of long lists, the first ones only."""
    pairs = list(data.items()) if isinstance(data, dict) else list(enumerate(data[:4])) if isinstance(data, list) else []
    for key, value in pairs:
        yield data, key
        yield from places(value)


def hostile(draw: random.Random, data: dict[str, Any]) -> bytes:
    """Return the answer as text with a few changes, possibly damaged."""
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        container, key = draw.choice(list(places(data)) or [(data, "steps")])
        what = draw.random()
        if what < 0.6:
            container[key] = copy.deepcopy(draw.choice(VALUES))
        elif what < 0.8 and isinstance(container, dict):
            container[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
        elif what < 0.9:
            container.pop(key, None) if isinstance(container, dict) else container.pop(key)
        else:
            container[key] = copy.deepcopy(container)
    try:
        text = json.dumps(data if draw.random() < 0.98 else draw.choice(VALUES)).encode()
    except (ValueError, RecursionError):
        return b"{"
    damage = draw.random()
    if damage < 0.02:
        return text.replace(b"1", DEEP.encode(), 1)
    if damage < 0.2:
        at = draw.randrange(len(text))
        return text[:at] + draw.choice((b"", b"\xff", b"\0", b"[", b'"', b"{", b"9" * 5000, b"\xed\xa0\x80")) + text[at + 1 :]
    return text[: draw.randrange(len(text))] if damage < 0.25 else text


def judged(folder: Path, name: str) -> Judgement:
    return answers._judged(folder, CASES[name], "working", "multibn vectors check")


def test_the_answers_are_right_before_they_are_changed(folder: Path) -> None:
    for name in NAMES[:3]:
        (folder / f"{name}.json").write_text(json.dumps(right(name)))
        assert judged(folder, name).message == ""


def test_hostile_answers_get_one_message(folder: Path) -> None:
    draw, started, before = random.Random(SEED), time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = {name: right(name) for name in NAMES}
    failed = 0
    for number in range(COUNT):
        if number % 5000 == 4999:
            print(f"{number + 1} files", flush=True)
        name = draw.choice(NAMES)
        text = hostile(draw, whole[name])
        (folder / f"{name}.json").write_bytes(text)
        told = judged(folder, name)
        assert told.status in ("pass", "fail"), text
        assert told.message.startswith(f"{name}: ") == (told.status == "fail"), text
        assert all(each.isprintable() or each in "\n\t" for each in told.message), text
        assert len(told.message) < 50_000
        assert SECRET not in told.message
        assert "root:" not in told.message
        failed += told.status == "fail"
    assert failed > COUNT * 0.6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10, "KiB"
    print(f"{COUNT} files, {failed} refused, {time.monotonic() - started:.0f} s")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../secret.bin", "file '../secret.bin' lies outside the folder of the answers."),
        ("/etc/passwd", "file '/etc/passwd' lies outside the folder of the answers."),
        ("/dev/zero", "file '/dev/zero' lies outside the folder of the answers."),
        ("link", "file 'link' lies outside the folder of the answers."),
        ("fifo", "file 'fifo' is not a regular file."),
        ("folder", "file 'folder' is not a regular file."),
        ("sparse", f"file 'sparse' has {1 << 40} bytes, more than 144."),
        ("none", "no file 'none'."),
        ("a\0b", "file 'a\\x00b' cannot be read: a name has no NUL."),
        (3, "file must be the name of a file, got 3."),
    ],
)
def test_a_file_is_read_below_the_folder_only(folder: Path, name: object, told: str) -> None:
    data = right(NAMES[0])
    data["steps"][0]["y"] = {"dtype": "float32", "shape": [12, 3], "file": name}
    (folder / f"{NAMES[0]}.json").write_text(json.dumps(data))
    assert judged(folder, NAMES[0]).message.splitlines()[0] == f"{NAMES[0]}: step 1 of 1 (train), y: {told}"


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "sparse", "surrogates"])
def test_an_answer_that_is_no_file_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{NAMES[0]}.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "sparse":
        with path.open("wb") as sparse:
            sparse.truncate(1 << 40)
    else:
        path.write_bytes(b'"\xed\xa0\x80"')
    wanted = {
        "fifo": "is not a regular file.",
        "folder": "is not a regular file.",
        "link": "lies outside the folder of the answers.",
        "sparse": f"has {1 << 40} bytes, more than {32 << 20}.",
        "surrogates": "is not JSON: 'utf-8' codec can't decode byte 0xed in position 1: invalid continuation byte.",
    }
    assert judged(tmp_path, NAMES[0]).message.splitlines()[0] == f"{NAMES[0]}: {path} {wanted[kind]}"
