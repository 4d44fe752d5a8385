"""A group over MPI, by mpi4py: ``pip install 'multibn[mpi]'``."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from multibn.layer.types import Array

from .group import PeersMissing

TIMEOUT = 1800.0
"""Seconds that a sum may wait, as PyTorch's groups do."""

_SPIN = 2e-3
"""Seconds of asking without a pause: usual messages take microseconds. After them the processor is left to others."""

_PRESENT = 21093
"""Tag of the message by which a rank that gives up tells the others that it is there."""

_GRACE = 1.0
"""Seconds that a rank which gives up waits for such messages."""

_unfinished: list[Any] = []
"""Messages that MPI may still write to."""


class MpiGroup:
    """The ranks of an MPI communicator, such as ``mpi4py.MPI.COMM_WORLD``.

    Where several layers run at once, as in MXNet, MPI must have been started with MPI_THREAD_MULTIPLE, mpi4py's default.

    Args:
        comm: of mpi4py. It is duplicated, so that messages meet no others; all its ranks must make the group.
        timeout: seconds after which a sum raises: MPI itself waits for ever.

    Raises:
        ValueError: a timeout that is not > 0.
        PeersMissing: some ranks did not make the group in time.
    """

    def __init__(self, comm: Any, timeout: float = TIMEOUT) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds > 0, got {timeout!r}.")
        self.timeout = timeout
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._comm = comm
        copy, request = comm.Idup()
        self._finish(request, copy)
        self._comm = copy

    def sum(self, numbers: Array) -> None:
        """Add in place; see ``Group.sum``."""
        from mpi4py import MPI

        self._finish(self._comm.Iallreduce(MPI.IN_PLACE, numbers), numbers)

    def channel(self, key: str) -> MpiGroup:
        """Another copy of the communicator; the key is not needed."""
        return MpiGroup(self._comm, self.timeout)

    def _finish(self, request: Any, kept: Any) -> None:
        """Wait for a request until the time is over, or until another rank gives up."""
        start = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - start
            gave_up = waited > _SPIN and self._hear()
            if gave_up or waited > self.timeout:
                _unfinished.append((request, kept))
                raise self._missing({gave_up[0]} if gave_up else set())
            time.sleep(0 if waited < _SPIN else min(1e-3, waited / 20))
        gave_up = self._hear()
        if gave_up:  # the sum is whole here, but others have raised
            raise self._missing({gave_up[0]})

    def _missing(self, heard: set[int]) -> PeersMissing:
        """Tell the other ranks that this one gives up; the error names those that do not tell the same within a moment."""
        others = {rank for rank in range(self.size) if rank != self.rank}
        word = np.zeros(1, np.int64)
        for rank in others:
            _unfinished.append((self._comm.Isend(word, rank, _PRESENT), word))
        end = time.monotonic() + _GRACE
        while heard != others and time.monotonic() < end:
            heard |= set(self._hear())
            time.sleep(1e-3)
        if heard == others:
            return PeersMissing(sorted(others), "gave up waiting before this rank came")
        return PeersMissing(sorted(others - heard), f"did not come within {self.timeout:g} s")

    def _hear(self) -> list[int]:
        """A rank that has given up, if one has."""
        from mpi4py import MPI

        status = MPI.Status()
        if not self._comm.Iprobe(MPI.ANY_SOURCE, _PRESENT, status):
            return []
        self._comm.Recv(np.zeros(1, np.int64), status.Get_source(), _PRESENT)
        return [status.Get_source()]
