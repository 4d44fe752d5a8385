"""The atlas: what is known shows up in it, the page is made from its data, and a run of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from known_differences import KNOWN, Known

from multibn.usage import UsageError
from multibn_conformance.atlas import make
from multibn_conformance.atlas import page as atlas_page
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.frameworks.own import FOLDER
from multibn_conformance.frameworks.registry import ALL

DOCS = Path(__file__).parents[1] / "docs"
ATLAS: dict[str, Any] = json.loads((DOCS / "atlas.json").read_text())
BY_NAME = {each["name"]: each for each in ATLAS["frameworks"]}
TORCH = next(own for own in ALL if own.name == "torch.nn")


@pytest.mark.parametrize("known", KNOWN, ids=[f"{known.framework}-{known.where}-{known.key}" for known in KNOWN])
def test_what_is_known_shows_up(known: Known) -> None:
    framework = BY_NAME[known.framework]
    if known.where == "finding":
        told = [framework["findings"][known.key]["finding"]]
    elif known.where == "habit":
        told = [each["answer"] for each in framework["habits"] if each["id"] == known.key]
    else:
        told = [each["why"] for each in framework["differences"] if known.key in each["clauses"]]
    assert any(re.search(known.shown, text) for text in told), told


def test_every_framework_is_in_it_and_keeps_its_dialect() -> None:
    assert list(BY_NAME) == [own.name for own in ALL]
    assert {name: each["keeping"].get("breaks", 0) for name, each in BY_NAME.items()} == dict.fromkeys(BY_NAME, 0)
    assert [
        case for each in BY_NAME.values() for case in each["cases"] if case["here"] == "differs" and not case["because"]
    ] == []


def test_versions_are_the_pinned_ones() -> None:
    for own in ALL:
        pins = dict(line.split("==") for line in (FOLDER.parent / "environments" / f"{own.environment}.txt").read_text().split())
        pinned = {name.lower().replace("_", "-"): version for name, version in pins.items()}
        told = BY_NAME[own.name]["packages"]
        assert {name: version.partition("+")[0] for name, version in told.items()} == {
            name: pinned[name] for name in own.packages
        }


def test_the_page_is_made_from_the_data() -> None:
    assert (DOCS / "atlas.md").read_text() == atlas_page.page(ATLAS)


def test_links_of_the_page_lead_somewhere() -> None:
    page = (DOCS / "atlas.md").read_text()
    headings = {
        "".join(c for c in line.lstrip("# ").lower().replace(" ", "-") if c.isalnum() or c in "-_")
        for line in page.splitlines()
        if line.startswith("#")
    }
    links = set(re.findall(r"\]\(#([^)]*)\)", page))
    assert links <= headings
    assert {match for match in re.findall(r"\]\(([^#)][^)]*)\)", page) if not (DOCS / match).exists()} == set()


def test_tables_of_the_page_are_whole() -> None:
    page = (DOCS / "atlas.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", page, re.M)
    assert len(tables) > 6 + len(ALL)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


class Pip:
    """Instead of installing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        monkeypatch.setattr("venv.create", lambda place, **_: Path(place).mkdir(parents=True, exist_ok=True))
        monkeypatch.setattr("subprocess.run", lambda command, **_: self.calls.append([str(each) for each in command]))


def test_an_environment_is_filled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(monkeypatch)
    python = make.environment("onnx", tmp_path)
    assert python == tmp_path / "onnx" / "bin" / "python"
    assert make.environment("onnx", tmp_path) == python
    pins = str(FOLDER.parent / "environments" / "onnx.txt")
    assert pip.calls == [[str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", pins]]
    (tmp_path / "onnx" / "done").write_text("other pins")
    make.environment("onnx", tmp_path)
    assert len(pip.calls) == 2


def test_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "CASES", {case.id: case for case in CASES.values() if case.clause in ("BN-06", "BN-07")})
    found = make.measured(TORCH, Path(sys.executable))
    known = BY_NAME["torch.nn"]
    assert found["packages"]["torch"] == known["packages"]["torch"]
    assert found["spec"] == known["spec"] == {**found["spec"], "eps": pytest.approx(1e-5), "moving_variance": "unbiased"}
    assert found["habits"] == known["habits"]
    assert [each["why"] for each in found["differences"]] == ["The moving variance is unbiased."]
    assert set(found) == set(known)
    json.dumps(found, allow_nan=False)


def framework(name: str, **other: Any) -> dict[str, Any]:
    return {**BY_NAME["torch.nn"], "name": name, **other}


def test_some_are_run_again_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "atlas.json").write_text(json.dumps({"frameworks": [framework("torch.nn"), framework("paddle.nn")]}))
    monkeypatch.setattr(make, "environment", lambda name, folder: folder / name)
    monkeypatch.setattr(make, "measured", lambda own, python: framework(own.name, numpy=str(python)))
    assert make.make(["torch.nn", "keras2"], Path("e"), tmp_path) == []
    made = json.loads((tmp_path / "atlas.json").read_text())
    old = BY_NAME["torch.nn"]["numpy"]
    assert [(each["name"], each["numpy"]) for each in made["frameworks"]] == [
        ("torch.nn", "e/torch"),
        ("keras2", "e/tensorflow"),
        ("paddle.nn", old),
    ]
    assert made["format"] == make.FORMAT
    assert set(made["missing"]) == set(make.MISSING)


def test_what_was_run_is_kept_if_the_rest_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(own: Any, python: Path) -> Any:
        if own.name != "torch.nn":
            raise KeyboardInterrupt
        return framework(own.name)

    monkeypatch.setattr(make, "environment", lambda name, folder: folder / name)
    monkeypatch.setattr(make, "measured", runs)
    with pytest.raises(KeyboardInterrupt):
        make.make([], Path("e"), tmp_path)
    assert [each["name"] for each in json.loads((tmp_path / "atlas.json").read_text())["frameworks"]] == ["torch.nn"]


def test_the_page_says_when_each_was_run() -> None:
    days = {"torch.nn": "2026-01-02", "keras2": "2026-03-04"}
    page = atlas_page.page({**ATLAS, "frameworks": [framework(name, made=day) for name, day in days.items()]})
    assert "2 BatchNorms, each in an environment of its own, from 2026-01-02 to 2026-03-04 (" in page
    for name, day in days.items():
        assert re.search(rf"^### {re.escape(name)}\n\n.*; {day}\.$", page, re.M)
    assert "of its own, on 2026-01-02 (" in atlas_page.page({**ATLAS, "frameworks": [framework("a", made="2026-01-02")]})


def test_what_cannot_be_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(own: Any, python: Path) -> Any:
        raise UsageError("no module named mxnet")

    monkeypatch.setattr(make, "environment", lambda name, folder: folder / name)
    monkeypatch.setattr(make, "measured", fails)
    assert make.main(["gluon.nn", "--docs", str(tmp_path), "--environments", "e"]) == 1
    assert capsys.readouterr().err == "could not be run: gluon.nn: no module named mxnet\n"
    assert "- gluon.nn: no module named mxnet\n" in (tmp_path / "atlas.md").read_text()


def test_an_unknown_framework(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        make.main(["theano"])
    assert left.value.code == 2
    told = "python -m multibn_conformance.atlas.make: error: unknown framework 'theano'; choose from torch.nn, gluon.nn, "
    assert told in capsys.readouterr().err


def test_numbers_that_json_has_not_are_words() -> None:
    assert make._plain({1: (float("inf"), None), "a": [float("nan"), 2.5]}) == {"1": ["inf", None], "a": ["nan", 2.5]}


def test_short_words() -> None:
    words = atlas_page._words
    assert words("y is beta; moving mean goes from 5 to 4.84194, moving variance goes from 900 to 810") == (
        "y is beta; mean 5 to 4.841, variance 900 to 810"
    )
    assert words("cannot tell: backward raised NotImplementedError: no gradient") == "no gradient"


def test_questions_are_asked_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "habits.py").write_text(
        'def number():\n    """A number."""\n    return 0.12345\n\n\ndef truth():\n    """True?"""\n    return False\n\n\n'
        'def error():\n    """Raises."""\n    raise ValueError("no\\nmore")\n\n\ndef _helper():\n    pass\n'
    )
    command = [
        sys.executable,
        *map(str, (Path(make.__file__).with_name("ask.py"), tmp_path / "habits.py", tmp_path / "out.json")),
    ]
    subprocess.run(command, check=True)
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"id": "number", "question": "A number.", "answer": "0.123"},
        {"id": "truth", "question": "True?", "answer": "no"},
        {"id": "error", "question": "Raises.", "answer": "raises ValueError: no"},
    ]
