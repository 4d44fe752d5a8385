"""``make gpu``, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")


def test_make_gpu_runs_with_pytorch_and_numpy_alone(tmp_path: Path) -> None:
    """Run in the interpreter, with imports of Numba and everything else that a GPU machine may lack blocked."""
    absent = ("numba", "llvmlite", "rich", "typer", "hypothesis", "sklearn", "scipy", "jinja2", "matplotlib", "pytest")
    program = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["gpu_check.py", {str(tmp_path / "gpu.json")!r}]
runpy.run_path({str(Path(__file__).with_name("gpu_check.py"))!r}, run_name="__main__")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"MULTIBN_GPU_SECONDS": "900"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    came = json.loads((tmp_path / "gpu.json").read_text())
    assert (came["wrong"], came["not_done"]) == ([], [])
    assert came["environment"]["interpreter"] == (not torch.cuda.is_available())
    assert all(each["right"] for each in came["bits"] + came["repeats"])
    assert {each["dtype"] for each in came["bits"]} == {"float16", "bfloat16", "float32", "float64"}
    for implementation in ("kernel", "framework"):
        (clauses,) = (its for name, its in came["clauses"].items() if name.startswith(f"torch/{implementation}/"))
        assert sum(verdicts.get("pass", 0) for verdicts in clauses.values()) > 5
    assert len(came["times"]) == len(came["repeats"]) > 0
    count = len(came["bits"])
    assert f"bits of the CPU (BN-15): {count} of {count} checks equal" in done.stdout


def gpu_check(root: Path, json_file: Path, seconds: int = 900) -> Any:
    """`make gpu` in a copy of the project."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"MULTIBN_GPU_SECONDS": str(seconds)}
    command = [sys.executable, str(root / "tests" / "gpu_check.py"), str(json_file)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)


WRONG = {
    "another order of lanes": (
        "return tl.where(lane < COUNT // 2, low, high)",
        "return tl.where(lane < width, lane, -1)",
        "(4, 3, 5, 6) float64 NCHW",
    ),
    "bfloat16 rounded twice": (
        "code = tl.where(inexact & even,",
        "code = tl.where(inexact & (code < code),",
        "rounding to bfloat16",
    ),
    "an approximate root": (
        "1.0 / tl.sqrt(var + _float64(eps))",
        "(1.0 / tl.sqrt((var + _float64(eps)).to(tl.float32))).to(tl.float64)",
        "(4, 3, 5, 6) float32 NCHW",
    ),
}
"""What is wrong -> a line of ``passes.py``, the line in its place, and what `make gpu` says of it."""


@pytest.mark.parametrize("name", WRONG)
def test_make_gpu_fails_for_a_wrong_kernel(name: str, tmp_path: Path) -> None:
    right, wrong, said = WRONG[name]
    root = Path(__file__).parents[1]
    for folder in ("multibn", "backends", "conformance", "tests"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "backends" / "multibn_torch" / "triton_kernel" / "passes.py"
    assert file.read_text().count(right) == 1
    file.write_text(file.read_text().replace(right, wrong))
    done = gpu_check(tmp_path, tmp_path / "gpu.json")
    assert done.returncode == 1, done.stdout + done.stderr
    came = json.loads((tmp_path / "gpu.json").read_text())["wrong"]
    assert any(said in each for each in came)
    assert f"WRONG: {came[0]}" in done.stdout


def test_make_gpu_tells_what_it_had_no_time_for(tmp_path: Path) -> None:
    done = gpu_check(Path(__file__).parents[1], tmp_path / "gpu.json", seconds=1)
    came = json.loads((tmp_path / "gpu.json").read_text())
    assert (done.returncode, came["wrong"], came["bits"]) == (2, [], [])
    assert f"not done, for the time was up: {len(came['not_done'])}, rounding to float32 on " in done.stdout
