"""Ranks that disagree, refuse, are late or die, in three processes over gloo: every rank raises, and nothing changes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import ranks
import sync_faults_program


def test_every_check_on_every_rank(tmp_path: Path) -> None:
    ranks.warm()
    answers = ranks.run("sync_faults_program:program", 3, tmp_path)
    assert ranks.failures(answers) == ""
    assert all(set(answer) == set(sync_faults_program.check) for answer in answers)


def test_a_rank_that_dies(tmp_path: Path) -> None:
    answers = ranks.run("sync_faults_program:dies", 3, tmp_path, limit=60)
    assert answers[1] is None
    for answer in (answers[0], answers[2]):
        assert answer.startswith("bn, backward, 3 channels, float32, eps 1e-05, call 2 of its channel: ")
        assert "rank 1 of 3 did not come, or ended, within " in answer
