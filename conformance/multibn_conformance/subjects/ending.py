"""End the processes of subjects, and all that these started: after use, when the program exits, and when a signal ends it.

A subject's process carries a mark in its environment, which its descendants inherit. ``/proc`` shows it, so they are found even
if they left the process group, began a session of their own or lost their parent. Without ``/proc``, only the group is ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep
from types import FrameType
from uuid import uuid4

VARIABLE = "MULTIBN_SUBJECT"
"""The environment variable that holds the mark."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end the program and would leave its children running."""

_PROCESSES = Path("/proc")
_ROUNDS = 200
_live: set[str] = set()


def new_mark() -> str:
    """A mark for a process that is about to start; its processes end with the program from now on."""
    mark = f"{os.getpid()}-{uuid4().hex}"
    _live.add(mark)
    return mark


def end_marked(mark: str) -> None:
    """Kill every process with the mark, and what they start meanwhile."""
    _live.discard(mark)
    for _ in range(_ROUNDS):
        found = set(marked(mark))
        found |= _descendants(found)
        if not found:
            return
        for each in found:
            with suppress(OSError):
                os.kill(each, signal.SIGKILL)
        sleep(0.005)


def marked(mark: str) -> Iterator[int]:
    """The living processes with the mark."""
    wanted = f"{VARIABLE}={mark}".encode()
    for entry in _PROCESSES.glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


def _descendants(of: set[int]) -> set[int]:
    """The living children of these processes, their children and so on: they may have cleared their environment."""
    children: dict[int, list[int]] = {}
    if of:
        for entry in _PROCESSES.glob("[0-9]*"):
            with suppress(OSError, ValueError, IndexError):
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found: set[int] = set()
    waiting = list(of)
    while waiting:
        new = [each for each in children.get(waiting.pop(), ()) if each not in found]
        found.update(new)
        waiting += new
    return found


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Within, a signal that ends the program ends the processes of subjects first. One that is ignored stays ignored."""
    main = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS} if main else {}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _end_all)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_all(number: int, _: FrameType | None) -> None:
    """End the marked processes, then this one as the signal by itself would have."""
    for mark in tuple(_live):
        end_marked(mark)
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")  # a progress bar hides the cursor
        sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
