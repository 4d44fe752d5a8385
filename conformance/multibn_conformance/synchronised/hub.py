"""A group whose sums are made, counted and watched by the suite: each rank is connected to a hub.

It needs no framework, so that ranks of every framework can be in one group, and a defect can be a few threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Client, Listener, Pipe, wait
from typing import Any

import numpy as np

from multibn.layer.types import Array
from multibn.sync.group import PeersMissing

CONTROL = "control"
"""Key of the connection by which a process is told what to do."""


class HubGroup:
    """The group of one rank; see ``multibn.sync.Group``.

    Args:
        hub: a Hub in this process, or the address of one.
        key: of the channel.
        timeout: seconds.
    """

    def __init__(self, hub: Any, key: str, rank: int, size: int, timeout: float) -> None:
        self._hub, self._key, self.rank, self.size, self.timeout = hub, key, rank, size, timeout
        self._connection: Any = None
        self.world: HubGroup | None = None
        """All ranks there are, where the group is only some of them."""
        self.sums = 0
        self._channels: list[HubGroup] = []

    @property
    def all_sums(self) -> int:
        """Sums of this group and its channels."""
        return self.sums + sum(channel.all_sums for channel in self._channels)

    def sum(self, numbers: Array) -> None:
        """Add in place."""
        if self._connection is None:
            self._connection = self._hub.connect(self._key, self.rank, self.size)
        self.sums += 1
        self._connection.send(numbers)
        if not self._connection.poll(self.timeout):
            self._connection.send(None)
        came = self._connection.recv()
        if isinstance(came, list):
            raise PeersMissing(came, f"did not come within {self.timeout:g} s")
        numbers[:] = came

    def channel(self, key: str) -> HubGroup:
        """Another connection of the same ranks."""
        self._channels.append(HubGroup(self._hub, f"{self._key}/{key}", self.rank, self.size, self.timeout))
        return self._channels[-1]


class Hub:
    """Adds what the ranks of each channel send."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[int, Any]] = {}
        self.lengths: Counter[str] = Counter()
        """How often the ranks of a channel sent arrays of different lengths, where engines abort the process."""

    def connect(self, key: str, rank: int, size: int) -> Any:
        """A connection for a rank of this process."""
        ours, theirs = Pipe()
        self.add(key, rank, size, ours)
        return theirs

    def add(self, key: str, rank: int, size: int, connection: Any) -> None:
        """Let a rank in; its channel works as soon as all have come, or says who is missing."""
        with self._lock:
            ranks = self._waiting.setdefault(key, {})
            ranks[rank] = connection
            if len(ranks) == 1:
                threading.Thread(target=self._serve, args=(key, size), daemon=True).start()

    def _serve(self, key: str, size: int) -> None:
        sent: dict[int, Any] = {}
        open_: set[int] = set()
        gone: set[int] = set()
        while True:
            with self._lock:
                ranks = dict(self._waiting[key])
            open_ = set(ranks) - gone
            ready: list[Any] = wait([ranks[rank] for rank in open_], 0.02)
            for connection in ready:
                rank = next(each for each in open_ if ranks[each] is connection)
                try:
                    came = connection.recv()
                except (EOFError, OSError):
                    gone.add(rank)
                    continue
                if came is None:  # it gives up
                    if rank in sent:
                        connection.send([each for each in range(size) if each not in sent])
                    continue
                sent[rank] = came
            if len(sent) == size:
                if len({len(numbers) for numbers in sent.values()}) > 1:
                    self.lengths[key] += 1
                    total: Any = []
                else:
                    total = np.sum(list(sent.values()), axis=0)
                for rank in sent:
                    with contextlib.suppress(OSError):  # it is gone
                        ranks[rank].send(total)
                sent = {}
            if len(gone) == size:
                return


class RemoteHub:
    """A hub in another process, by its address."""

    def __init__(self, address: Any, secret: bytes) -> None:
        self._address, self._secret = address, secret

    def connect(self, key: str, rank: int, size: int) -> Any:
        """A connection for a rank."""
        connection = Client(self._address, authkey=self._secret)
        connection.send((key, rank, size))
        return connection


def listen(hub: Hub, secret: bytes, control: Callable[[int, Any], None]) -> Listener:
    """Let ranks in other processes connect to a hub, over a socket of this machine.

    Args:
        control: gets the number and the connection of each process that says it is there.
    """
    listener = Listener(family="AF_UNIX", authkey=secret)

    def accept() -> None:
        while True:
            try:
                connection: Any = listener.accept()
                key, rank, size = connection.recv()
            except (OSError, EOFError):
                return
            if key == CONTROL:
                control(rank, connection)
            else:
                hub.add(key, rank, size, connection)

    threading.Thread(target=accept, daemon=True).start()
    return listener
