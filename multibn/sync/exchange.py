"""The protocol: one addition per pass of a layer, in which the ranks also find out whether they are at the same pass of the same
layer with the same settings (SY-03, SY-07 to SY-09).

Engines of message passing abort, or wait for ever, when ranks add arrays of different lengths. So the length must be known to all
before anyone knows what the others are about to do. It follows from what they have in common: each has seen the same results. A
channel remembers which call came after the last ones, and how wide the sums of each call were. A rank that is at the call that
all expect sends header and sums; any other sends a header and zeros in a message of the expected length, and all see that there
was a surprise. Then another round is needed: for the sums, where all made the same call, or for words, where they did not.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from multibn.layer.types import Array

from .group import Group, PeersMissing, SyncError, named
from .message import Window, pack, read_words, unpack, whole_window, window_around, window_of, write_words
from .sums import Sums

HEADER: Final = 8
_RANKS, _CALL, _SETTINGS, _SURPRISED, _TOO_WIDE, _REFUSED, _NEEDS, _COUNT = range(HEADER)

_CONTEXT: Final = 4
"""At most so many calls say which one comes next: more than 1 for layers that are used several times."""

_REFUSAL: Final = "!"
"""What the words of a rank that refuses its input begin with."""

_HASH_BYTES: Final = 6
"""Of a fingerprint: sums of 2^15 of them fit into an int64."""


class Call(NamedTuple):
    """One pass of one layer, as ranks compare it."""

    layer: str
    """The same text on all ranks for the same layer."""
    which: str
    """Which pass: "forward", "backward", "forward of a recomputation"."""
    channels: int
    kind: str
    """Type of the sums' input."""
    settings: str
    """What must be equal besides: text that is shown where it is not."""

    @property
    def words(self) -> str:
        """For messages."""
        return f"{self.layer}, {self.which}, {self.channels} channels, {self.kind}, {self.settings}"


class Exchange:
    """Adds the sums of all ranks over one channel, for one or several layers that take turns in the same order on all ranks."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rounds = self.bytes = self.calls = 0
        self._lock = threading.Lock()
        self._next: dict[tuple[int, ...], int] = {}
        self._past: tuple[int, ...] = ()
        self._frames: dict[int, tuple[int, Window]] = {}
        self._broken: str | None = None

    def add(self, call: Call, sums: Sums, count: int, needs: bool) -> int:
        """Make ``sums`` those of all ranks, in place; return how many values per channel all ranks have.

        Args:
            count: values per channel of this rank.
            needs: whether this rank's input needs a gradient; all do or none.

        Raises:
            SyncError: the ranks disagree (SY-07), one has refused its input (SY-08), or does not answer (SY-09).
        """
        with self._lock:
            return self._add(call, sums, count, needs, None)

    def refuse(self, call: Call, sums: Sums, words: str) -> None:
        """Tell the other ranks, which wait for this one, that it raises; returns when they know (SY-08).

        Args:
            sums: of nothing.
            words: what this rank raises.
        """
        with self._lock:
            try:
                self._add(call, sums, 0, False, words)
            except SyncError:
                return  # what this rank raises itself says more

    def _add(self, call: Call, sums: Sums, count: int, needs: bool, refusal: str | None) -> int:
        if self._broken is not None:
            raise SyncError(f"{call.words}: {self._broken} Start the processes again, or make a new group (SY-09).")
        self.calls += 1
        mine, settings = _fingerprint(call.layer, call.which, call.channels, call.kind), _fingerprint(call.settings)
        whole = whole_window(sums)
        expected = next((self._next[past] for past in _suffixes(self._past) if past in self._next), None)
        frame = self._frames.get(mine)
        too_wide = frame is not None and not frame[1].holds(window_of(sums))
        channels, window = self._frames[expected] if expected is not None else (0, whole)
        message = np.zeros(HEADER + channels * window.width, np.int64)
        surprised = expected != mine or too_wide
        message[:HEADER] = 1, mine, settings, surprised, too_wide, refusal is not None, needs, count
        if not surprised:
            pack(sums, window, message[HEADER:])
        self._sum(call, message)
        header = message[:HEADER].tolist()
        self._check(call, header, mine, settings, needs, refusal)
        if header[_SURPRISED]:
            window = whole if frame is None or header[_TOO_WIDE] else frame[1]
            message = np.zeros(call.channels * window.width, np.int64)
            pack(sums, window, message)
            self._sum(call, message)
            unpack(message, window, sums)
        else:
            unpack(message[HEADER:], window, sums)
        self._frames[mine] = call.channels, window_around(sums)
        for past in _suffixes(self._past):
            self._next[past] = mine
        self._past = (*self._past[1 - _CONTEXT :], mine)
        return int(header[_COUNT])

    def _check(self, call: Call, header: list[int], mine: int, settings: int, needs: bool, refusal: str | None) -> None:
        """Raise on all ranks where they cannot go on; all come to the same answer."""
        size = self.group.size
        agree = header[_RANKS] == size and header[_CALL] == size * mine and header[_SETTINGS] == size * settings
        if agree and not header[_REFUSED] and header[_NEEDS] in (0, size):
            return
        self._past = ()
        message = write_words(
            f"{call.words}, {'a' if needs else 'no'} gradient for x" if refusal is None else _REFUSAL + refusal,
            self.group.rank,
            size,
        )
        self._sum(call, message)
        said = read_words(message)
        refusing = [rank for rank, text in enumerate(said) if text.startswith(_REFUSAL)]
        if refusing:
            why = "; ".join(f"rank {rank}: {said[rank].removeprefix(_REFUSAL)}" for rank in refusing)
            raise SyncError(
                f"{call.words}: {named(refusing)} of {size} refused the input, so no rank went on, and nothing was changed "
                f"(SY-08). {why}"
            )
        raise SyncError(
            f"{call.words}: the {size} ranks are not at the same pass of the same layer with the same settings, so none went on, "
            f"and nothing was changed (SY-07). {_grouped(said)}"
        )

    def _sum(self, call: Call, message: Array) -> None:
        self.rounds += 1
        self.bytes += message.nbytes
        try:
            self.group.sum(message)
        except PeersMissing as error:
            who = f"{named(error.missing)} of {self.group.size} " if error.missing else ""
            self._broken = f"{who}{error.reason}."
            text = f"{call.words}, call {self.calls} of its channel: {self._broken} Nothing was changed (SY-09)."
            raise SyncError(text) from error
        except BaseException as error:
            self._broken = f"an earlier exchange ended with {type(error).__name__}: {error}."
            raise


def _suffixes(past: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The last calls, the longest first."""
    return [past[i:] for i in range(len(past))]


def _grouped(said: Sequence[str]) -> str:
    """``rank 0: ...; ranks 1, 2: ...``."""
    groups: dict[str, list[int]] = {}
    for rank, text in enumerate(said):
        groups.setdefault(text, []).append(rank)
    return "; ".join(f"{named(ranks)}: {text}" for text, ranks in groups.items())


def _fingerprint(*parts: object) -> int:
    """A number that is the same in all processes, for different texts a different one."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=_HASH_BYTES).digest(), "little")


_layers: WeakKeyDictionary[Group, int] = WeakKeyDictionary()
"""How many layers took a channel of a group."""


def open_channel(group: Group) -> tuple[Exchange | None, str]:
    """An exchange over a channel of its own for the next layer of a group, and the layer's text; no exchange for a group of one.

    The text is the same in every framework, where all ranks make their layers in the same order.
    """
    number = _layers[group] = _layers.get(group, 0) + 1
    text = f"layer {number} of the group"
    return (None if group.size == 1 else Exchange(group.channel(str(number)))), text
