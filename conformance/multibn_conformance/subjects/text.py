"""Make text from a subject or a file safe to show: no control characters, no lone surrogates, no endless messages."""

from __future__ import annotations

LONGEST = 4000
"""Characters of one text that are shown."""


def plain(text: str, longest: int = LONGEST) -> str:
    r"""The text with every character that is not printable as an escape such as ``\x1b``; newlines and tabs stay.

    A text of more than ``longest`` characters is cut, and says so.
    """
    cut = f"... ({len(text)} characters)" if len(text) > longest else ""
    return "".join(each if each.isprintable() or each in "\n\t" else _escaped(each) for each in text[:longest]) + cut


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
