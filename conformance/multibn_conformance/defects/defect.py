"""``Defect``, and the decorator that registers a class as one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from multibn.numpy_backend import ReferenceSubject


@dataclass(frozen=True)
class Defect:
    """A BatchNorm that breaks one clause.

    Args:
        id: its name.
        clause: the clause that it breaks.
        change: what it does wrong, to follow "a BatchNorm that".
        bug: the bug that it represents, with a public issue if there is one.
        make: makes a subject.
        alone: only cases of this clause may fail for it, apart from BN-15, which compares every bit.
    """

    id: str
    clause: str
    change: str
    bug: str
    make: type[ReferenceSubject]
    alone: bool


REGISTERED: list[Defect] = []


def defect(clause: str, bug: str, alone: bool = False) -> Callable[[type[ReferenceSubject]], type[ReferenceSubject]]:
    """Register a class: its name becomes the id, its docstring the change."""

    def register(make: type[ReferenceSubject]) -> type[ReferenceSubject]:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", make.__name__).lower()
        text = (make.__doc__ or "").strip().rstrip(".")
        REGISTERED.append(Defect(name, clause, text[0].lower() + text[1:], bug, make, alone))
        return make

    return register
