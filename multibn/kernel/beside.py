"""Compile the kernel's backward in a second process while this one compiles its forward.

Threads cannot share the work, because Numba compiles in Python and holds a lock. The second process writes to the cache on disk,
where this one finds the result. If the second process cannot be started, fails or hangs, this one compiles everything.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import cache, threads

SECONDS = 120.0
"""How long to wait for the second process after this one is ready. Both take about the same time, 5 to 15 seconds."""

_CODE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from multibn.kernel import schedule
schedule.backward_body(sys.argv[2])
"""


@contextmanager
def compile_backward(kind: str) -> Iterator[None]:
    """A context that compiles ``schedule.backward_body(kind)`` in a second process.

    It starts the process when something in the context has to be compiled and can be cached, and waits for it at the end.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(cached: bool) -> None:
        if cached and not started and can_start():
            # -I: modules come from this process's sys.path alone, and not from the current folder
            command = [sys.executable, "-I", "-c", _CODE, json.dumps([*map(str, sys.path)]), kind]
            nowhere = subprocess.DEVNULL
            with suppress(OSError):  # no memory, or processes are not allowed
                started.append(subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere))

    cache.when_compiling.append(start)
    try:
        yield
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS)
    finally:
        cache.when_compiling.remove(start)
        for process in started:
            process.kill()
            process.wait()


def can_start() -> bool:
    """Whether this process may use a second processor, and its program is a Python interpreter, not one that embeds Python."""
    program = Path(sys.executable or "").name.lower()
    return threads.limit() > 1 and program.startswith("python") and not getattr(sys, "frozen", False)
