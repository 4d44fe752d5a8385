"""A subject in a process of its own, run by any interpreter: the suite survives whatever the subject does there.

A call that takes too long, ends the process, fills the memory or answers with nonsense raises ``Broken`` with what happened; the
next subject that is made gets a new process.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import IO, Any

import numpy as np

from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError

from . import worker
from .ending import VARIABLE, end_marked, new_mark
from .pipes import MOST, Pipes, TooLarge
from .text import plain

TIMEOUT = 20.0
"""Seconds that a call may take, unless ``--timeout`` says otherwise."""

START = 300.0
"""Seconds that an interpreter may take to start and to import the subject."""

GROWTH = 512
"""MiB that a process may grow beyond its size after it made its first subject (Linux only)."""

PRINTED = 256
"""MiB that a process may print."""

LEAST = 2.0
"""Seconds that a call may take at least, after one of its kind has hung."""


class Outside:
    """The process of a subject: started when it is needed, and started again after it broke.

    Args:
        name: ``package.module:make``, as the interpreter finds it from the working folder and its own path.
        python: the interpreter.
        device: passed to ``make``.
        timeout: seconds for a call. After a method has hung, its later calls get ten times what its longest successful call
            took, 2 seconds at least: a subject that always hangs must not stop the run.

    Raises:
        UsageError: at the first start, if the interpreter does not run or the subject cannot be imported.
    """

    def __init__(self, name: str, python: str = sys.executable, device: str = "cpu", timeout: float = TIMEOUT) -> None:
        self.name, self.python, self.device, self.timeout = name, python, device, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: Pipes
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
        """A new subject, which lives in the process as long as the returned object lives here.

        Args:
            how: of a backend, ``kind, device, implementation`` of ``worker.made_by``.

        Raises:
            Broken: the call does not come back.
        """
        if self._process is None:
            self._start()
        self.made += 1
        gone, self.gone = self.gone, []
        subject = OutsideSubject(self, self.made)
        subject.call("make", num_features, None if spec is None else spec.to_dict(), gone, *how)
        if self._base is None:
            self._base = self._resident()
            self.versions.update(_versions(subject.call("versions")))
        return subject

    def exchange(self, method: str, arguments: tuple[Any, ...], number: int) -> dict[str, Any]:
        """The worker's answer to a call of a method of the subject with this number.

        Raises:
            Broken: the call does not come back.
        """
        if self._process is None:
            raise Broken(f"{method} was not called: its process has ended before.")
        began, limit = monotonic(), self._limit(method, self.timeout)
        answer = self._answer(method, limit, (method, arguments, number))
        self._longest[method] = max(self._longest.get(method, 0.0), monotonic() - began)
        self._check_growth(method)
        return answer

    def call(self, method: str) -> Any:
        """What a method of the process itself returns.

        Raises:
            Broken: the call does not come back.
        """
        return _unpacked(method, self.exchange(method, (), 0))

    def stop(self) -> None:
        """End the process and all that it started; also done when this object or the program ends."""
        if self._process is not None:
            self._process = None
            self._ending()

    def _start(self) -> dict[str, str]:
        (there, requests), (answers, here) = os.pipe(), os.pipe()
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        command = [self.python, str(Path(worker.__file__)), self.name, self.device, str(there), str(here)]
        mark = new_mark()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._printed,
                stderr=self._printed,
                pass_fds=(there, here),
                start_new_session=True,
                env={**os.environ, VARIABLE: mark},
            )
        except BaseException:
            self._printed.close()
            for fd in (requests, answers):
                os.close(fd)
            end_marked(mark)
            raise
        finally:
            os.close(there)
            os.close(here)
        self._method = "importing it"
        alive = weakref.WeakMethod(self._alive)  # a strong reference would keep the process running
        self._pipes = Pipes(requests, answers, lambda: (method := alive()) is not None and method())
        self._ending = weakref.finalize(self, _end, self._process, mark, self._pipes, self._printed)
        self._base = None
        try:
            return _versions(_unpacked("importing it", self._answer("importing it", self._limit("importing it", START))))
        except Broken:
            raise
        except Exception as error:
            self.stop()
            raise Broken(f"importing it raised {type(error).__name__}: {error}") from error

    def _answer(self, method: str, limit: float, request: Any = None) -> dict[str, Any]:
        """The answer to a request, or to the start, within so many seconds."""
        self._method = method
        self._pipes.begin(limit)
        try:
            if request is not None:
                worker.send(self._pipes, request)
            answer = worker.receive(self._pipes)
        except Broken:
            raise
        except TimeoutError:
            self._hung.add(method)
            self.stop()
            raise Broken(f"{method} did not come back within {limit:g} s; its process was stopped.") from None
        except (EOFError, OSError):
            raise self._ended(method) from None
        except Exception as error:  # whatever was written there, such as JSON of any depth or an array that has no such shape
            raise self._nonsense(method, error) from None
        if not (isinstance(answer, dict) and ("returned" in answer or _raised(answer))):
            raise self._nonsense(method)
        return answer

    def _nonsense(self, method: str, error: Exception | None = None) -> Broken:
        self.stop()
        if isinstance(error, TooLarge):
            return Broken(f"{method} sent an answer of more than {MOST >> 20} MiB; its process was stopped.")
        return Broken(f"{method} wrote into the pipe to the suite; its process was stopped.")

    def _alive(self) -> bool:
        assert self._process is not None
        self._check_growth(self._method)
        return self._process is not None and self._process.poll() is None

    def _limit(self, method: str, most: float) -> float:
        return min(most, max(LEAST, 10 * self._longest.get(method, 0.0))) if method in self._hung else most

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
        if os.fstat(self._printed.fileno()).st_size > PRINTED << 20:
            self.stop()
            raise Broken(f"{method} printed more than {PRINTED} MiB; its process was stopped.")

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
        python = plain(self.python)
        if isinstance(error, OSError):
            return f"cannot start --python {python}: {error.strerror}. Give the path of a Python interpreter."
        if "No module named 'numpy'" in str(error) or "No module named numpy" in str(error):
            return f"{python} has no NumPy, which the subject's process needs: {shlex.quote(python)} -m pip install numpy"
        return f"cannot load subject {self.name}: {error}"


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
        self._given: list[Array] = []

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        """See ``multibn.backend.Subject``, as for the other methods."""
        self.call("load", gamma, beta, moving_mean, moving_var)

    def forward(self, x: Array, training: bool) -> Any:
        """Return what the subject returns."""
        return self.call("forward", x, training)

    def backward(self, dy: Array) -> Any:
        """Return what the subject returns."""
        return self.call("backward", dy)

    def moving(self) -> Any:
        """Return what the subject returns."""
        return self.call("moving")

    def __del__(self) -> None:
        self._outside.gone.append(self._number)

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns there, or an exception of the same name and message.

        Arrays of this call and of earlier ones change here where the subject changed them there.

        Raises:
            Broken: the call does not come back.
        """
        self._given += [a for a in arguments if isinstance(a, np.ndarray)]
        answer = self._outside.exchange(method, arguments, self._number)
        try:
            for index, new in answer.get("changed", {}).items():
                self._given[int(index)][...] = new
        except Exception:
            raise self._outside._nonsense(method) from None
        return _unpacked(method, answer)


def started(name: str, python: str | None = None, timeout: float | None = None, device: str = "cpu") -> Outside:
    """Start the process of a subject, by the options of the command line.

    Raises:
        UsageError: an option is wrong, or the subject cannot be imported.
    """
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *function.split("."))):
        raise UsageError(f"expected MODULE:MAKE, such as package.module:make, got {name!r}.")
    limit = TIMEOUT if timeout is None else timeout
    if not 0 < limit < float("inf"):
        raise UsageError(f"--timeout must be a number of seconds > 0, got {timeout}.")
    return Outside(name, sys.executable if python is None else python, device, limit)


def _end(process: subprocess.Popen[bytes], mark: str, pipes: Pipes, printed: IO[bytes]) -> None:
    """Kill the process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    end_marked(mark)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    pipes.close()
    printed.close()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _raised(answer: dict[str, Any]) -> bool:
    """Whether an answer tells an exception: its name, its message, and whether it is an ``Exception``."""
    raised = answer.get("raised")
    return isinstance(raised, list) and [type(each) for each in raised] == [str, str, bool]


def _unpacked(method: str, answer: dict[str, Any]) -> Any:
    """What was returned, or the exception that was raised."""
    if "raised" in answer:
        name, message, usual = answer["raised"]
        name, message = plain(name), plain(message)
        if not usual:
            raise Broken(f"{method} raised {name}: {message}. That ends a process; refuse with an Exception.")
        raise type(name, (Exception,), {})(message)
    return _as_it_was(answer["returned"])


def _as_it_was(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_as_it_was(each) for each in value)
    return type(plain(value.name), (), {})() if isinstance(value, worker.Other) else value


def _versions(told: Any) -> dict[str, str]:
    """The versions that a process tells, whatever it tells."""
    return {plain(name): plain(str(version)) for name, version in told.items()} if isinstance(told, dict) else {}


class Broken(Exception):
    """A call of a subject did not come back: its process ended, or had to be stopped."""
