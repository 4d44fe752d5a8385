"""Wrong calls: the error whose message a command prints before it exits with 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """A command or function was asked for something that does not exist or cannot be done; the message says what can."""


@contextmanager
def needed(command: str, extra: str) -> Iterator[None]:
    """Import what a command needs; a package that is missing is a wrong call.

    Args:
        command: its name, as ``conform``.
        extra: the extra of multibn that brings the package.

    Raises:
        UsageError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise UsageError(f"multibn {command} needs {package}, which is not installed: pip install 'multibn[{extra}]'") from None
