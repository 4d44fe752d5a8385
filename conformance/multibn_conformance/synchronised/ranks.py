"""The ranks that perform a case: threads of this process, or processes that are started for it and always end."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from .case import CASES, SyncCase
from .hub import Hub, HubGroup, listen
from .perform import Answer, MakeSynchronised, perform
from .right import Right

START, ANSWER = 120.0, 300.0
"""Seconds that processes may take to start, and to answer a case: the first one may have to compile."""


@cache
def compile_first() -> None:
    """Compile the kernel for both types of the cases, which takes longer than a rank waits for the others."""
    for name in ("unequal-ranks", "any-split"):
        _by_threads(Right, CASES[name](2), 2, ANSWER)


def by_threads(make: MakeSynchronised, case: SyncCase, size: int, timeout: float = 2.0) -> list[list[Answer]]:
    """The answers of the group's ranks, by a thread each."""
    compile_first()
    return _by_threads(make, case, size, timeout)


def _by_threads(make: MakeSynchronised, case: SyncCase, size: int, timeout: float) -> list[list[Answer]]:
    hub, answers = Hub(), {}
    world = f"world of {case.id}"

    def rank_of(rank: int) -> None:
        members = next(group for group in case.groups(size) if rank in group)
        group = HubGroup(hub, f"{case.id} of {members}", members.index(rank), len(members), timeout)
        group.world = HubGroup(hub, world, rank, size, timeout) if len(members) < size else None
        answers[rank] = perform(make, case, members.index(rank), group)

    threads = [threading.Thread(target=rank_of, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ANSWER)
    return [answers.get(rank) or [Answer(error="no answer", kind="Hang")] * len(case.steps) for rank in case.members]


class Silent(Exception):
    """The processes do not answer, or ended."""


class Processes:
    """So many processes, each of which can be a rank of any backend. Use as a context manager: they end with it.

    What they write to stderr is passed on after each case, but for the errors that they answered: MXNet raises these with words
    of its own, so Gluon's layers print them too.

    Raises:
        Silent: they do not start, or do not answer in time.
    """

    def __init__(self, size: int) -> None:
        self.size, self.hub = size, Hub()
        self._controls: dict[int, Any] = {}
        self._runs = 0

    def __enter__(self) -> Processes:
        secret = secrets.token_hex(16)
        self._listener = listen(self.hub, secret.encode(), self._controls.__setitem__)
        environment = {
            **os.environ,
            "MULTIBN_HUB": str(self._listener.address),
            "MULTIBN_HUB_SECRET": secret,
            "OMP_NUM_THREADS": "1",
        }
        self._folder = TemporaryDirectory(prefix="multibn-ranks-")
        self._read = [0] * self.size
        self._started = [self._start(rank, environment) for rank in range(self.size)]
        end = time.monotonic() + START
        while len(self._controls) < self.size:
            if time.monotonic() > end or any(process.poll() is not None for process in self._started):
                self.__exit__(None, None, None)
                raise Silent(f"{self.size} processes did not start within {START:g} s, or ended.")
            time.sleep(0.02)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for connection in self._controls.values():
            connection.close()  # which ends them
        end = time.monotonic() + 5
        for process in self._started:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._listener.close()
        for rank in range(self.size):
            sys.stderr.write(self._said(rank))
        self._folder.cleanup()

    def _start(self, rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"{__package__}.worker", str(rank), str(self.size)]
        with self._log(rank).open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"{rank}.log"

    def _said(self, rank: int) -> str:
        """What a process wrote to stderr since the last call."""
        new = self._log(rank).read_bytes()[self._read[rank] :]
        self._read[rank] += len(new)
        return new.decode(errors="replace")

    def _ended(self, rank: int) -> Silent:
        with suppress(subprocess.TimeoutExpired):
            self._started[rank].wait(5)
        said = self._said(rank).strip() or "nothing"
        return Silent(f"the process of rank {rank} ended, with exit code {self._started[rank].poll()}; on stderr it said: {said}")

    def run(self, backends: Sequence[str], case: SyncCase) -> list[list[Answer]]:
        """The answers of the group's ranks; rank r is of the backend r modulo their number."""
        self._runs += 1
        for rank in range(self.size):
            members = next(group for group in case.groups(self.size) if rank in group)
            key, world = f"{self._runs} {case.id} of {members}", f"{self._runs} world"
            try:
                self._controls[rank].send((backends[rank % len(backends)], case, key, members.index(rank), len(members), world))
            except OSError as error:
                raise self._ended(rank) from error
        end = time.monotonic() + ANSWER
        answers: dict[int, list[Answer]] = {}
        waiting = {control: rank for rank, control in self._controls.items()}
        while waiting:
            ready: list[Any] = wait(list(waiting), max(0.1, end - time.monotonic()))
            if not ready:
                raise Silent(f"rank {min(waiting.values())} did not answer {case.id} within {ANSWER:g} s.")
            for control in ready:
                rank = waiting.pop(control)
                try:
                    came = control.recv()
                except (EOFError, OSError) as error:
                    raise self._ended(rank) from error
                answers[rank] = [Answer(error=came, kind="Error")] * len(case.steps) if isinstance(came, str) else came
        for rank in range(self.size):
            said = self._said(rank)
            for answer in answers[rank]:
                said = said.replace(f"multibn: {answer.error}\n", "", 1)
            sys.stderr.write(said)
        return [answers[rank] for rank in case.members]
