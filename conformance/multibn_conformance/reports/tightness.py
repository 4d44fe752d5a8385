"""How close right implementations come to the bounds.

``python -m multibn_conformance.reports.tightness docs/bounds.md`` writes the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from multibn.backend import Precision
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.judging.compare import result_errors, tried
from multibn_conformance.judging.perform import Make
from multibn_conformance.subjects.right import Right, Textbook, WorkingTextbook

RIGHT: dict[Precision, tuple[Make, ...]] = {"exact": (Right, Textbook), "working": (WorkingTextbook,)}
"""Right implementations: the reference's order of summation, and one value after the other."""

BEGIN, END = "<!-- written by multibn_conformance.reports.tightness -->", "<!-- end -->"


def nearest() -> dict[tuple[str, str, Precision], tuple[float, str]]:
    """Of each result, in each type, by each bound: the largest error as a part of its bound, and the case where it came."""
    found: dict[tuple[str, str, Precision], tuple[float, str]] = {}
    with np.errstate(all="ignore"):
        for precision, makes in RIGHT.items():
            for case in CASES.values():
                for make in makes if case.against == "oracle" else ():
                    if isinstance(tried(make, case, precision), str):
                        continue
                    for name, dtype, error in result_errors(case, make, precision):
                        key = name, dtype, precision
                        found[key] = max(found.get(key, (0.0, "")), (error.ratio, case.id))
    return found


def table() -> str:
    """The same in Markdown."""
    lines = ["| result | type | arithmetic | nearest to its bound | where |", "|---|---|---|---|---|"]
    for (name, dtype, precision), (part, case) in sorted(nearest().items()):
        lines.append(f"| {name} | {dtype} | {precision} | {part:.2g} | {case} |")
    return "\n".join(lines)


def main(path: Path) -> None:
    """Write the table into a page, between its marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
