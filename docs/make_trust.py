"""Make docs/trust.md and docs/trust.json: run what hands the layers and the suite wrong things, and write what came of it.

``python docs/make_trust.py [SECONDS [COUNT]]`` runs random programs for so long and damages so many files of each kind, 60 and
100,000 unless told; ``make docs/trust.md`` takes 600 seconds. ``python docs/make_trust.py page`` writes the page again, from
docs/trust.json.
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
    """Cells of a grid, each a case of one test, and how many failed."""
    report = DOCS.parent / "build" / "cells.xml"
    report.parent.mkdir(exist_ok=True)
    output("-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), "--junit-xml", str(report))
    cases = [
        case
        for case in ET.parse(report).getroot().iter("testcase")
        if str(case.get("name")).startswith("test_right_or_an_error[")
    ]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {"cells": len(cases), "failures": len(failed)}


def guarded() -> dict[str, int]:
    """Passes of the kernel between pages without access."""
    found = json.loads(output(str(TESTS / "guarded.py"), "100").splitlines()[-1])
    return {name: int(found[name]) for name in ("shapes", "types", "passes")}


def measure(soak: str, count: str) -> dict[str, Any]:
    """All of it."""
    torch = json.loads(re.match(r"\{[\s\S]*?\n\}", output(str(TESTS / "grid.py")))[0])["torch"]  # type: ignore[index]
    fuzzed = output(str(TESTS / "fuzz_port.py"), count).strip().splitlines()[-1]
    answers = output("-m", "pytest", "-s", "-q", str(TESTS / "test_vectors_fuzz.py"), MULTIBN_FUZZ=count).strip()
    told = re.search(r"(\d+) files, (\d+) refused", answers)
    assert told is not None, answers
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "count": int(count),
        "torch": torch,
        "mxnet": cells("test_mxnet_cells.py"),
        "numpy": cells("test_numpy_cells.py"),
        "guarded": guarded(),
        "checkpoints": fuzzed,
        "answers": {"files": int(told[1]), "refused": int(told[2]), "tests": answers.splitlines()[-1]},
        "gate": output("-m", "multibn_torch.studies.gate_cost", "700").splitlines(),
        "asked": float(soak),
        "soak": json.loads(output(str(TESTS / "soak.py"), soak).splitlines()[-1]),
    }


def page(found: dict[str, Any]) -> str:
    """The page."""
    torch, soak = found["torch"], found["soak"]
    programs = ", ".join(f"{count} of {place}" for place, count in soak["programs"].items())
    guarded, answers = found["guarded"], found["answers"]
    outcomes = ", ".join(f"{count} {name}" for name, count in torch.items() if name != "cells")
    checkpoints = re.sub(r"'([a-z ]+)': (\d+)", r"\2 \1", found["checkpoints"]).translate({ord("{"): None, ord("}"): None})
    rows = [
        ("wrong arguments, PyTorch", "python tests/grid.py", f"{torch['cells']} cells: {outcomes}"),
        ("wrong arguments, Gluon", "pytest tests/test_mxnet_cells.py", counts(found["mxnet"])),
        ("wrong arguments, NumPy", "pytest tests/test_numpy_cells.py", counts(found["numpy"])),
        (
            "kernel between guard pages",
            "python tests/guarded.py 100",
            f"{guarded['shapes']} shapes, {guarded['types']} types, {guarded['passes']} passes, no fault",
        ),
        ("damaged checkpoints", f"python tests/fuzz_port.py {found['count']}", checkpoints),
        (
            "hostile answers",
            f"MULTIBN_FUZZ={found['count']} pytest -s tests/test_vectors_fuzz.py",
            f"{answers['files']} files, {answers['refused']} refused; {answers['tests']}",
        ),
        (
            "random programs",
            f"python tests/soak.py {found['asked']:g}",
            f"{soak['seconds']} s, {sum(soak['programs'].values())} programs, {len(soak['differences'])} differences",
        ),
        ("cost of the gate", "python -m multibn_torch.studies.gate_cost 700", "; ".join(found["gate"])),
    ]
    lines = [f"| {what} | `{command}` | {told} |" for what, command, told in rows]
    return f"""# Trust

Whatever a program hands to a layer, the answer is the right numbers or a Python exception that says what is wrong, with the state
unchanged. This page is written by `make docs/trust.md`, which runs the commands below; `docs/trust.json` has the numbers.

| what | command | result |
|---|---|---|
{chr(10).join(lines)}

Made on {found["made"]} with Python {found["python"]}. A cell hands a layer one wrong thing (None, another type, size, rank,
device or layout, a subclass, freed or aliased memory, a change between forward and backward) in another process than the test's.
"raised" and "agreed" are the two right outcomes: an exception, or what the framework's own layer gives; a crash fails the cell.

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
- **The suite** bounds every wait for a subject, ends all processes that it started, also after SIGKILL (Linux), and shows any
  text safely.
"""


def counts(its: dict[str, int]) -> str:
    """Cells and failures, for a row."""
    return f"{its['cells']} cells, {its['failures']} failures"


if __name__ == "__main__":
    if sys.argv[1:] != ["page"]:
        made = measure(*(*sys.argv[1:], *("60", "100000")[len(sys.argv) - 1 :]))
        (DOCS / "trust.json").write_text(json.dumps(made, indent=1) + "\n")
    (DOCS / "trust.md").write_text(page(json.loads((DOCS / "trust.json").read_text())))
