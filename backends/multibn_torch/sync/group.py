"""The ranks of torch.distributed as a group of ``multibn.sync``.

Over gloo, messages go through connections of their own, so that they meet neither DistributedDataParallel's nor those of
another layer: gloo ends the process, uncatchably, where messages of different lengths meet. Over other engines (nccl, mpi)
they go through the process group that was given, on its device.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from multibn.layer.types import Array
from multibn.sync.exchange import Exchange
from multibn.sync.group import PeersMissing
from multibn_torch import compat

_LATE = 1.0
"""Seconds after which a rank writes into the store that it waits."""

_GRACE = 2.0
"""Seconds that a rank which gives up looks for the others' notes."""


class TorchGroup:
    """The ranks of a process group of torch.distributed.

    Args:
        process_group: of ``torch.distributed``; None for all ranks.
        key: names these connections; ``channel`` sets it.

    Raises:
        RuntimeError: ``torch.distributed.init_process_group`` was not called, or this rank is not in the group.
        PeersMissing: some ranks did not make the group within the process group's timeout.
    """

    def __init__(self, process_group: Any = None, key: str = "") -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "TorchGroup needs torch.distributed, which is not initialised. Call torch.distributed.init_process_group first."
            )
        self._parent = dist.group.WORLD if process_group is None else process_group
        self.rank, self.size = dist.get_rank(self._parent), dist.get_world_size(self._parent)
        if self.rank < 0:
            raise RuntimeError("TorchGroup needs a process group that this rank belongs to. Make it on the group's ranks alone.")
        self._key, self._sums = key, 0
        self._gloo: Any = None
        self._store: Any = None
        if "gloo" in dist.get_backend_config(self._parent):
            self._connect()

    def sum(self, numbers: Array) -> None:
        """Add in place; see ``multibn.sync.Group.sum``."""
        self._sums += 1
        tensor = torch.from_numpy(numbers)
        if self._gloo is None:
            there = tensor.to(compat.device_of(self._parent))
            dist.all_reduce(there, group=self._parent)
            tensor.copy_(there)
            return
        start, late = time.monotonic(), False
        work = self._gloo.allreduce([tensor])
        while True:
            try:
                work.wait(timedelta(seconds=_LATE))
                return
            except RuntimeError as error:  # this wait is over, or the connection is
                if work.is_completed():
                    raise self._missing(time.monotonic() - start, error) from error
            if not late:
                late = True
                self._note("waits")

    def channel(self, key: str) -> TorchGroup:
        """Connections of their own for the same ranks; every rank must ask for the same keys."""
        return TorchGroup(self._parent, f"{self._key}/{key}")

    def _connect(self) -> None:
        parent: Any = self._parent
        self._store = PrefixStore(f"multibn{self._key}", compat.store_of(parent))
        # each group with the same key has a number of its own, the same on all ranks that make them in the same order
        made = self._store.add(f"made by {self.rank}", 1)
        self._store = PrefixStore(str(made), self._store)
        start = time.monotonic()
        try:
            self._gloo = dist.ProcessGroupGloo(self._store, self.rank, self.size, compat.timeout_of(parent))
        except RuntimeError as error:
            raise self._missing(time.monotonic() - start, error) from error

    def _note(self, word: str) -> None:
        self._store.set(f"{word} {self._sums} {self.rank}", "")

    def _missing(self, waited: float, error: RuntimeError) -> PeersMissing:
        """Which ranks do not say, within a moment, that they wait for the same sum."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            gave_up = [rank for rank in others if self._store.check([f"gave up {self._sums} {rank}"])]
            self._note("waits")
            self._note("gave up")
            end = time.monotonic() + _GRACE
            while True:
                absent = [rank for rank in others if not self._store.check([f"waits {self._sums} {rank}"])]
                if not absent or time.monotonic() > end:
                    break
                time.sleep(0.02)
        except RuntimeError:  # the store is on a rank, the first one as a rule
            return PeersMissing(
                [], f"the rank that keeps torch.distributed's store is gone, after {waited:.1f} s: {_first_line(error)}"
            )
        if absent:
            return PeersMissing(absent, f"did not come, or ended, within {waited:.1f} s: {_first_line(error)}")
        return PeersMissing(gave_up, f"gave up waiting before this rank came, or the connection broke: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rpartition("] ")[2].strip(". ")


_shared: WeakKeyDictionary[Any, Exchange] = WeakKeyDictionary()


def shared_exchange(process_group: Any) -> Exchange | None:
    """The one exchange of all layers of a process group, which PyTorch runs in the same order on all ranks; None for one rank."""
    group = dist.group.WORLD if process_group is None else process_group
    if dist.get_world_size(group) == 1:
        return None
    if group not in _shared:
        _shared[group] = Exchange(TorchGroup(group))
    return _shared[group]
