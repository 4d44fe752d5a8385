"""``SyncBatchNorm`` of Gluon, over gloo together with PyTorch, and over MPI."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mxnet")
pytest.importorskip("torch")
pytest.importorskip("mpi4py")

import ranks
import sync_mxnet_program


@pytest.mark.parametrize("engine", ["gloo", "mpi"])
def test_every_check_on_every_rank(engine: str, tmp_path: Path) -> None:
    ranks.warm()
    answers = ranks.run(f"sync_mxnet_program:over_{engine}", 3, tmp_path, mpi=engine == "mpi")
    assert ranks.failures(answers) == ""
    more = {"late"} if engine == "mpi" else set(sync_mxnet_program.with_torch)
    assert all(set(answer) == {*sync_mxnet_program.check, *more} for answer in answers)
