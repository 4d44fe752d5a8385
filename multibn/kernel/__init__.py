"""The CPU kernel, an implementation of BN-01 to BN-16 in Numba. Numba is imported when one of these names is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arrays import Saved as Saved
    from .arrays import backward as backward
    from .arrays import forward as forward
    from .entry import prepare as prepare
    from .entry import run_backward as run_backward
    from .entry import run_forward as run_forward

_HOMES = {"Saved": "arrays", "backward": "arrays", "forward": "arrays"} | dict.fromkeys(
    ("prepare", "run_backward", "run_forward"), "entry"
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
