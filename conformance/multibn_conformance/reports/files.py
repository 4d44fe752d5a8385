"""Writes a run to the files that were asked for: a page, JSON, JUnit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from multibn.usage import UsageError
from multibn_conformance.cases.case import Case
from multibn_conformance.judging.judge import Judgement
from multibn_conformance.subjects.backends import Absent, Candidate
from multibn_conformance.whitening.case import WhiteningCase


def check_writable(files: Mapping[str, Path | None]) -> None:
    """Before the run: whether each file, by the name of its option, can be written.

    Raises:
        UsageError: its folder is missing, or it is a folder itself.
    """
    for option, path in files.items():
        if path is not None and path.is_dir():
            raise UsageError(f"{option} {path} is a folder. Give the name of a file.")
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{option} {path} is in a folder that does not exist. Make {path.parent} first.")


def publish(
    files: Mapping[str, Path | None],
    judgements: Sequence[Judgement],
    candidates: Sequence[Candidate],
    absent: Sequence[Absent],
    cases: Sequence[Case | WhiteningCase],
    command: str,
    spec: str | None = None,
) -> None:
    """Write ``--html``, ``--json`` and ``--junit``, those that are not None; ``spec``: the text of ``--spec``."""
    if not any(files.values()):
        return
    from multibn_conformance.usage import spec_from

    from .html import html_report
    from .junit import junit
    from .record import record

    with Console(stderr=True).status("writing the report"):
        made = record(judgements, candidates, absent, cases, command, None if spec is None else spec_from(spec))
    writers: dict[str, Callable[[dict[str, Any]], str]] = {"--html": html_report, "--json": _json, "--junit": junit}
    for option, path in files.items():
        if path is not None:
            path.write_text(writers[option](made), encoding="utf-8")


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, allow_nan=False) + "\n"
