"""How the kernel is compiled, and how compiled code is cached on disk."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.resources import files
from typing import Any

from numba import njit

from . import cache
from .compat import CFunc, normalize_signature


def compiled(function: Any) -> Any:
    """Compile on first use; keep the result on disk where there is a place for it (beside this file, or the user's cache)."""
    return _compile(function, {})


def inner(function: Any) -> Any:
    """The same for a function that only compiled code calls: it needs no entry from Python, which takes as long to compile."""
    return _compile(function, {"no_cpython_wrapper": True, "no_cfunc_wrapper": True})


def inlined(function: Any) -> Any:
    """For a function that one other calls: compiled as a part of it, not once more alone."""
    return _compile(function, {"inline": "always"})


def _compile(function: Any, options: dict[str, Any]) -> Any:
    try:
        dispatcher = njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # Numba found no directory that it may write
        return njit(nogil=True, error_model="numpy", **options)(function)
    return cache.keep(dispatcher, SOURCES)


def c_function(signature: Any, function: Any, sources: str) -> Any:
    """The function compiled for C to call (``address``), kept on disk like those of ``compiled``; sources: see ``cache.keep``."""
    made = CFunc(function, normalize_signature(signature), {}, {"nopython": True, "error_model": "numpy"})
    with suppress(RuntimeError):  # Numba found no directory that it may write
        made.enable_caching()
    cache.keep(made, sources).compile()
    return made


SOURCES = hashlib.sha256(
    b"".join(
        each.read_bytes()
        for package, pattern in (("multibn.kernel", ".py"), ("multibn.spec", "clauses.py"))
        for each in sorted(files(package).iterdir(), key=lambda each: each.name)
        if each.name.endswith(pattern)
    )
).hexdigest()
"""Of every file that the kernel is compiled from."""
