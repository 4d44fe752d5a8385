"""Write the report of a run to files: HTML, JSON and JUnit XML."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console

from multibn.usage import UsageError
from multibn_conformance.cases.case import Case
from multibn_conformance.judging.judge import Judgement
from multibn_conformance.subjects.backends import Absent, Candidate
from multibn_conformance.subjects.text import plain
from multibn_conformance.whitening.case import WhiteningCase


def check_writable(files: Mapping[str, Path | None]) -> None:
    """Check before the run that each file, by the name of its option, can be written.

    Raises:
        UsageError: a file cannot be written, or two options name the same one.
    """
    given = {option: path for option, path in files.items() if path is not None}
    for option, path in given.items():
        if reason := _unwritable(path):
            raise UsageError(f"cannot write {option} {plain(str(path))}: {reason}")
        twice = [other for other, its in given.items() if its.resolve() == path.resolve()]
        if len(twice) > 1 and path.resolve() != Path(os.devnull):
            raise UsageError(f"{' and '.join(twice)} name the same file, {plain(str(path))}. Give each its own.")


def _unwritable(path: Path) -> str | None:
    """Why a file cannot be written, and what to do."""
    try:
        if path.is_dir():
            return "it is a folder. Give the name of a file."
        if not path.parent.is_dir():
            return f"there is no folder {plain(str(path.parent))}. Make it first."
        if path.is_file():
            with path.open("ab"):
                return None
        if path.exists():  # a device or a pipe, which opening may change
            return None if os.access(path, os.W_OK) else "permission denied. Give another file."
        with TemporaryFile(dir=path.parent):
            return None
    except OSError as error:
        return f"{error.strerror}. Give another file."


def publish(
    files: Mapping[str, Path | None],
    judgements: Sequence[Judgement],
    candidates: Sequence[Candidate],
    absent: Sequence[Absent],
    cases: Sequence[Case | WhiteningCase],
    command: str,
    spec: str | None = None,
) -> None:
    """Write ``--html``, ``--json`` and ``--junit``, those that are not None; ``spec``: the text of ``--spec``.

    Raises:
        UsageError: a file can no longer be written.
    """
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
            try:
                path.write_text(writers[option](made), encoding="utf-8")
            except OSError as error:
                raise UsageError(f"cannot write {option} {plain(str(path))}: {error.strerror}. Give another file.") from error


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, allow_nan=False) + "\n"
