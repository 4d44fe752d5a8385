"""Backends that another interpreter loads, judged beside those of this one: ``multibn conform --python PATH``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from multibn.cli import app
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.runs import self_test
from multibn_conformance.subjects.backends import candidates

TRAIN, MOVING, BACKWARD = "BN-01-rank-3-float32", "BN-06-biased-rank-2", "BN-08-training-rank-2-float32"

SOURCE = """
import os
from multibn.backend import Backend
from multibn.numpy_backend import KernelSubject, _make_whitening

class Forgets(KernelSubject):
    def forward(self, x, training):
        y = super().forward(x, training)
        self.moving_var[:] = 0
        return y

class Dies(KernelSubject):
    def backward(self, dy):
        os._exit(3)

MADE = {"right": KernelSubject, "forgets": Forgets, "dies": Dies}

def make(num_features, spec, device, implementation):
    return MADE[implementation](num_features, spec)

def whitening(num_features, spec, device, implementation):
    return _make_whitening(num_features, spec, device, "kernel")

GOOD = Backend("third", {"third": "1.2"}, {"right": "exact"}, lambda: ("cpu",), make, whitening)
BAD = Backend("bad", {"third": "1.2"}, dict.fromkeys(("forgets", "dies"), "exact"), lambda: ("cpu",), make)
"""
POINTS = "[multibn.backends]\nthird = third:GOOD\nbad = third:BAD\nnumpy = third:NOTHING\nabsent = third:NOTHING\n"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make an interpreter with backends that this one lacks."""
    folder = tmp_path_factory.mktemp("third")
    (folder / "third.py").write_text(SOURCE)
    (folder / "third-1.2.dist-info").mkdir()
    (folder / "third-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.2\n")
    (folder / "third-1.2.dist-info" / "entry_points.txt").write_text(POINTS)
    there = folder / "python"
    there.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    there.chmod(0o755)
    return str(there)


def called(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["conform", *arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_one_table_has_the_backends_of_both(python: str) -> None:
    code, out, _ = called(
        "--python", python, "--backend", "numpy", "--backend", "third", "--clause", "BN-15", "--clause", "BN-06"
    )
    assert code == 0, out
    assert "conforms: numpy/kernel/cpu, numpy/reference/cpu, third/right/cpu (" in out


def test_a_backend_that_loads_here_is_judged_here(python: str) -> None:
    found = {each.backend.name: each for each in candidates(["numpy", "third"], [], [python])[0]}
    assert {name: each.python for name, each in found.items()} == {"numpy": None, "third": python}
    assert found["third"].backend.versions.keys() == {"python", "numpy", "third"}


def test_a_failure_names_the_command_that_repeats_it(python: str) -> None:
    code, out, _ = called("--python", python, "--backend", "bad", "--case", MOVING)
    command = f"multibn conform --backend bad --device cpu --python {python} --case {MOVING}"
    assert code == 1
    assert command in out
    assert f"bad/forgets/cpu fails {MOVING}" in out
    _, out, _ = called("--python", python, "--backend", "bad", "--case", BACKWARD)
    assert f"bad/dies/cpu fails {BACKWARD}" in out
    assert "backward ended its process with exit code 3" in out
    code, out, _ = called("--python", python, "--backend", "bad", "--random", "3")
    assert code == 1
    assert f"multibn conform --backend bad --device cpu --python {python} --random 1 --seed " in out


def test_the_suite_judges_itself_by_right_ones_there_too(python: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(self_test, "CASES", {name: CASES[name] for name in (TRAIN, MOVING)})
    monkeypatch.setattr(self_test, "DEFECTS", {})
    options = "--self-test", "--random", "2", "--python", python
    code, out, _ = called(*options, "--backend", "third")
    assert code == 0, out
    assert "third/right/cpu: 2 fixed cases and 2 random ones: not accused" in out
    code, out, _ = called(*options, "--backend", "bad")
    assert code == 1
    assert f"bad/forgets/cpu: 2 fixed cases and 2 random ones: accused by {MOVING}" in out
    assert f"multibn conform --backend bad --device cpu --python {python} --case {MOVING}" in out


def test_whitening_there_is_judged_too(python: str) -> None:
    code, out, _ = called("--python", python, "--backend", "third", "--clause", "WH-03")
    assert code == 0
    assert "whitening conforms: third/right/cpu (" in out


def test_the_reports_have_it(python: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"report.{name}" for name in ("json", "junit", "html")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert called("--python", python, "--backend", "third", "--case", TRAIN, *options)[0] == 0
    report = json.loads(files["json"].read_text())
    (subject,) = report["subjects"]
    assert subject["name"] == "third/right/cpu"
    assert subject["versions"]["third"] == "1.2"
    names = [case.get("name") for case in ElementTree.parse(files["junit"]).iter("testcase")]
    assert any(TRAIN in str(name) for name in names)
    assert "third/right/cpu" in files["html"].read_text()


def test_what_no_interpreter_loads_is_told(python: str) -> None:
    reason = "cannot load it: AttributeError: module 'third' has no attribute 'NOTHING'"
    assert called("--python", python, "--backend", "absent", "--case", TRAIN) == (
        2,
        "",
        f"multibn: cannot use backend 'absent': {python} {reason}. Install what it needs.\n",
    )
    code, out, _ = called("--python", python, "--case", TRAIN)
    assert code == 0
    assert f"skipped absent: {python} {reason}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--python", "/no/such/python"],
            "--python /no/such/python cannot be started: No such file or directory. Give the path of a Python interpreter.",
        ),
        (
            ["--subject", "zoo:right", "--python", "a", "--python", "b"],
            "one --python runs a subject, and the frameworks' own: got a, b. Leave the others out.",
        ),
    ],
)
def test_a_wrong_call(arguments: list[str], message: str) -> None:
    assert called(*arguments) == (2, "", f"multibn: {message}\n")
