"""``SyncBatchNorm`` of PyTorch over three processes, by gloo."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import ranks
import sync_torch_program


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    ranks.warm()
    return ranks.run("sync_torch_program:program", 3, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", list(sync_torch_program.CHECKS))
def test_on_every_rank(answers: list[Any], check: str) -> None:
    for rank, answer in enumerate(answers):
        assert isinstance(answer, dict), f"rank {rank}: {answer}"
        assert answer[check] == "", f"rank {rank}:\n{answer[check]}"
