"""``SyncBatchNorm`` of PyTorch in three processes over gloo. One test, since the processes take long to start."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import ranks
import sync_torch_program


def test_every_check_on_every_rank(tmp_path: Path) -> None:
    ranks.warm()
    answers = ranks.run("sync_torch_program:program", 3, tmp_path)
    assert ranks.failures(answers) == ""
    assert all(set(answer) == set(sync_torch_program.check) for answer in answers)
