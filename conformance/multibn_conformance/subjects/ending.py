"""End the processes of subjects, and all that these started: after use, when the program exits, and when a signal ends it.

SIGKILL leaves the program no chance to do so. Then a keeper does it, a small process that runs this file (Linux only).

A subject's process carries a mark in its environment, which its descendants inherit. ``/proc`` shows it, so they are found even
if they left the process group, began a session of their own or lost their parent. Without ``/proc``, only the group is ended.
"""

from __future__ import annotations

import os
import select
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
_keeper: tuple[int, int] | None = None
"""The process that started the keeper, and the pipe to it."""


def new_mark() -> str:
    """A mark for a process that is about to start; its processes end with the program from now on."""
    mark = f"{os.getpid()}-{uuid4().hex}"
    _live.add(mark)
    _tell_keeper(f"+{mark}\n")
    return mark


def end_marked(mark: str) -> None:
    """Kill every process with the mark, and what they start meanwhile."""
    _live.discard(mark)
    _end(mark)
    _tell_keeper(f"-{mark}\n")


def _end(mark: str) -> None:
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


def _tell_keeper(line: str) -> None:
    """Tell the keeper of this process that a mark begins (+) or ends (-); start it if there is none."""
    global _keeper
    if not (_PROCESSES / "self" / "environ").exists():
        return
    with suppress(OSError):  # the keeper was killed
        if _keeper is None or _keeper[0] != os.getpid():
            _keeper = os.getpid(), _start_keeper()
        os.write(_keeper[1], line.encode())


def _start_keeper() -> int:
    """Start the keeper; return the pipe to it."""
    there, here = os.pipe()
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", __file__, str(os.getpid())],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((there, nowhere, nowhere))],
        )
    finally:
        os.close(there)
        os.close(nowhere)
    return here


def _keep(program: int) -> None:
    """Wait until the program ends; then end the processes with the marks that it left."""
    os.setsid()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    marks: set[str] = set()
    rest = b""
    while os.getppid() == program:
        if select.select([0], [], [], 0.5)[0]:
            portion = os.read(0, 1 << 16)
            if not portion:
                break
            *lines, rest = (rest + portion).split(b"\n")
            for line in lines:
                (marks.add if line.startswith(b"+") else marks.discard)(line[1:].decode())
    for mark in marks:
        _end(mark)


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


if __name__ == "__main__":
    _keep(int(sys.argv[1]))
