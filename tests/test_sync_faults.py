"""Ranks that disagree, refuse, are late or die, over three processes by gloo: every rank gets an error, and nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import ranks
import sync_faults_program


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    ranks.warm()
    return ranks.run("sync_faults_program:program", 3, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", list(sync_faults_program.CHECKS))
def test_on_every_rank(answers: list[Any], check: str) -> None:
    for rank, answer in enumerate(answers):
        assert isinstance(answer, dict), f"rank {rank}: {answer}"
        assert answer[check] == "", f"rank {rank}:\n{answer[check]}"


def test_a_rank_that_dies(tmp_path: Path) -> None:
    answers = ranks.run("sync_faults_program:dies", 3, tmp_path, limit=60)
    assert answers[1] is None
    for answer in (answers[0], answers[2]):
        assert answer.startswith("bn, backward, 3 channels, float32, eps 1e-05, call 2 of its channel: ")
        assert "rank 1 of 3 did not come, or ended, within " in answer
