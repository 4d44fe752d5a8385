"""The ranks that share a batch, and how they add numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from multibn.layer.types import Array


class Group(Protocol):
    """What a synchronised layer needs of its peers.

    A group that a layer is given is used by that layer alone, in one thread at a time: ask ``channel`` for one for each layer.
    """

    rank: int
    """This process's number, 0 to size-1."""
    size: int
    """How many processes share a batch."""

    def sum(self, numbers: Array) -> None:
        """Add the one-axis int64 arrays of all ranks, in place, on all ranks.

        Raises:
            PeersMissing: a rank did not come in time, or is gone. The group cannot be used again.
        """

    def channel(self, key: str) -> Group:
        """A group of the same ranks whose messages meet no others; every rank must ask for the same keys, in the same order."""


class SyncError(RuntimeError):
    """Ranks disagree, or do not answer; nothing was changed by the call that raised it (SY-07, SY-08, SY-09)."""


class PeersMissing(SyncError):
    """A group could not add: some ranks did not come.

    Args:
        missing: their numbers, as far as known.
        reason: what happened, a clause without a full stop.
    """

    def __init__(self, missing: Sequence[int], reason: str) -> None:
        self.missing, self.reason = tuple(missing), reason
        super().__init__(f"{named(self.missing)} {reason}." if missing else f"{reason}.")


def named(ranks: Sequence[int]) -> str:
    """``rank 1``, or ``ranks 1, 2``."""
    return f"rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))}"


class Alone:
    """A group of one: nothing is exchanged (SY-10)."""

    rank = 0
    size = 1

    def sum(self, numbers: Array) -> None:
        """Nothing to add."""

    def channel(self, key: str) -> Alone:
        """Itself."""
        return self
