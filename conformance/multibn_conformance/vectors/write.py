"""Write the fixed cases as files, for code that Python cannot call: ``multibn vectors write``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from multibn.backend import Precision
from multibn.layer.types import Array
from multibn.numpy_backend import ReferenceSubject
from multibn.usage import UsageError
from multibn_conformance.cases.case import Case, Step
from multibn_conformance.cases.inputs import state
from multibn_conformance.judging.compare import bound_of, skipped
from multibn_conformance.judging.perform import Answer, perform
from multibn_conformance.oracle.exact import Exact, Expected, expected

FORMAT = "multibn-vectors-1"
SCHEMAS = ("index", "vector", "answer")
INLINE_LIMIT = 5_000
"""Arrays with more values stand in a binary file of their own, beside the case."""


def write(folder: Path, cases: Sequence[Case], done: Callable[[], object] = lambda: None) -> list[str]:
    """Write the cases to a new folder; ``done`` is called after each. Returns the ids of those that cannot be made here.

    Raises:
        UsageError: the folder is not empty, or cannot be made.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is not empty. Give a new folder.")
        if not folder.parent.is_dir():
            raise UsageError(f"there is no folder {folder.parent} to make {folder.name} in. Make it first.")
        for inside in (folder, folder / "cases", folder / "schemas"):
            inside.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}. Give another folder.") from error
    index, missing = [], []
    for case in cases:
        if left_out(case, "exact") is None:
            file = f"cases/{case.id}.json"
            (folder / file).write_text(_text(_without_large(vector(case), folder / "cases", case.id)), encoding="utf-8")
            index.append({"id": case.id, "clause": case.clause, "file": file, "fingerprint": fingerprint(case)})
        else:
            missing.append(case.id)
        done()
    (folder / "index.json").write_text(_text({"format": FORMAT, "multibn": version("multibn"), "cases": index}), encoding="utf-8")
    package = files("multibn_conformance") / "schemas"
    for name in SCHEMAS:
        text = (package / f"{name}.schema.json").read_text(encoding="utf-8")
        (folder / "schemas" / f"{name}.schema.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text((package / "vectors.md").read_text(encoding="utf-8"), encoding="utf-8")
    return missing


def _text(data: object) -> str:
    return (
        json.dumps(data, allow_nan=False, separators=(",", ":")).replace('"steps":', '\n"steps":').replace('{"do":', '\n{"do":')
        + "\n"
    )


def left_out(case: Case, precision: Precision) -> str | None:
    """Why a case is skipped, or None."""
    with np.errstate(all="ignore"):
        return skipped(case, precision)


def fingerprint(case: Case) -> str:
    """A hash that tells whether the case of another version with the same id is the same case."""
    return sha256(repr(case).encode()).hexdigest()[:16]


def vector(case: Case) -> dict[str, Any]:
    """A case as JSON can hold it, described by ``schemas/vector.schema.json``."""
    with np.errstate(all="ignore"):
        rights: Sequence[Expected | None] = [None] * len(case.steps) if case.against == "bits" else expected(case)
        kind, steps = case.dtype, []
        for step, answer, right in zip(case.steps, perform(case, ReferenceSubject), rights, strict=True):
            kind = step.values.dtype if step.do == "load" and step.values is not None else kind
            steps.append(_step(case, step, kind, answer, right))
    return {
        "format": "multibn-vector-1",
        "id": case.id,
        "clause": case.clause,
        "comment": case.comment,
        "catches": case.catches,
        "verdict": case.verdict,
        "against": case.against,
        "source": case.source,
        "not_promised": left_out(case, "working"),
        "features": case.features,
        "dtype": case.dtype,
        "spec": case.spec.to_dict(),
        "state": _state(case, case.dtype, 0),
        "steps": steps,
    }


def _state(case: Case, kind: str, seed: int) -> dict[str, Any]:
    arrays = state(case.features, kind, seed, case.spec)
    names = ("gamma", "beta", "moving_mean", "moving_var")
    return {name: None if a is None else _array(a) for name, a in zip(names, arrays, strict=True)}


def _step(case: Case, step: Step, kind: str, answer: Answer, right: Expected | None) -> dict[str, Any]:
    made: dict[str, Any] = {"do": step.do}
    if step.values is not None and step.do in ("load", "another"):
        made["state"] = _state(case, kind, step.values.seed)
    if step.values is not None and step.do != "load":
        made["input"] = _array(step.values.array()) | {"layout": step.values.layout}
    made["observe"] = list(step.observe)
    made["expected"] = {name: _expected(name, answer, right) for name in answer.arrays}
    return made


def _expected(name: str, answer: Answer, right: Expected | None) -> dict[str, Any] | None:
    came = answer.arrays[name]
    if right is None:
        return None if came is None else _array(came)
    exact = right.values[name]
    if exact is None:
        return None
    dtype = answer.types[name]
    made: dict[str, Any] = {"dtype": dtype, "shape": list(exact.high.shape), "values": _hex(exact.high)}
    if dtype == "float64":
        made["rest"] = _hex(exact.low)
    made["bound"] = {precision: _bounds(name, exact, right, precision) for precision in ("exact", "working")}
    return made


def _bounds(name: str, exact: Exact, right: Expected, precision: Precision) -> list[float | None]:
    """To three digits, enough to judge by; ``check`` takes the bounds themselves."""
    if not exact.high.size:
        return []
    return [float(f"{each:.3g}") if np.isfinite(each) else None for each in bound_of(name, exact, right, precision)[0].ravel()]


def _array(a: Array) -> dict[str, Any]:
    values: object = a if a.size > INLINE_LIMIT else _hex(a) if a.dtype.kind == "f" else [int(each) for each in a.ravel()]
    return {"dtype": a.dtype.name, "shape": list(a.shape), "values": values}


def _without_large(data: Any, folder: Path, name: str) -> Any:
    """The same with ``file`` in place of arrays, which are written there: little endian, in C order."""
    if isinstance(data, list):
        return [_without_large(each, folder, f"{name}.{i}") for i, each in enumerate(data)]
    if not isinstance(data, dict):
        return data
    made = {key: _without_large(each, folder, f"{name}.{key}") for key, each in data.items() if not isinstance(each, np.ndarray)}
    for each in data.values():
        if isinstance(each, np.ndarray):
            made["file"] = f"{name}.bin"
            (folder / made["file"]).write_bytes(np.ascontiguousarray(each).astype(each.dtype.newbyteorder("<")).tobytes())
    return made


def _hex(a: Array) -> list[str]:
    return [_shortest(float(each).hex()) for each in a.ravel()]


def _shortest(text: str) -> str:
    """Without the zeros at the end of the fraction, one apart: ``0x1.8p+1``."""
    number, p, power = text.partition("p")
    if not p:
        return text
    whole, _, fraction = number.partition(".")
    return f"{whole}.{fraction.rstrip('0') or '0'}p{power}"
