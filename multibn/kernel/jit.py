"""Decorators that compile the kernel with Numba and cache the result on disk."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.resources import files
from typing import Any

from numba import njit

from . import cache
from .compat import CFunc, normalize_signature
from .fragment import Fragment

_OPTIONS: Any = {"nogil": True, "error_model": "numpy"}
_FRAGMENT: Any = {"pipeline_class": Fragment, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def compiled(function: Any) -> Any:
    """Compile on first use; cache the result on disk, beside this file or in the user's cache folder."""
    return _compile(function, {})


def inner(function: Any) -> Any:
    """Compile a function that only compiled code calls, as a part of its callers (see ``fragment``)."""
    return njit(**_OPTIONS, **_FRAGMENT)(function)


def inlined(function: Any) -> Any:
    """Like ``compiled``, but inline the function into its only caller."""
    return _compile(function, {"inline": "always"})


def _compile(function: Any, options: dict[str, Any]) -> Any:
    try:
        dispatcher = njit(cache=True, **_OPTIONS, **options)(function)
    except RuntimeError:  # no folder for Numba to write to
        return njit(**_OPTIONS, **options)(function)
    return cache.keep(dispatcher, SOURCES)


def c_function(signature: Any, function: Any, sources: str) -> Any:
    """Compile a function for C callers (see its ``address``), cached on disk; ``sources`` as for ``cache.keep``."""
    made = CFunc(function, normalize_signature(signature), {}, {"nopython": True, "error_model": "numpy"})
    with suppress(RuntimeError):  # Numba found no writable cache folder
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
"""Digest of every file that the kernel is compiled from."""
