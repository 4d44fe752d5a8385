"""Make docs/trust.md and docs/trust.json: run what hands the layers and the suite wrong things, and write what came of it.

``python docs/make_trust.py [SECONDS]`` runs random programs for so long; ``make docs/trust.md`` runs it with 600.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

DOCS, TESTS = Path(__file__).parent, Path(__file__).parents[1] / "tests"


def output(*command: str, **settings: str) -> str:
    """What a program printed; its exit status is judged by the caller, from that."""
    done = subprocess.run([sys.executable, *command], env={**os.environ, **settings}, capture_output=True, text=True)
    sys.stderr.write(done.stderr[-500:] if done.returncode else "")
    return done.stdout


def cells(file: str) -> dict[str, int]:
    """Cells of a grid that is a test each, and how many fail."""
    report = DOCS.parent / "build" / "cells.xml"
    report.parent.mkdir(exist_ok=True)
    output("-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), "--junit-xml", str(report))
    suite = ET.parse(report).getroot()[0]
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def guarded() -> dict[str, int]:
    """Passes of the kernel between pages without access."""
    found = json.loads(output(str(TESTS / "guarded.py"), "100").splitlines()[-1])
    return {name: int(found[name]) for name in ("shapes", "types", "passes")}


def measure(soak: str) -> dict[str, Any]:
    """All of it."""
    torch = json.loads(re.match(r"\{[\s\S]*?\n\}", output(str(TESTS / "grid.py")))[0])["torch"]  # type: ignore[index]
    fuzzed = output(str(TESTS / "fuzz_port.py"), "100000").strip().splitlines()[-1]
    answers = output("-m", "pytest", "-s", "-q", str(TESTS / "test_vectors_fuzz.py"), MULTIBN_FUZZ="100000").strip()
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch,
        "mxnet": cells("test_mxnet_cells.py"),
        "numpy": cells("test_numpy_cells.py"),
        "guarded": guarded(),
        "checkpoints": fuzzed,
        "answers": answers.splitlines()[-1],
        "soak": json.loads(output(str(TESTS / "soak.py"), soak).splitlines()[-1]),
    }


def page(found: dict[str, Any]) -> str:
    """The page."""
    torch, soak = found["torch"], found["soak"]
    programs = ", ".join(f"{count} of {place}" for place, count in soak["programs"].items())
    rows = [
        ("wrong arguments, PyTorch", "python tests/grid.py", ", ".join(f"{name} {count}" for name, count in torch.items())),
        ("wrong arguments, Gluon", "pytest tests/test_mxnet_cells.py", counts(found["mxnet"])),
        ("wrong arguments, NumPy", "pytest tests/test_numpy_cells.py", counts(found["numpy"])),
        (
            "kernel between guard pages",
            "python tests/guarded.py 100",
            "{shapes} shapes, {types} types, {passes} passes, no fault",
        ),
        ("damaged checkpoints", "python tests/fuzz_port.py 100000", found["checkpoints"]),
        ("hostile answers", "MULTIBN_FUZZ=100000 pytest -s tests/test_vectors_fuzz.py", found["answers"]),
        ("random programs", "make soak", f"{soak['seconds']} s, {len(soak['differences'])} differences"),
    ]
    lines = [f"| {what} | `{command}` | {told.format(**found['guarded'])} |" for what, command, told in rows]
    return f"""# Trust

Whatever a program hands to a layer, the answer is the right numbers or a Python exception that says what is wrong, with the state
unchanged. This page is written by `make docs/trust.md`, which runs the commands below; `docs/trust.json` has the numbers.

| what | command | result |
|---|---|---|
{chr(10).join(lines)}

Made on {found["made"]} with Python {found["python"]}. A cell hands a layer one wrong thing (None, another type, size, rank,
device or layout, a subclass, freed or aliased memory, a change between forward and backward) in a process of its own. "raised"
and "agreed" are the two right outcomes: an exception, or what the framework's own layer gives; a crash fails the cell.

Random programs: {programs}; the process grew by {soak["grown_mib"]} MiB, at most {soak["allowed_mib"]} are allowed.

## What protects whom

- **One gate for each framework** (`multibn_torch/forward/gate.py`, `multibn_mxnet/gate.py`, `multibn/kernel/arrays.py`) examines
  every tensor or array before compiled code gets its address.
- **Nothing is allocated after the first pass has begun**, and the counter of updates goes up last: a forward that runs out of
  memory leaves its state alone.
- **The kernel's disk cache** begins each file with a digest. A damaged file is reported in one line, set aside and compiled anew;
  a full disk costs the cache only; a folder that others may write to is refused.
- **Forks** wait for a thread that compiles. **The processor's mode** (rounding, denormals) is set for each pass and restored.
- **Memory that is kept** for large outputs is bounded by what is in use: `multibn.memory`.
- **The suite** bounds every wait for a subject, ends all processes that it started, and shows any text safely.
"""


def counts(its: dict[str, int]) -> str:
    """Cells and failures, for a row."""
    return f"{its['tests'] - its['skipped']} cells, {its['failures'] + its['errors']} failures"


if __name__ == "__main__":
    numbers = measure(sys.argv[1] if len(sys.argv) > 1 else "60")
    (DOCS / "trust.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (DOCS / "trust.md").write_text(page(numbers))
