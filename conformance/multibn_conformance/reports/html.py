"""The run as one page that needs nothing else: ``page/report.html.j2`` with its style and script inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from multibn.spec.batchnorm import BatchNormSpec, spec_text
from multibn.whitening.spec import WhiteningSpec

from . import charts

STATUSES = {"fail": "fails", "pass": "passes", "differs": "differs where it may", "skip": "skipped"}
"""The status of a check, in words; the worst first."""

DOUBTFUL = 100.0
"""Ulp from which the page explains how such an error can pass."""


def html_report(record: Mapping[str, Any]) -> str:
    """The page of a record."""
    loader = PackageLoader("multibn_conformance.reports", "page")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    texts = {name: Markup(loader.get_source(environment, f"report.{name}")[0]) for name in ("css", "js")}
    cells = _cells(record)
    return environment.get_template("report.html.j2").render(
        record=record,
        cells=cells,
        blank=_blank(cells),
        large=_large(cells),
        failures=_failures(record),
        left_out=_left_out(record),
        kappa_charts=charts.kappa_charts(record),
        moving_charts=charts.moving_charts(record),
        legend=charts.legend(record),
        statuses=STATUSES,
        short=short,
        backends=list(dict.fromkeys(subject["name"].split("/")[0] for subject in record["subjects"])),
        data=_data(record),
        Chart=charts,
        **texts,
    )


def _data(record: Mapping[str, Any]) -> Markup:
    """What the script shows, as JSON that can stand in a script element."""
    cases = [{**each, "code": _code(each)} for each in record["cases"]]
    wanted = {"clauses": record["clauses"], "cases": cases, "judgements": record["judgements"]}
    return Markup(json.dumps(wanted, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _code(case: Mapping[str, Any]) -> str:
    """The code of its spec."""
    if case["clause"].startswith("WH"):
        return repr(WhiteningSpec(**case["spec"]))
    return f"BatchNormSpec({spec_text(BatchNormSpec(**case['spec']))})"


def _cells(record: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """clause -> subject -> what a cell of the matrix says; clauses without a check are left out."""
    clause_of = {case["id"]: case["clause"] for case in record["cases"]}
    steps_of = {case["id"]: " ".join(case["steps"]) for case in record["cases"]}
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for clause in sorted({*clause_of.values()}):
        cells[clause] = {}
        for subject in record["subjects"]:
            found = [
                each for each in record["judgements"] if each["subject"] == subject["name"] and clause_of[each["case"]] == clause
            ]
            statuses = [each["status"] for each in found]
            status = next((each for each in ("fail", "pass", "differs", "skip") if each in statuses), "skip")
            ulps = [row["ulp"] for each in found for row in each["results"] if row["type"] != "float64"]
            if clause.startswith("WH"):  # no results are kept for whitening, only the worst error of each case
                ulps = [each["ulp"] for each in found if each["ulp"] is not None and "float64" not in steps_of[each["case"]]]
            worst = max(ulps, default=None) if status == "pass" else None
            parts = [row["part"] for each in found for row in each["results"] if row["part"] is not None]
            cells[clause][subject["name"]] = {
                "status": status,
                "count": len(found),
                "failing": statuses.count("fail"),
                "worst": short(worst) if worst else None,
                "ulp": worst or 0.0,
                "part": f"{100 * max(parts):.2g} %" if parts else None,
            }
    return cells


def _blank(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str | None:
    """Why cells are blank: "whitening" where only clauses of whitening have blank cells, None where no cell is."""
    clauses = {clause for clause, row in cells.items() for cell in row.values() if not cell["count"]}
    return None if not clauses else "whitening" if all(clause.startswith("WH") for clause in clauses) else "other"


def _large(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str] | None:
    """The largest error that passes, if it is so large that a reader may doubt the verdict."""
    found = ((cell["ulp"], clause, subject, cell["worst"]) for clause, row in cells.items() for subject, cell in row.items())
    ulp, clause, subject, worst = max(found, default=(0.0, "", "", None), key=lambda each: each[0])
    return {"clause": clause, "subject": subject, "worst": str(worst)} if ulp >= DOUBTFUL else None


def short(value: float | None) -> str:
    """0.5, 38, 300, 4e5: two digits where they count."""
    if value is None:
        return "no number"
    if value == 0 or 0.01 <= value < 1e4:
        return f"{float(f'{value:.2g}'):g}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def _failures(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first failure of each subject and clause, with how many there are."""
    cases = {case["id"]: case for case in record["cases"]}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for each in record["judgements"]:
        if each["status"] == "fail":
            case = cases[each["case"]]
            first = found.setdefault((each["subject"], case["clause"]), {**each, "about": case, "more": -1})
            first["more"] += 1
    return list(found.values())


def _left_out(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each reason once, with the cases that it left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in record["judgements"]:
        if each["status"] in ("skip", "differs"):
            reason = each["message"] if each["status"] == "skip" else "may differ, and does"
            found.setdefault((each["subject"], reason), []).append(each["case"])
    return [{"name": name, "reason": reason, "cases": cases} for (name, reason), cases in found.items()]
