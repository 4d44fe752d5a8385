"""Checks of a parameter's type and value."""

from __future__ import annotations

import numbers


def real_number(name: str, value: object, allowed: str) -> float:
    """The value as a float, or TypeError that says what is allowed."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}.")
    return float(value)


def one_of(name: str, value: object, allowed: tuple[str, ...], clause: str) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r} ({clause}).")
