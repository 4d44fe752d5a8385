"""Private APIs of Numba that the kernel uses. If a Numba release lacks one, importing the kernel raises ImportError."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import numba

PARTS: Final = {
    "numba.core.caching:IndexDataCacheFile": "keep compiled code on disk",
    "numba.core.ccallback:CFunc": "compile functions that C calls",
    "numba.core.codegen:JITCodeLibrary": "compile functions that only it calls",
    "numba.core.compiler:CompilerBase": "compile functions that only it calls",
    "numba.core.compiler:DefaultPassBuilder": "compile functions that only it calls",
    "numba.core.cgutils:get_or_insert_function": "set the processor's mode",
    "numba.core.cgutils:unpack_tuple": "generate code for addresses and vectors",
    "numba.core.compiler_lock:global_compiler_lock": "fork while a thread compiles",
    "numba.core.sigutils:normalize_signature": "compile functions that C calls",
    "numba.np.arrayobj:make_array": "generate code for arrays at addresses",
    "numba.np.arrayobj:populate_array": "generate code for arrays at addresses",
}
"""``module:name`` -> what the kernel cannot do without it. Not listed, since optional: ``Dispatcher._cache`` and ``CFunc._cache``
with their ``_cache_file`` and ``_cache_path``; without these, the kernel is recompiled in every process (see ``cache.keep``).
"""


def part(place: str) -> Any:
    """A private part of Numba.

    Args:
        place: a key of ``PARTS``.

    Raises:
        ImportError: the installed release lacks it; the message says what stopped working and what to do.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"Numba {numba.__version__} has no {module}.{name}, without which multibn's kernel cannot {PARTS[place]}. "
            "Install a release that multibn was tested with: pip install 'numba<=0.68.1'."
        ) from error


CFunc = part("numba.core.ccallback:CFunc")
IndexDataCacheFile = part("numba.core.caching:IndexDataCacheFile")
CompilerBase = part("numba.core.compiler:CompilerBase")
DefaultPassBuilder = part("numba.core.compiler:DefaultPassBuilder")
JITCodeLibrary = part("numba.core.codegen:JITCodeLibrary")
get_or_insert_function = part("numba.core.cgutils:get_or_insert_function")
global_compiler_lock = part("numba.core.compiler_lock:global_compiler_lock")
make_array = part("numba.np.arrayobj:make_array")
normalize_signature = part("numba.core.sigutils:normalize_signature")
populate_array = part("numba.np.arrayobj:populate_array")
unpack_tuple = part("numba.core.cgutils:unpack_tuple")
