"""A subject in a process of its own, of any interpreter: whatever it does there, the run goes on.

A call that does not come back, because it takes too long, ends the process or fills the memory, raises ``Broken`` with what
happened; the next subject that is made gets a new process.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import IO, Any, BinaryIO

import numpy as np

from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError

from . import worker

TIMEOUT = 20.0
"""Seconds that a call may take, unless ``--timeout`` says otherwise."""

START = 300.0
"""Seconds that an interpreter may take to start and to import the subject."""

GROWTH = 512
"""MiB that a process may grow to more than it had after its first subject was made (Linux only)."""

LEAST = 2.0
"""Seconds that a call may take at least, after one of its kind has hung."""

_SLICE = 0.05


class Outside:
    """The process of a subject: started when it is needed, and again where it was broken.

    Args:
        name: ``package.module:make``, as the interpreter finds it from the working folder and its own path.
        python: the interpreter.
        device: handed to ``make``.
        timeout: seconds for a call. After a call of that kind has hung, others get ten times what the longest one took that
            came back, 2 seconds at least: a subject that always hangs must not take for ever.

    Raises:
        UsageError: when started for the first time, if that interpreter or that subject cannot be had.
    """

    def __init__(self, name: str, python: str = sys.executable, device: str = "cpu", timeout: float = TIMEOUT) -> None:
        self.name, self.python, self.device, self.timeout = name, python, device, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: BinaryIO
        self._answers: BinaryIO
        self._base: int | None = None
        self._longest: dict[str, float] = {}
        self._hung: set[str] = set()
        self.made = 0
        self.gone: list[int] = []
        try:
            self.versions: dict[str, str] = self._start()
        except (Broken, OSError) as error:
            self.stop()
            raise UsageError(self._no_start(error)) from error

    def __enter__(self) -> Outside:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def make(self, num_features: int, spec: BatchNormSpec | None, *how: str) -> OutsideSubject:
        """A new subject. It lives there as long as here.

        Args:
            how: of a backend, ``kind, device, implementation`` of ``worker.made_by``.

        Raises:
            Broken: it does not come back.
        """
        if self._process is None:
            self._start()
        self.made += 1
        gone, self.gone = self.gone, []
        self.call("make", num_features, None if spec is None else spec.to_dict(), gone, *how, of=self.made)
        if self._base is None:
            self._base = self._resident()
            self.versions.update(self.call("versions"))
        return OutsideSubject(self, self.made)

    def call(self, method: str, *arguments: Any, of: int = 0) -> Any:
        """What the method returns there, or an exception of the same name and message. The arrays are changed if it changes them.

        Raises:
            Broken: it does not come back.
        """
        if self._process is None:
            raise Broken(f"{method} was not called: its process has ended before.")
        limit = self._limit(method)
        began = monotonic()
        try:
            worker.send(self._requests, (method, arguments, of))
            answer = self._answer(method, limit)
        except OSError:
            raise self._ended(method) from None
        self._longest[method] = max(self._longest.get(method, 0.0), monotonic() - began)
        self._check_growth(method)
        for old, new in zip(arguments, answer.get("changed", arguments), strict=True):
            if isinstance(old, np.ndarray):
                old[...] = new
        return _unpacked(method, answer)

    def stop(self) -> None:
        """End the process and all that it started; done too when this object or the program ends."""
        if self._process is not None:
            self._process = None
            self._ending()

    def _start(self) -> dict[str, str]:
        (there, requests), (answers, here) = os.pipe(), os.pipe()
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        command = [self.python, str(Path(worker.__file__)), self.name, self.device, str(there), str(here)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._printed,
                stderr=self._printed,
                pass_fds=(there, here),
                start_new_session=True,
            )
        except OSError:
            self._printed.close()
            for fd in (requests, answers):
                os.close(fd)
            raise
        finally:
            os.close(there)
            os.close(here)
        self._requests, self._answers = os.fdopen(requests, "wb"), os.fdopen(answers, "rb")
        self._ending = weakref.finalize(self, _end, self._process, self._requests, self._answers, self._printed)
        self._base = None
        try:
            versions: dict[str, str] = _unpacked("importing it", self._answer("importing it", START))
        except Broken:
            raise
        except Exception as error:
            self.stop()
            raise Broken(f"importing it raised {type(error).__name__}: {error}") from error
        return versions

    def _answer(self, method: str, limit: float) -> dict[str, Any]:
        """The next message, within so many seconds. A machine that was asleep meanwhile has not been waited for."""
        assert self._process is not None
        left, poll = limit, select.poll()
        poll.register(self._answers, select.POLLIN)
        while True:
            began = monotonic()
            ended = self._process.poll() is not None
            if poll.poll(0 if ended else 1000 * min(_SLICE, left)):
                break
            if ended:
                raise self._ended(method)
            left -= min(monotonic() - began, 2 * _SLICE)
            self._check_growth(method)
            if left <= 0:
                self._hung.add(method)
                self.stop()
                raise Broken(f"{method} did not come back within {limit:g} s; its process was stopped.")
        try:
            answer: dict[str, Any] = worker.receive(self._answers)
        except EOFError:
            raise self._ended(method) from None
        except ValueError:
            self.stop()
            raise Broken(f"{method} wrote into the pipe to the suite; its process was stopped.") from None
        return answer

    def _limit(self, method: str) -> float:
        return min(self.timeout, max(LEAST, 10 * self._longest.get(method, 0.0))) if method in self._hung else self.timeout

    def _ended(self, method: str) -> Broken:
        """Why the process is no more."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code, words = self._process.poll(), self._last_words()
        self.stop()
        if code is None:
            how = "closed the pipe to the suite; its process was stopped"
        elif code < 0:
            how = f"ended its process by signal {_signal(-code)}"
        else:
            how = f"ended its process with exit code {code}"
        return Broken(f"{method} {how}.{f' The last that it printed: {words}' if words else ''}")

    def _last_words(self) -> str:
        self._printed.seek(max(0, self._printed.seek(0, os.SEEK_END) - 10000))
        lines = self._printed.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")

    def _check_growth(self, method: str) -> None:
        now = self._resident()
        if self._base is not None and now is not None and now - self._base > GROWTH:
            before = self._base
            self.stop()
            raise Broken(
                f"{method} leaks memory: the process has grown to {now} MiB, from {before} MiB after its first subject was made, "
                f"by more than the {GROWTH} MiB that it may; it was stopped."
            )

    def _resident(self) -> int | None:
        """MiB in memory; None where the system does not tell."""
        assert self._process is not None
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return None
        return pages * os.sysconf("SC_PAGE_SIZE") >> 20

    def _no_start(self, error: Exception) -> str:
        """What is wrong with the call, and what to do."""
        if isinstance(error, OSError):
            return f"--python {self.python} cannot be started: {error.strerror}. Give the path of a Python interpreter."
        if "No module named 'numpy'" in str(error) or "No module named numpy" in str(error):
            return f"{self.python} has no NumPy, which is all that it needs: {shlex.quote(self.python)} -m pip install numpy"
        return f"the subject {self.name} cannot be had: {error}"


class LongLived(Outside):
    """The process of a framework. It may grow: JAX keeps what it compiled for each shape, which is no leak of BatchNorm's.

    Args:
        timeout: enough for the first call of a kind, which compiles in JAX.
    """

    def __init__(self, name: str, python: str = sys.executable, device: str = "cpu", timeout: float = 120.0) -> None:
        super().__init__(name, python, device, timeout)

    def _check_growth(self, method: str) -> None:
        """Not checked."""


class OutsideSubject:
    """The subject as the suite calls it: each call goes to its process."""

    def __init__(self, outside: Outside, number: int) -> None:
        self._outside, self._number = outside, number

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        """See ``multibn.layer.Subject``, as for the others."""
        self._call("load", gamma, beta, moving_mean, moving_var)

    def forward(self, x: Array, training: bool) -> Any:
        """Whatever comes back."""
        return self._call("forward", x, training)

    def backward(self, dy: Array) -> Any:
        """Whatever comes back."""
        return self._call("backward", dy)

    def moving(self) -> Any:
        """Whatever comes back."""
        return self._call("moving")

    def __del__(self) -> None:
        self._outside.gone.append(self._number)

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._outside.call(method, *arguments, of=self._number)


def started(name: str, python: str | None = None, timeout: float | None = None, device: str = "cpu") -> Outside:
    """The process of a subject, by the options of the command line.

    Raises:
        UsageError: one of these is wrong, or the subject cannot be imported.
    """
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *function.split("."))):
        raise UsageError(f"a subject is named package.module:make, got {name!r}. Name the module, a colon, and its function.")
    limit = TIMEOUT if timeout is None else timeout
    if not 0 < limit < float("inf"):
        raise UsageError(f"--timeout must be a number of seconds > 0, got {timeout}.")
    return Outside(name, sys.executable if python is None else python, device, limit)


def _end(process: subprocess.Popen[bytes], *files: IO[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for file in files:
        with suppress(OSError):  # what a broken pipe did not take
            file.close()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _unpacked(method: str, answer: dict[str, Any]) -> Any:
    """What was returned, or the exception that was raised."""
    if "raised" in answer:
        name, message, usual = answer["raised"]
        if not usual:
            raise Broken(f"{method} raised {name}: {message}. That ends a process, and is not how to refuse.")
        raise type(name, (Exception,), {})(message)
    return _as_it_was(answer["returned"])


def _as_it_was(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_as_it_was(each) for each in value)
    return type(value.name, (), {})() if isinstance(value, worker.Other) else value


class Broken(Exception):
    """A call of a subject did not come back: its process was ended, or had to be."""
