"""The built wheel, installed without extras into an empty environment: its contents, and that it works there."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

USE = """
import sys
import numpy as np
import multibn
assert not {"numba", "llvmlite", "torch", "mxnet", "jax"} & set(sys.modules), "importing multibn loads no framework and no Numba"
from multibn import BatchNormSpec, reference
from multibn.array import BatchNorm

x = np.random.default_rng(0).normal(3, 2, (4, 3, 5)).astype(np.float32)
layer = BatchNorm(3, 3)
y = layer.forward(x, training=True)
one, zero = np.ones(3, np.float32), np.zeros(3, np.float32)
same = reference.forward(x, one, zero, zero, one, BatchNormSpec(), training=True).y
print(y.tobytes() == same.tobytes(), layer.batches)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--disable-pip-version-check",
        "-w",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("multibn-*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an interpreter with the wheel and its dependencies, in the versions of constraints.txt."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    its = folder / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    command = [str(its), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints, str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return its


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_", "COVERAGE_", "NUMBA_"))}
    return subprocess.run([python, *arguments], env=kept, cwd=python.parent, capture_output=True, text=True)


def test_the_wheel_has_all_packages_and_their_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("multibn", "multibn_torch", "multibn_mxnet", "multibn_jax", "multibn_conformance"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert "multibn/article/page/article.html.j2" in names
    assert "multibn_conformance/reports/page/report.html.j2" in names
    assert "multibn_conformance/schemas/report.schema.json" in names
    assert not any(name.startswith(("tests/", "docs/", "backends/", "conformance/")) for name in names)


def test_it_is_used_in_an_empty_environment(python: Path) -> None:
    done = run(python, "-c", USE)
    assert (done.returncode, done.stdout) == (0, "True 1\n"), done.stderr


def test_its_command_works_and_says_what_is_missing(python: Path) -> None:
    program = str(python.with_name("multibn"))
    assert run(python, program, "--version").stdout == "multibn 0.1.0\n"
    assert run(python, program, "clauses", "BN-06").stdout.startswith("BN-06  The moving variance")
    done = run(python, program, "conform")
    missing = "multibn: multibn conform needs mpmath, which is not installed: pip install 'multibn[conformance]'\n"
    assert (done.returncode, done.stderr) == (2, missing)


@pytest.mark.parametrize(
    ("package", "absent", "extra"),
    [
        ("multibn_torch", "PyTorch, which is", "torch"),
        ("multibn_mxnet", "MXNet, which is", "mxnet"),
        ("multibn_jax", "JAX and Flax, which are", "jax"),
    ],
)
def test_a_layer_without_its_framework_says_what_to_install(python: Path, package: str, absent: str, extra: str) -> None:
    done = run(python, "-c", f"import {package}")
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: {package} needs {absent} not installed: pip install 'multibn[{extra}]'"
    )


USER = """
import numpy as np
from numpy.typing import NDArray
from multibn import BatchNormSpec, reference

spec: BatchNormSpec = BatchNormSpec.article()
x = np.zeros((2, 3), np.float32)
y: NDArray[np.float32] = reference.forward(x, None, None, x[0], x[1], spec, training=False).y
wrong: int = spec.eps
"""


def test_mypy_takes_the_types_of_the_package(tmp_path: Path) -> None:
    """In a user's file, mypy finds the mistake, and nothing is Any, as it would be without py.typed."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "MYPYPATH": ""}, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        'user.py:9: error: Incompatible types in assignment (expression has type "float", variable has type "int")  [assignment]',
        "Found 1 error in 1 file (checked 1 source file)",
    ]
