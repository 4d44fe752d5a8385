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


def check_features(num_features: object, clause: str = "BN-01") -> None:
    """Raise ValueError unless a layer can have this number of channels."""
    if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
        raise ValueError(f"num_features must be an integer >= 1, the size of the channel axis, got {num_features!r} ({clause}).")


def check_rank(num_dims: object, clause: str = "BN-01") -> None:
    """Raise ValueError unless a layer can have input of this rank."""
    if num_dims not in (2, 3, 4, 5):
        raise ValueError(f"num_dims must be 2, 3, 4 or 5, the rank of the input (N, C, ...), got {num_dims!r} ({clause}).")
