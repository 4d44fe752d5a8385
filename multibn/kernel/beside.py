"""Compile the kernel's backward in another process while this one compiles its forward.

Threads cannot share the work, because Numba compiles in Python and holds one lock. The other process writes to the cache on disk,
and this one loads the result from there. If that process cannot be started, fails or hangs, this one compiles everything.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import cache, threads

SECONDS = 120.0
"""How long to wait for the other process at most; it needs a tenth of that on a slow machine."""

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from multibn.kernel import schedule; schedule.{}(*sys.argv[2:])"


@contextmanager
def beside(function: str, *arguments: str) -> Iterator[None]:
    """Call a function of ``schedule`` in another process as soon as something is compiled within; wait for it at the end.

    Args:
        arguments: strings.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        if not started and can_start():
            # isolated: without the current folder, and where this process found its modules
            command = [sys.executable, "-I", "-c", _CODE.format(function), json.dumps([*map(str, sys.path)]), *arguments]
            nowhere = subprocess.DEVNULL
            try:
                started.append(subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere))
            except OSError:  # no memory, or processes are not allowed
                return

    cache.when_compiling.append(start)
    try:
        yield
        for process in started:
            _wait(process)
    finally:
        cache.when_compiling.remove(start)
        for process in started:
            process.kill()
            process.wait()


def can_start() -> bool:
    """Whether a second processor may be used, and this program is a Python that can be started again."""
    program = Path(sys.executable or "").name.lower()
    return threads.limit() > 1 and program.startswith("python") and not getattr(sys, "frozen", False)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        return
