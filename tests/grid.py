"""A grid of wrong arguments: each cell passes one wrong argument to a layer, in a separate process, and judges the outcome.

A runner starts a process for many cells. The process prints a line when a cell begins and one when it ends, so that a crash
costs one cell: the next process goes on behind it. ``python tests/grid.py --write PATH`` runs the grids of all frameworks that
are installed and writes the numbers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

GRIDS = {"torch": "torch_grid"}
"""Framework -> module beside this one with ``CELLS``, name -> function that returns "agreed", "raised" or "wrong: ...". It is
told whether to ask the framework's own layer, too, and prints "own" before it does."""


def run(framework: str, timeout: float = 600) -> dict[str, str]:
    """Verdict of each cell: "agreed", "raised", "wrong: ..." or "crashed: ...".

    Args:
        timeout: seconds for each process.
    """
    verdicts: dict[str, str] = {}
    count, crashed_own = -1, ""
    while count < 0 or len(verdicts) < count:
        command = [sys.executable, "-W", "ignore", __file__, "--cells", framework, "--after", str(len(verdicts))]
        command += ["--without", crashed_own] if crashed_own else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        begun = own = ""
        for line in done.stdout.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "count":
                count = int(rest)
            elif kind == "begin":
                begun, own = rest, ""
            elif kind == "own":
                own = begun
            elif kind == "end":
                name, verdict = json.loads(rest)
                verdicts[name], begun = verdict, ""
        if begun and own:  # the framework's own layer has crashed: once more without it
            crashed_own = own
        elif begun:
            verdicts[begun] = f"crashed: exit status {done.returncode}"
        elif count < 0 or (done.returncode and len(verdicts) < count):
            raise RuntimeError(f"the grid of {framework} did not run: {done.stderr[-2000:]}")
    return verdicts


def serve(framework: str, after: int, without: str) -> None:
    """Run the cells from a number on and print the outcome of each.

    Args:
        without: the cell in which the framework's own layer crashes.
    """
    cells = importlib.import_module(GRIDS[framework]).CELLS
    print(f"count {len(cells)}", flush=True)
    for name, cell in list(cells.items())[after:]:
        print(f"begin {name}", flush=True)
        print(f"end {json.dumps([name, cell(name != without)])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="where the numbers go, as JSON")
    parser.add_argument("--cells", choices=GRIDS, help=argparse.SUPPRESS)
    parser.add_argument("--without", default="", help=argparse.SUPPRESS)
    parser.add_argument("--after", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cells:
        serve(given.cells, given.after, given.without)
        return
    found = {framework: run(framework) for framework in GRIDS if importlib.util.find_spec(framework)}
    numbers = {
        framework: {"cells": len(verdicts), **Counter(verdict.partition(":")[0] for verdict in verdicts.values())}
        for framework, verdicts in found.items()
    }
    text = json.dumps(numbers, indent=1, sort_keys=True) + "\n"
    if given.write:
        given.write.write_text(text)
    print(text, end="")
    for verdicts in found.values():
        for name, verdict in verdicts.items():
            if verdict not in ("agreed", "raised"):
                print(f"{name}: {verdict}")


if __name__ == "__main__":
    main()
