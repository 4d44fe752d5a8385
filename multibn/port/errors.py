"""The errors of a port."""

from __future__ import annotations

from collections.abc import Sequence

from multibn.usage import UsageError


class PortError(UsageError):
    """A checkpoint that cannot be ported; the message says what was found, where, and what to do."""


def refuse(problems: Sequence[str], what: str) -> None:
    """Raise PortError with all problems, one per line; do nothing if there are none.

    Args:
        problems: sentences.
        what: their subject, such as a file.
    """
    if problems:
        few = "" if len(problems) == 1 else f"{len(problems)} problems:\n  "
        raise PortError(f"{what}: {few}" + "\n  ".join(problems))
