"""Judge the whitening layers of backends."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import track

from multibn_conformance.judging.judge import Judgement
from multibn_conformance.reports.whitening import show
from multibn_conformance.subjects.backends import Candidate
from multibn_conformance.whitening.case import WhiteningCase
from multibn_conformance.whitening.judge import judge


def run(judged: Sequence[Candidate], cases: Sequence[WhiteningCase], console: Console) -> list[Judgement]:
    """Judge the candidates that have a whitening layer and print the report; do nothing without such candidates or cases."""
    able = [each for each in judged if each.whitens]
    if not able or not cases:
        return []
    pairs = [(each, case) for each in able for case in cases]
    shown = track(pairs, "whitening", console=console, transient=True, disable=not console.is_terminal)
    judgements = [judge(*pair) for pair in shown]
    show(judgements, able, console)
    return judgements
