"""Test vectors: written, answered by code that reads the files only, and judged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from multibn.cli import app
from multibn.layer.types import Array
from multibn.numpy_backend import ReferenceSubject
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.judging import compare
from multibn_conformance.oracle.exact import expected
from multibn_conformance.vectors import run
from multibn_conformance.vectors import write as vectors

NAMES = [
    "BN-01-refuses-channels-last",
    "BN-04-no-scale-no-center",
    "BN-05-momentum-none",
    "BN-08-gamma-0",
    "BN-09-moving-updated",
    "BN-10-float16",
    "BN-10-refuses-bool",
    "BN-11-nan-in-training",
    "BN-12-empty-0x3",
    "BN-12-refuses-one-value-rank-2",
    "BN-13-another-type",
    "BN-13-as-loaded",
    "BN-13-in-the-middle",
    "BN-13-two-layers",
    "BN-14-bits-across-layouts",
    "BN-15-long-rows",
    "BN-15-rank-2",
    "BN-16-kappa-1e6-float64",
]


def called(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ("vectors", *map(str, arguments)), env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors") / "written"
    before = vectors.INLINE_LIMIT
    vectors.INLINE_LIMIT = 1000
    try:
        code, out, _ = called("write", str(folder), *(part for name in NAMES for part in ("--case", name)))
    finally:
        vectors.INLINE_LIMIT = before
    assert (code, out) == (0, f"{len(NAMES)} cases in {folder}; {folder / 'README.md'} says how to answer.\n")
    return folder


def array(given: dict[str, Any] | None, folder: Path) -> Any:
    """Read an array as another language would."""
    if given is None:
        return None
    kind = np.dtype(given["dtype"])
    if "file" in given:
        values = np.frombuffer((folder / given["file"]).read_bytes(), kind.newbyteorder("<")).astype(kind)
    else:
        values = np.array([float.fromhex(each) if isinstance(each, str) else each for each in given["values"]], kind)
    return values.reshape(given["shape"])


def told(a: Array | None) -> dict[str, Any] | None:
    if a is None:
        return None
    return {"dtype": a.dtype.name, "shape": list(a.shape), "values": [float(each).hex() for each in a.ravel()]}


Make = Callable[[int, BatchNormSpec], ReferenceSubject]


def answer(folder: Path, answers: Path, make: Make = ReferenceSubject) -> None:
    """Answer every case, by README.md."""
    answers.mkdir()
    for entry in json.loads((folder / "index.json").read_text())["cases"]:
        case = json.loads((folder / entry["file"]).read_text())
        spec, inside = BatchNormSpec.from_dict(case["spec"]), folder / "cases"

        def loaded(state: dict[str, Any], case: dict[str, Any] = case, spec: BatchNormSpec = spec) -> tuple[Any, list[Any]]:
            subject = make(case["features"], spec)
            arrays = [array(state[name], folder / "cases") for name in ("gamma", "beta", "moving_mean", "moving_var")]
            subject.load(*arrays)
            return subject, arrays

        subject, arrays = loaded(case["state"])
        steps = []
        for step in case["steps"]:
            given = array(step.get("input"), inside)
            found: dict[str, Any] = {}
            try:
                if step["do"] in ("train", "infer", "refuse"):
                    found = {"y": told(subject.forward(given, step["do"] != "infer"))}
                elif step["do"] == "backward":
                    found = dict(zip(("dx", "dgamma", "dbeta"), map(told, subject.backward(given)), strict=True))
                elif step["do"] == "load":
                    arrays = [array(step["state"][name], inside) for name in step["state"]]
                    subject.load(*arrays)
                elif step["do"] == "reload":
                    moving = subject.moving()
                    subject = make(case["features"], spec)
                    subject.load(*arrays[:2], *moving)
                else:
                    other, _ = loaded(step["state"])
                    other.forward(given, True)
            except (ValueError, TypeError, NotImplementedError) as error:
                found = {"raised": str(error)}
            mean, var = subject.moving()
            steps.append({**found, "moving_mean": told(mean), "moving_var": told(var)})
        (answers / f"{case['id']}.json").write_text(json.dumps({"case": case["id"], "steps": steps}))


@pytest.fixture(scope="module")
def right(written: Path) -> Path:
    folder = written.parent / "right"
    with np.errstate(all="ignore"):
        answer(written, folder)
    return folder


def changed(right: Path, to: Path, name: str, change: Callable[[Any], object]) -> Path:
    """Return the right answers with one changed."""
    to.mkdir()
    for path in right.iterdir():
        (to / path.name).write_text(path.read_text())
    data = json.loads((to / f"{name}.json").read_text())
    change(data)
    (to / f"{name}.json").write_text(json.dumps(data))
    return to


def test_the_files_are_as_their_schemas_say(written: Path, right: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schemas = {name: json.loads((written / "schemas" / f"{name}.schema.json").read_text()) for name in vectors.SCHEMAS}
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    checked = {name: jsonschema.Draft202012Validator(schema) for name, schema in schemas.items()}
    index = json.loads((written / "index.json").read_text())
    checked["index"].validate(index)
    assert [each["id"] for each in index["cases"]] == [name for name in CASES if name in NAMES]
    assert index["multibn"] == version("multibn")
    for name in NAMES:
        checked["vector"].validate(json.loads((written / "cases" / f"{name}.json").read_text()))
        checked["answer"].validate(json.loads((right / f"{name}.json").read_text()))
    with pytest.raises(jsonschema.ValidationError):
        checked["vector"].validate({**json.loads((written / "cases" / f"{NAMES[0]}.json").read_text()), "steps": []})


def test_expected_values_are_exact_and_bounds_are_the_judges(written: Path) -> None:
    case = json.loads((written / "cases" / "BN-16-kappa-1e6-float64.json").read_text())
    first = case["steps"][0]
    for name, right in first["expected"].items():
        exact = expected(CASES[case["id"]])[0].values[name]
        assert exact is not None
        assert [float.fromhex(each) for each in right["values"]] == exact.high.ravel().tolist()
        assert [float.fromhex(each) for each in right["rest"]] == exact.low.ravel().tolist()
        bound, _ = compare.bound_of(name, exact, expected(CASES[case["id"]])[0], "working")
        assert right["bound"]["working"] == [float(f"{each:.3g}") for each in bound.ravel()]
    x = array(first["input"], written / "cases")
    step = CASES[case["id"]].steps[0].values
    assert step is not None
    assert x.tobytes() == step.array().tobytes()


def test_large_arrays_stand_in_files(written: Path) -> None:
    case = json.loads((written / "cases" / "BN-15-long-rows.json").read_text())
    y = case["steps"][0]["expected"]["y"]
    assert y["file"] == "BN-15-long-rows.steps.0.expected.y.bin"
    assert (written / "cases" / y["file"]).stat().st_size == 4 * math.prod(y["shape"])
    assert "file" not in case["steps"][0]["expected"]["moving_mean"]


@pytest.mark.parametrize("precision", ["working", "exact"])
def test_answers_made_by_the_reference_conform(written: Path, right: Path, precision: str) -> None:
    code, out, err = called("check", str(written), str(right), "--precision", precision)
    assert (code, err) == (0, "")
    skipped = 3 if precision == "working" else 0
    assert out.splitlines()[-1] == f"conforms: {right} ({len(NAMES) - skipped} checks)"
    assert ("only implementations with exact precision promise equal bits" in out) == (precision == "working")


def test_a_wrong_one_does_not(written: Path, tmp_path: Path) -> None:
    class Biased(ReferenceSubject):
        def moving(self):  # type: ignore[no-untyped-def]
            mean, var = super().moving()
            return mean, np.nextafter(var, var.dtype.type(9)) if self.batches else var

    with np.errstate(all="ignore"):
        answer(written, tmp_path / "answers", Biased)
    code, out, _ = called("check", str(written), str(tmp_path / "answers"), "--precision", "exact", "--case", "BN-10-*")
    assert code == 1
    assert f"{tmp_path / 'answers'} fails BN-10-float16: step 2 of 3 (train), moving_var[" in out
    again = f"multibn vectors check {written} {tmp_path / 'answers'} --precision exact --case BN-10-float16"
    assert again in out.splitlines()
    code, out, _ = called(*again.split()[2:])
    assert code == 1
    assert out.splitlines()[-1] == f"does not conform: {tmp_path / 'answers'} breaks BN-10"


def _set(data: Any, step: int, **values: object) -> Any:
    return data["steps"][step].update(values)


@pytest.mark.parametrize(
    ("name", "change", "messages"),
    [
        (
            "BN-04-no-scale-no-center",
            lambda data: data["steps"].pop(),
            ['{path}: "steps" must be a list of 4 objects, one for each step, got a list of 3.'],
        ),
        (
            "BN-04-no-scale-no-center",
            lambda data: data.update(steps="none"),
            ['{path}: "steps" must be a list of 4 objects, one for each step, got str.'],
        ),
        (
            "BN-04-no-scale-no-center",
            lambda data: (data["steps"][0].pop("y"), data["steps"][2].pop("moving_var"), data["steps"][2].pop("dbeta")),
            [
                "step 1 of 4 (infer): no y. Give it, null if there is none.",
                "step 3 of 4 (backward): no dbeta. Give it, null if there is none.",
                "step 3 of 4 (backward): no moving_var. Give the moving statistics as they are after every step.",
            ],
        ),
        (
            "BN-04-no-scale-no-center",
            lambda data: (
                data["steps"][0]["y"]["values"].pop(),
                _set(data, 1, y=[1, 2]),
                data["steps"][3]["y"].update(dtype="f"),
            ),
            [
                "step 1 of 4 (infer), y: 179 values for shape (4, 3, 3, 5), which has 180.",
                'step 2 of 4 (train), y: must be null or {{"dtype": "float32", "shape": [2, 3], "values": ["0x1.8p+1", ...]}}.',
            ],
        ),
        (
            "BN-04-no-scale-no-center",
            lambda data: (
                data["steps"][0]["y"]["values"].__setitem__(3, "ten"),
                data["steps"][1]["y"]["values"].__setitem__(0, True),
            ),
            ["step 1 of 4 (infer), y: 'ten' is not a number.", "step 2 of 4 (train), y: True is not a number."],
        ),
        (
            "BN-04-no-scale-no-center",
            lambda data: _set(data, 0, y={"dtype": "float32", "shape": [1], "file": "none.bin"}),
            ["step 1 of 4 (infer), y: no file 'none.bin'."],
        ),
        (
            "BN-04-no-scale-no-center",
            lambda data: data["steps"][0]["y"]["values"].__setitem__(0, "nan"),
            ["step 1 of 4 (infer), y[0, 0, 0, 0]: got nan, should be "],
        ),
        (
            "BN-04-no-scale-no-center",
            lambda data: data["steps"][0]["y"].update(shape=[180]),
            ["step 1 of 4 (infer), y: got shape (180,), should be (4, 3, 3, 5)."],
        ),
        (
            "BN-04-no-scale-no-center",
            lambda data: data["steps"][0]["y"].update(dtype="float64"),
            ["step 1 of 4 (infer), y: got type float64, should be float32."],
        ),
        (
            "BN-04-no-scale-no-center",
            lambda data: _set(data, 2, dgamma=data["steps"][2]["moving_mean"]),
            ["step 3 of 4 (backward), dgamma: got an array, should be None."],
        ),
        (
            "BN-05-momentum-none",
            lambda data: _set(data, 4, raised="out of memory"),
            ["step 5 of 10 (train) raised ReportedError: out of memory"],
        ),
        (
            "BN-13-as-loaded",
            lambda data: data["steps"][0]["moving_mean"]["values"].__setitem__(1, 0),
            ["step 1 of 2 (reload): moving_mean must stay as it was: index [1] is 0.0, was "],
        ),
        (
            "BN-12-refuses-one-value-rank-2",
            lambda data: (data["steps"][0].pop("raised"), _set(data, 0, y=None)),
            ["step 1 of 1 (refuse): got output of type NoneType, should be an error, for input of shape (1, 3), float32."],
        ),
        (
            "BN-13-two-layers",
            lambda data: data["steps"][3]["moving_var"]["values"].__setitem__(0, 2.5),
            ["step 4 of 5 (another): moving_var must stay as it was: index [0] is 2.5, was "],
        ),
    ],
)
def test_what_is_wrong_is_told(
    written: Path, right: Path, tmp_path: Path, name: str, change: Callable[[Any], object], messages: list[str]
) -> None:
    answers = changed(right, tmp_path / "answers", name, change)
    code, out, _ = called("check", str(written), str(answers), "--case", name)
    lines = out.splitlines()
    assert code == 1
    wanted = [each.format(path=answers / f"{name}.json", folder=answers) for each in messages]
    assert lines[0].startswith(f"{answers} fails {name}: {wanted[0]}")
    assert [line[: len(each)] for line, each in zip(lines[1:], wanted[1:], strict=False)] == wanted[1:]
    assert CASES[name].comment in out


def test_numbers_may_be_written_in_any_way(written: Path, right: Path, tmp_path: Path) -> None:
    def other_words(data: Any) -> None:
        values = data["steps"][0]["y"]["values"]
        values[:3] = [float.fromhex(values[0]), repr(float.fromhex(values[1])), values[2].upper()]
        for i in range(3, len(values)):
            values[i] = f"{float.fromhex(values[i]):.9g}"
        y = data["steps"][1]["y"]
        raw = np.array([float.fromhex(each) for each in y.pop("values")], "<f4").tobytes()
        (tmp_path / "answers" / "y.bin").write_bytes(raw)
        y["file"] = "y.bin"

    answers = changed(right, tmp_path / "answers", "BN-04-no-scale-no-center", other_words)
    assert called("check", str(written), str(answers), "--precision", "exact", "--case", "BN-04-*")[0] == 0


def test_what_is_missing_broken_and_too_much_is_told(written: Path, right: Path, tmp_path: Path) -> None:
    answers = changed(right, tmp_path / "answers", NAMES[0], lambda data: None)
    (answers / "BN-05-momentum-none.json").unlink()
    (answers / "BN-10-float16.json").write_text("{")
    (answers / "BN-99-other.json").write_text("{}")
    code, out, _ = called("check", str(written), str(answers))
    assert code == 1
    assert f"BN-05-momentum-none: no answer: no file {answers / 'BN-05-momentum-none.json'}." in out
    assert f"BN-10-float16: {answers / 'BN-10-float16.json'} is not JSON: Expecting property name" in out
    assert f"skipped {answers / 'BN-99-other.json'}: {written} has no case BN-99-other" in out
    assert out.splitlines()[-1] == f"does not conform: {answers} breaks BN-05, BN-10"


def test_wrong_calls(written: Path, right: Path, tmp_path: Path) -> None:
    def error(*arguments: object) -> str:
        code, _, err = called(*map(str, arguments))
        assert code == 2
        return err.removeprefix("multibn: ").removesuffix("\n")

    assert error("write", written) == f"{written} is not empty. Give a new folder."
    missing = tmp_path / "no" / "such"
    assert error("write", missing) == f"there is no folder {missing.parent} to make such in. Make it first."
    long = tmp_path / ("x" * 300)
    assert error("write", long) == f"cannot make the folder {long}: File name too long. Give another folder."
    assert error("check", written, right, "--precision", "high") == "--precision must be working or exact, got 'high'."
    nowhere = tmp_path / "nowhere"
    example = nowhere / "BN-05-momentum-0.json"
    assert error("check", written, nowhere) == f"{nowhere} is not a folder. It must hold an answer for each case: {example}, ..."
    assert re.fullmatch(
        rf"{nowhere}/index.json is not an index of vectors: no such file\. Write them: multibn vectors write {nowhere}",
        error("check", nowhere, right),
    )
    assert error("check", written, right, "--case", "BN-17").startswith("unknown case 'BN-17'; choose from BN-01-refuses")
    index = json.loads((written / "index.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    again = "Write them again, to a new folder: multibn vectors write DIR"
    for change in ({"format": "multibn-vectors-0"}, {"cases": [{**index["cases"][0], "fingerprint": "0"}]}):
        (other / "index.json").write_text(json.dumps({**index, **change, "multibn": "0.0.1"}))
        assert error("check", other, right) == f"{other} holds vectors of another version, multibn 0.0.1. {again}"


def test_cases_that_cannot_be_made_here_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    code, out, _ = called("write", str(tmp_path / "new"), "--case", "BN-16-digits-layer-0", "--case", "BN-07-one-value")
    assert code == 0
    assert out.splitlines() == [
        "left out, since they need scikit-learn: BN-16-digits-layer-0",
        f"1 cases in {tmp_path / 'new'}; {tmp_path / 'new' / 'README.md'} says how to answer.",
    ]


def test_played_answers_make_no_subjects_of_other_cases() -> None:
    with pytest.raises(NotImplementedError, match=r"^answers are played back case by case$"):
        run._none(3, None, "files", "answers")


def test_a_folder_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"^.*file is not empty\. Give a new folder\.$"):
        vectors.write(tmp_path / "file", [])


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "0x1.8p+1"), (0.0, "0x0.0p+0"), (-math.inf, "-inf"), (math.nan, "nan"), (0.1, "0x1.999999999999ap-4")],
)
def test_hex_floats_are_short(value: float, text: str) -> None:
    assert vectors._hex(np.array([value])) == [text]


def test_the_names_of_cases_are_names_of_files() -> None:
    assert all(re.fullmatch(r"[\w.-]+", name) for name in CASES)
