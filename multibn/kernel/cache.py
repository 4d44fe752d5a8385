"""Keep compiled code on disk: checked against a digest before it is used, in folders that nobody else may write to.

Numba's own files are pickles of machine code: a damaged one raises from every process, or runs. Here each file begins with the
SHA-256 of the rest. A file that does not match is set aside and its function compiled anew; a disk that is full, or a folder that
others may write to, costs the cache and nothing else. Each is reported in one line on stderr.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from .compat import IndexDataCacheFile

_DIGEST = hashlib.sha256().digest_size

when_compiling: list[Callable[[], None]] = []
"""Called when a function was not found on disk, so that it is about to be compiled."""


class CheckedFile(IndexDataCacheFile):  # type: ignore[misc]
    """The files of one function: ``NAME.STAMP-KEY.nbc``. STAMP stands for the sources, KEY for the types and the processor.

    Args:
        folder: where they are.
        base: NAME.
        stamp: anything whose text changes with the sources.
    """

    def __init__(self, folder: str, base: str, stamp: Any) -> None:
        super().__init__(folder, base, stamp)
        self._folder, self._base, self._stamp = Path(folder), base, _short(stamp, self._version)

    def load(self, key: Any) -> Any:
        """What was saved for a key; None if there is nothing sound, so that Numba compiles."""
        found = self._load(self._path(key)) if _is_trusted(self._folder) else None
        if found is None:
            for call in when_compiling:
                call()
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
        _report(f"the cached file {path} is damaged; it is set aside as .damaged and compiled anew")
        return None

    def save(self, key: Any, data: Any) -> None:
        """Save what was compiled for a key, and remove the files of other sources."""
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
    """The function, whose compiled code is kept in checked files, for these sources alone.

    Numba compiles anew when a function's own file has changed. Its code also holds what it calls, and the constants, of others.

    Args:
        function: a dispatcher or ``CFunc`` with Numba's cache.
        sources: a digest of everything that the function is compiled from.
    """
    with suppress(AttributeError):  # no cache where NUMBA_DISABLE_JIT is set, or perhaps another one in a later Numba
        its = function._cache
        old = its._cache_file
        its._cache_file = CheckedFile(its._cache_path, old._index_name.removesuffix(".nbi"), (old._source_stamp, sources))
    return function


@cache
def _is_trusted(folder: Path) -> bool:
    """Whether only this user, or root, may write into a folder: what is loaded from it runs."""
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
        f"the cache folder {folder} is not used, since others may write to it and what is loaded from it runs. "
        f"Make it yours alone (chmod go-w {folder}), or set NUMBA_CACHE_DIR to a folder that is"
    )
    return False


def _is_private(group: int) -> bool:
    """Whether a group is this user's own and has no other member, as in distributions with a group for each user."""
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
