"""The two pipes to the process of a subject, read and written within a time limit and a limit of size."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from time import monotonic

MOST = 256 << 20
"""Bytes that one answer may have; the largest right one has about 3 MiB."""

_SLICE = 0.05
_PORTION = 1 << 20


class TooLarge(Exception):
    """An answer has more than ``MOST`` bytes."""


class Pipes:
    """A file to write requests to and to read answers from. It never waits longer than it was told.

    Args:
        requests, answers: the file descriptors of this side; closed by ``close``.
        alive: called while waiting: whether the process is running. Its exceptions pass through.
    """

    def __init__(self, requests: int, answers: int, alive: Callable[[], bool]) -> None:
        self._requests, self._answers, self._alive = requests, answers, alive
        for fd in (requests, answers):
            os.set_blocking(fd, False)
        self._left, self._received, self._last = 0.0, 0, monotonic()

    def begin(self, limit: float) -> None:
        """A new exchange: within so many seconds from now the request is written and its answer read."""
        self._left, self._received, self._last = limit, 0, monotonic()

    def write(self, data: bytes) -> None:
        """Write all of it.

        Raises:
            TimeoutError: the process does not take it in time.
            OSError: the process closed the pipe.
        """
        rest = memoryview(data)
        while rest:
            if not self._wait(self._requests, select.POLLOUT):
                raise BrokenPipeError
            try:
                rest = rest[os.write(self._requests, rest[:_PORTION]) :]
            except BlockingIOError:
                continue

    def flush(self) -> None:
        """Nothing is buffered."""

    def read(self, count: int) -> bytes:
        """So many bytes; fewer where the process closed the pipe or ended.

        Raises:
            TimeoutError: they do not come in time.
            TooLarge: the answer has more than ``MOST`` bytes.
        """
        self._received += count
        if self._received > MOST:
            raise TooLarge
        parts, missing = [], count
        while missing:
            if not self._wait(self._answers, select.POLLIN):
                break
            try:
                part = os.read(self._answers, min(missing, _PORTION))
            except BlockingIOError:
                continue
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close both."""
        os.close(self._requests)
        os.close(self._answers)

    def _wait(self, fd: int, event: int) -> bool:
        """Whether the pipe is ready; not if the process ended. A machine that was asleep meanwhile has not been waited for."""
        poll = select.poll()
        poll.register(fd, event)
        ready, alive = bool(poll.poll(0)), True
        while True:
            now = monotonic()
            self._left -= min(now - self._last, 2 * _SLICE)
            self._last = now
            if self._left <= 0:
                raise TimeoutError
            if ready or not alive:
                return ready
            alive = self._alive()
            ready = bool(poll.poll(1000 * min(_SLICE, self._left) if alive else 0))
