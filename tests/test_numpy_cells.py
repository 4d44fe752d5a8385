"""For any argument, NumPy layers and the kernel raise with their state unchanged, or agree with the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from numpy_cells import CELLS


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    program = Path(__file__).with_name("numpy_cells.py")
    done = subprocess.run([sys.executable, "-W", "ignore", str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("name", CELLS)
def test_right_or_an_error(name: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[name] == {"value": None}
