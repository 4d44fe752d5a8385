"""On-disk cache for compiled code: each file is verified by a digest before use, and only folders that other users cannot write
to are used.

Numba's own cache files are pickles that contain machine code; a damaged one raises in every process, or is executed. Here each
file begins with the SHA-256 of the rest. A file that does not match is renamed to .damaged and its function is recompiled. If the
disk is full or the folder is writable by others, the code is compiled without caching. Each of these events is reported in one
line on stderr.
"""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from .compat import IndexDataCacheFile

_DIGEST = hashlib.sha256().digest_size

when_compiling: list[Callable[[bool], None]] = []
"""Callbacks, called when a function is not in the cache and has to be compiled. Argument: whether the result can be cached."""


class CheckedFile(IndexDataCacheFile):  # type: ignore[misc]
    """Cache files of one function, ``NAME.STAMP-KEY.nbc``: STAMP is a hash of the sources, KEY of the argument types and the
    processor.

    Args:
        folder: the cache folder.
        base: NAME.
        stamp: anything whose text changes with the sources.
    """

    def __init__(self, folder: str, base: str, stamp: Any) -> None:
        super().__init__(folder, base, stamp)
        self._folder, self._base, self._stamp = Path(folder), base, _short(stamp, self._version)

    def load(self, key: Any) -> Any:
        """Return the data saved for a key; None if there is none or it is damaged, and then Numba compiles."""
        trusted = _is_trusted(self._folder)
        found = self._load(self._path(key)) if trusted else None
        if found is None:
            announce(trusted)
        return found

    def _load(self, path: Path) -> Any:
        try:
            content = path.read_bytes()
        except OSError:  # not there yet, or not readable
            return None
        with suppress(Exception):  # a pickle of another release of a library may raise anything
            if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
                return pickle.loads(content[_DIGEST:])
        with suppress(OSError):
            path.replace(path.with_suffix(".damaged"))
        _report(f"the cache file {path} is damaged; renamed it to .damaged and recompiling")
        return None

    def save(self, key: Any, data: Any) -> None:
        """Save the compiled data of a key, and delete files compiled from other versions of the sources."""
        if not _is_trusted(self._folder):
            return
        path, content = self._path(key), self._dump(data)
        try:
            with self._open_for_write(str(path)) as file:
                file.write(hashlib.sha256(content).digest() + content)
        except OSError as error:
            _report(f"cannot write the cache file {path}: {error.strerror}; the next process compiles again")
        for other in self._folder.glob(f"{self._base}.*-*.nbc"):
            if not other.name.startswith(f"{self._base}.{self._stamp}-"):
                other.unlink(missing_ok=True)

    def flush(self) -> None:
        """Remove every file of the function."""
        for path in self._folder.glob(f"{self._base}.*-*.nbc"):
            path.unlink(missing_ok=True)

    def _path(self, key: Any) -> Path:
        return self._folder / f"{self._base}.{self._stamp}-{_short(key)}.nbc"


def keep(function: Any, sources: str) -> Any:
    """Make a function use verified cache files that are invalidated when any source changes; return the function.

    Numba invalidates its cache only when the function's own file changes, but the compiled code also contains functions and
    constants from other files.

    Args:
        function: a dispatcher or ``CFunc`` with Numba's cache.
        sources: a digest of everything that the function is compiled from.
    """
    with suppress(AttributeError):  # no cache if NUMBA_DISABLE_JIT is set; later Numba releases may rename these attributes
        its = function._cache
        old = its._cache_file
        its._cache_file = CheckedFile(its._cache_path, old._index_name.removesuffix(".nbi"), (old._source_stamp, sources))
    return function


def announce(cached: bool) -> None:
    """Call the callbacks of ``when_compiling``. ``cached``: whether the result can be cached."""
    for call in when_compiling:
        call(cached)


@contextmanager
def uncollected() -> Iterator[None]:
    """A context without garbage collection, until something has to be compiled.

    Loading Numba's modules and compiled code creates many objects, so that Python would look for garbage among all objects of the
    process, which takes 0.1 s with PyTorch.
    """
    if not gc.isenabled():
        yield
        return

    def resume(_: bool) -> None:
        gc.enable()

    when_compiling.append(resume)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        when_compiling.remove(resume)


@cache
def _is_trusted(folder: Path) -> bool:
    """Whether only this user or root can write to a folder; required, because cached code is executed."""
    try:
        its = folder.stat()
    except OSError:
        return False
    if os.name != "posix":
        return True
    mine = its.st_uid in (0, os.geteuid())
    others = its.st_mode & stat.S_IWOTH or (its.st_mode & stat.S_IWGRP and not _is_private(its.st_gid))
    if mine and not others:
        return True
    _report(
        f"the cache folder {folder} is not used, because other users can write to it and cached code is executed. "
        f"Run chmod go-w {folder}, or set NUMBA_CACHE_DIR to a folder that only you can write to"
    )
    return False


def _is_private(group: int) -> bool:
    """Whether a group is the user's private group with no other members (the user-private-group scheme of many Linux
    distributions).
    """
    import grp
    import pwd

    with suppress(KeyError):
        its, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid())
        return its.gr_gid == user.pw_gid and set(its.gr_mem) <= {user.pw_name}
    return False


def _short(*things: Any) -> str:
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


def _report(line: str) -> None:
    print(f"multibn: {line}", file=sys.stderr)
