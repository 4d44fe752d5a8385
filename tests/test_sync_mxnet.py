"""``SyncBatchNorm`` of Gluon, over gloo together with PyTorch, and over MPI."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("mxnet")
pytest.importorskip("torch")
pytest.importorskip("mpi4py")

import ranks
import sync_mxnet_program


@pytest.fixture(scope="module", params=["gloo", "mpi"])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    ranks.warm()
    mpi = request.param == "mpi"
    return ranks.run(f"sync_mxnet_program:over_{request.param}", 3, tmp_path_factory.mktemp("ranks"), mpi=mpi)


@pytest.mark.parametrize("check", [*sync_mxnet_program.CHECKS, *sync_mxnet_program.WITH_TORCH, "late"])
def test_on_every_rank(answers: list[Any], check: str) -> None:
    for rank, answer in enumerate(answers):
        assert isinstance(answer, dict), f"rank {rank}: {answer}"
    if check not in answers[0]:
        assert check in ({*sync_mxnet_program.WITH_TORCH, "late"})
        return  # of the other engine
    for rank, answer in enumerate(answers):
        assert answer[check] == "", f"rank {rank}:\n{answer[check]}"
