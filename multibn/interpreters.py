"""Other interpreters, for frameworks that need packages which exclude each other: ``--python PATH``."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from .usage import UsageError

START = 300.0
"""Seconds that an interpreter may take to start and answer."""

_VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"


class Elsewhere(NamedTuple):
    """A framework of another interpreter."""

    python: str
    version: str


def ask(python: str, code: str, *arguments: str) -> str:
    """What the code prints in an interpreter.

    Raises:
        UsageError: it cannot be started.
        subprocess.CalledProcessError: the code failed.
    """
    try:
        return subprocess.run(
            [python, "-c", code, *arguments], capture_output=True, text=True, timeout=START, check=True
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it did not answer within {START:g} s"
        raise UsageError(f"--python {python} cannot be started: {reason}. Give the path of a Python interpreter.") from error


def elsewhere(frameworks: Iterable[str], pythons: Sequence[str]) -> dict[str, Elsewhere]:
    """The frameworks that are not installed here, each with the first of the interpreters where it is.

    Raises:
        UsageError: an interpreter cannot be started.
    """
    found: dict[str, Elsewhere] = {}
    for name in frameworks:
        for python in () if installed(name) else pythons:
            try:
                found[name] = Elsewhere(python, ask(python, _VERSION, name))
                break
            except subprocess.CalledProcessError:  # not installed there either
                continue
    return found


def installed(name: str) -> bool:
    """Whether this interpreter has a distribution of this name."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
