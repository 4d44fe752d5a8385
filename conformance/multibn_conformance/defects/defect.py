"""What a defect is, and how a class becomes one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from multibn.numpy_backend import ReferenceSubject


@dataclass(frozen=True)
class Defect:
    """A wrong BatchNorm.

    Args:
        id: its name.
        clause: the clause that it breaks.
        change: what it does wrong, to follow "a BatchNorm that".
        bug: the bug that it stands for, with the public issue where there is one.
        make: makes a subject.
        alone: what it gets wrong is a matter of this clause; no other may accuse it, but BN-15, which sees every bit.
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
