"""Run functions that may crash, each in a separate process."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def outcome(function: Callable[[], Any], seconds: int = 60) -> dict[str, Any]:
    """Return what the function does in a forked child: {"value": ...}, {"error": class, "message": ...} or {"crash": signal}.

    The value must be JSON's.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(seconds)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer = {"value": function()}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"crash": signal.Signals(os.WTERMSIG(status)).name}
    if not said:
        return {"crash": f"exit status {os.WEXITSTATUS(status)}"}
    found: dict[str, Any] = json.loads(said)
    return found


def main(cells: Mapping[str, Callable[[], Any]]) -> None:
    """Print a line of JSON, [name, outcome], for each cell whose name has one of the command line's words in it, or all."""
    for name, function in cells.items():
        if not sys.argv[1:] or any(word in name for word in sys.argv[1:]):
            print(json.dumps([name, outcome(function)]), flush=True)
