"""Run functions in several processes at once, as ranks of one group, with a time limit.

A program is a function ``program(rank, size, folder)`` of a module in this folder. It returns the results for the test; an
exception is returned as text.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    # Open MPI refuses to start for root, on more ranks than processors, and looks for networks
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_btl": "self,sm",
}


def run(program: str, size: int, folder: Path, limit: float = 240.0, mpi: bool = False) -> list[Any]:
    """Return the result of each rank; None for one that was killed.

    Args:
        program: ``module:function``.
        folder: an empty one, for what the ranks share.
        limit: seconds after which the processes are killed, and the test fails.
        mpi: start them by mpirun.
    """
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    here = [sys.executable, str(HERE / "ranks.py"), program, str(folder)]
    commands = [["mpirun", "-n", str(size), *here]] if mpi else [[*here, str(rank), str(size)] for rank in range(size)]
    if mpi:
        commands[0][0] = str(Path(sys.executable).parent / "mpirun")
    logs = [(folder / f"{i}.log").open("w+") for i in range(len(commands))]
    started = [
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        for command, log in zip(commands, logs, strict=True)
    ]
    end, late = time.monotonic() + limit, False
    try:
        for process in started:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        said = ""
        for log in logs:
            log.seek(0)
            said += log.read()
            log.close()
    assert not late, f"{program} did not end within {limit} s:\n{said}"
    found: list[Any] = []
    for rank in range(size):
        path = folder / f"{rank}.pickle"
        found.append(pickle.loads(path.read_bytes()) if path.exists() else None)
    assert any(answer is not None for answer in found), said
    return found


def warm() -> None:
    """Compile here what the ranks will load from disk."""
    import numpy as np

    from multibn.sync import passes
    from multibn.sync.passes import Peers, SyncSettings

    for kind in ("float32", "float64", "int16", "uint16"):
        x, peers = np.zeros((2, 3, 4), kind), Peers(None, "warm")
        batch = passes.describe(x, peers, SyncSettings(1e-5, 0.9, True, True, True), True)
        passes.normalise(x, x.copy(), None, None, batch.saved)
        means = passes.gradients(x, x, None, batch, peers, True).means
        assert means is not None
        passes.propagate(x, x, x.copy(), means, batch)


def main() -> None:
    """Run one rank."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"mxnet\.")  # as in pyproject.toml
    name, folder, *numbers = sys.argv[1:]
    module, _, function = name.partition(":")
    if numbers:
        rank, size = map(int, numbers)
    else:
        from mpi4py import MPI

        rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    try:
        answer = getattr(importlib.import_module(module), function)(rank, size, Path(folder))
    except BaseException:
        answer = traceback.format_exc()
        print(answer, file=sys.stderr)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(answer))


def failures(answers: list[Any]) -> str:
    """What the ranks' checks raised, "" for nothing: for the one test that runs all checks of a program."""
    told = []
    for rank, answer in enumerate(answers):
        if isinstance(answer, dict):
            told += [f"{check}, rank {rank}:\n{text}" for check, text in answer.items() if text]
        else:
            told.append(f"rank {rank}: {answer}")
    return "\n".join(told)


class Checks(dict[str, Callable[..., None]]):
    """Functions that all ranks run at the same time, by their names; decorate each with an instance."""

    def __call__(self, function: Callable[..., None]) -> Callable[..., None]:
        self[function.__name__] = function
        return function


def over_gloo(checks: Checks, rank: int, size: int, folder: Path) -> dict[str, str]:
    """Run the checks with a process group of torch.distributed."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        return outcomes(checks, rank, size)
    finally:
        dist.destroy_process_group()


def outcomes(checks: dict[str, Any], *arguments: Any) -> dict[str, str]:
    """Run each check; return "" for one that passed, else its traceback."""
    found = {}
    for name, check in checks.items():
        try:
            check(*arguments)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    main()
