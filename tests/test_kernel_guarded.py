"""The kernel reads and writes inside its buffers alone: ``guarded.py``, in processes of their own, since a fault ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

for _needed in ("numba", "mpmath", "hypothesis"):
    pytest.importorskip(_needed, reason=f"{_needed} is not installed")
if sys.platform != "linux":
    pytest.skip("guard pages are set by Linux's mprotect", allow_module_level=True)

SCRIPT = Path(__file__).with_name("guarded.py")


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], env={**os.environ, **settings}, capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["float32", "float64", "int16", "uint16"])
def test_no_pass_leaves_its_buffers(kind: str) -> None:
    done = run("40", kind)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "compiling" not in line]) == (0, [])
    found = json.loads(done.stdout)
    assert found["shapes"] > 90
    assert found["passes"] == 24 * found["shapes"]


def test_no_index_is_out_of_bounds(tmp_path: Path) -> None:
    """Compiled with Numba's check of each index; an IndexError in a compiled body is printed, so stderr has to be empty."""
    done = run("5", "float32", NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))
    assert (done.returncode, [line for line in done.stderr.splitlines() if "compiling" not in line]) == (0, [])


@pytest.mark.parametrize("at_end", [True, False])
def test_a_value_outside_ends_the_process(at_end: bool) -> None:
    """The guard itself: one value behind the end, one before the beginning."""
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import ctypes, guarded; "
        f"new = guarded.Guarded({at_end}); a = new(1024, 'float32'); "
        f"ctypes.c_float.from_address(a.ctypes.data + 4 * {1024 if at_end else -1}).value"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
