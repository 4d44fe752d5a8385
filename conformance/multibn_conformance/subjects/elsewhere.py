"""Backends of another interpreter: each in a process there, since frameworks may need packages that exclude each other."""

from __future__ import annotations

import subprocess
from typing import Any

from multibn.backend import Backend, Subject
from multibn.interpreters import ask
from multibn.usage import UsageError

from .outside import LongLived, OutsideSubject
from .worker import BACKEND

GROUP = "multibn.backends"
"""The entry points of backends."""

_LIST = f"from importlib.metadata import entry_points; print(*[point.name for point in entry_points(group={GROUP!r})])"


def names(python: str) -> list[str]:
    """The backends that are registered in an interpreter, whether they can be loaded or not.

    Raises:
        UsageError: it cannot be started.
    """
    try:
        return ask(python, _LIST).split()
    except subprocess.CalledProcessError as error:
        raise UsageError(f"--python {python} is no Python interpreter: it ended with code {error.returncode}.") from error


def backend(name: str, python: str) -> Backend:
    """The backend as that interpreter has it.

    Raises:
        UsageError: it cannot be loaded there.
    """
    process = _Process(BACKEND + name, python)
    about = process.call("describe")
    whitening = process.whitening if about.pop("whitens") else None
    devices = tuple(about.pop("devices"))
    versions = {"python": process.versions["Python"], "numpy": process.versions["NumPy"], **about.pop("versions")}
    return Backend(name, versions, devices=lambda: devices, make=process.batchnorm, whitening=whitening, **about)


class _Process(LongLived):
    """The process of a backend."""

    def batchnorm(self, num_features: int, spec: Any, device: str, implementation: str) -> Subject:
        """``Backend.make`` there."""
        return self._made("make", num_features, spec, device, implementation)

    def whitening(self, num_features: int, spec: Any, device: str, implementation: str) -> Subject:
        """``Backend.whitening`` there."""
        return self._made("whitening", num_features, spec, device, implementation)

    def _made(self, kind: str, num_features: int, spec: Any, device: str, implementation: str) -> OutsideSubject:
        return self.make(num_features, spec, kind, device, implementation)

    def _no_start(self, error: Exception) -> str:
        return f"{self.python} cannot load it: {str(error).removeprefix('importing it raised ')}"
