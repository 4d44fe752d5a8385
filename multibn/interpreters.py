"""Other interpreters, for frameworks that need packages which exclude each other: ``--python PATH``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from .usage import UsageError

START = 300.0
"""Seconds that an interpreter may take to start and answer."""

BESIDE = ("numpy", "numba")
"""Libraries whose versions count too."""

_VERSIONS = (
    "import json, platform, sys; from importlib.metadata import version; "
    "print(json.dumps({name: version(name) for name in sys.argv[1:]} | {'python': platform.python_version()}))"
)


class Elsewhere(NamedTuple):
    """A framework of another interpreter."""

    python: str
    versions: Mapping[str, str]
    """Of the framework, of Python, and of the libraries ``BESIDE``."""


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
                found[name] = Elsewhere(python, json.loads(ask(python, _VERSIONS, name, *BESIDE)))
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
