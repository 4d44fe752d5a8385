"""The recipes of CONTRIBUTING.md, followed in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

ROOT = Path(__file__).parents[1]
BLOCKS = {
    file: textwrap.dedent(block)
    for file, block in re.findall(r"<!-- (\S+) -->\n *```python\n(.*?) *```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Make a copy of multibn and its suite."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("multibn", "conformance/multibn_conformance"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    return tmp_path


def python(copy: Path, *arguments: str) -> str:
    """Return the output of a program that imports the copy."""
    path = os.pathsep.join(str(copy / each) for each in (".", "conformance"))
    env = {**os.environ, "PYTHONPATH": path, "NUMBA_DISABLE_JIT": "0"}
    done = subprocess.run([sys.executable, *arguments], env=env, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def append(copy: Path, file: str) -> None:
    with (copy / file).open("a") as out:
        out.write(f"\n\n{BLOCKS[file]}")


def test_a_clause(copy: Path) -> None:
    append(copy, "multibn/spec/clauses.py")
    append(copy, "conformance/multibn_conformance/cases/fixed/formulas.py")
    formulas = copy / "conformance/multibn_conformance/cases/fixed/formulas.py"
    text = formulas.read_text()
    if "inputs import Values" not in text:
        formulas.write_text(text.replace("\n\n\n", "\nfrom multibn_conformance.cases.inputs import Values\n\n\n", 1))
    cases = copy / "conformance/multibn_conformance/cases/fixed/__init__.py"
    text = (
        cases.read_text()
        .replace("import formulas", "import constants, formulas")
        .replace("accuracy) for", "accuracy, constants) for")
    )
    cases.write_text(text)
    out = python(copy, "-m", "multibn.cli", "conform", "--clause", "BN-17", "--backend", "numpy")
    assert out.splitlines()[-1] == "conforms: numpy/kernel/cpu, numpy/reference/cpu (2 checks)"


def test_a_defect(copy: Path) -> None:
    append(copy, "conformance/multibn_conformance/defects/formulas.py")
    code = """
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.cases.fixed.quick import QUICK
from multibn_conformance.defects.catalogue import DEFECTS
from multibn_conformance.judging.judge import judge_maker
defect = DEFECTS["squares-gamma"]
found = {id: judge_maker(defect.make, CASES[id], "a/b/c", "exact") for id in QUICK if CASES[id].clause == defect.clause}
print(sorted({each.status for each in found.values()}))
print(next(each.message.splitlines()[-1] for each in found.values() if each.status == "fail"))
"""
    statuses, hint = python(copy, "-c", code).splitlines()
    assert "fail" in statuses
    assert "squares-gamma: a port that drops the sign of gamma" in hint


def test_a_backend(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BLOCKS["mine.py"])
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[multibn.backends]\nmine = mine:BACKEND\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "multibn.cli", "conform", "--backend", "mine", "--clause", "BN-04"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("conforms: mine/plain/cpu (")
