"""Subjects that misbehave, run in a separate process; ``make_NAME`` makes each."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from multibn.numpy_backend import ReferenceSubject

_hoard: list[Any] = []


class Raises(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        raise RuntimeError("no luck")


class RaisesWithoutText(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        class Silent(Exception):
            def __str__(self) -> str:
                raise ValueError

        raise Silent


class LosesAnAxis(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        return super().forward(x, training).reshape(len(x), -1)


class Promotes(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        return super().forward(x, training).astype(np.float64)


class GivesNaN(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        return super().forward(x, training) * np.float32("nan")


class GivesNothing(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        super().forward(x, training)


class GivesAList(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        return super().forward(x, training).tolist()


class GivesATruth(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        return {"y": super().forward(x, training)}


class GivesObjects(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        return super().forward(x, training).astype(object)


class WritesIntoItsInput(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        y = super().forward(x, training)
        x[...] = y
        return y


class HasNoMoving(ReferenceSubject):
    def moving(self) -> Any:
        return None


class RefusesToBe(ReferenceSubject):
    def __init__(self, *_: Any) -> None:
        raise RuntimeError("not today")


class Hangs(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        return time.sleep(1000)


class Exits(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        sys.exit(4)


class ExitsAtOnce(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        print("farewell", flush=True)
        os._exit(3)


class Crashes(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        return ctypes.string_at(0)


class CrashesInHalf(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        if x.dtype == "float16":
            os.kill(os.getpid(), 9)
        return super().forward(x, training)


class ClosesEverything(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        os.closerange(3, 100)
        return time.sleep(1000)


class SpeaksOutOfTurn(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        os.write(int(sys.argv[4]), (7).to_bytes(8, "little") + b"nonsense")
        return super().forward(x, training)


def _send(text: bytes, rest: bytes = b"") -> None:
    """Write a message of the worker from the subject, and never return."""
    os.write(int(sys.argv[4]), len(text).to_bytes(8, "little") + text + rest)
    time.sleep(1000)


class SendsOneByte(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        os.write(int(sys.argv[4]), b"\1")
        return time.sleep(1000)


class SendsByteByByte(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        os.write(int(sys.argv[4]), (1 << 20).to_bytes(8, "little"))
        while True:
            os.write(int(sys.argv[4]), b" ")
            time.sleep(0.01)


class AnnouncesTooMuch(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        os.write(int(sys.argv[4]), (1 << 60).to_bytes(8, "little"))
        return time.sleep(1000)


class SendsDeepJson(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        _send(b"[" * 60000)


class SendsAList(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        _send(b"[]")


class SendsNull(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        _send(b"null")


class SendsTwoKinds(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        _send(b'{"dict": {"returned": {"a": 1, "b": 2}}}')


class SendsHalfAnError(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        _send(b'{"dict": {"raised": {"list": ["ValueError"]}}}')


class SendsObjects(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        _send(b'{"dict": {"returned": {"array": ["|O", [1], [8], 8]}}}', b"\0" * 8)


class ChangesWhatIsNot(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        _send(b'{"dict": {"returned": null, "changed": {"dict": {"99": 1}}}}')


class SendsHugeStrides(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        _send(b'{"dict": {"returned": {"array": ["<f8", [2], [1099511627776000], 16]}}}', b"\0" * 16)


class SendsAName(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        _send(b'{"dict": {"raised": {"list": ["a\\u0000\\udcff", "\\u001b[31mred", true]}}}')


class Stops(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)


class Escapes(ReferenceSubject):
    """Raises a message that would set a terminal's title, clear it and turn its text around."""

    def forward(self, x: Any, training: bool) -> Any:
        raise ValueError("\x1b]0;title\x07\x1b[2J \udcff \u202e end")


class SaysTooMuch(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        raise ValueError("y" * 50_000_000)


class NestsTooDeep(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        nested: Any = x
        for _ in range(3000):
            nested = (nested,)
        return nested


class GivesAnEndlessInteger(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        return 10**5000


class GivesALyingArray(ReferenceSubject):
    """Returns a right answer of a class that reports other bytes."""

    def forward(self, x: Any, training: bool) -> Any:
        class Lying(np.ndarray):  # type: ignore[type-arg]
            def tobytes(self, *_: Any) -> bytes:
                return b"12"

        return super().forward(x, training).view(Lying)


class PrintsForever(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        while True:
            print("chatter " * 10_000, flush=True)


class KeepsItsState(ReferenceSubject):
    """Updates the very arrays that it was given to load."""

    def load(self, *arrays: Any) -> None:
        super().load(*arrays)
        self._given = arrays[2:]

    def forward(self, x: Any, training: bool) -> Any:
        y = super().forward(x, training)
        self._given[0][...], self._given[1][...] = self.moving_mean, self.moving_var
        return y


class KeepsItsInput(ReferenceSubject):
    """Writes dx into the x that forward was given."""

    def forward(self, x: Any, training: bool) -> Any:
        self._x = x
        return super().forward(x, training)

    def backward(self, dy: Any) -> Any:
        gradients = super().backward(dy)
        self._x[...] = gradients[0]
        return gradients


class LeavesSomethingBehind(ReferenceSubject):
    """Starts a process in a new session, and an orphaned one with an empty environment; then hangs."""

    def forward(self, x: Any, training: bool) -> Any:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)"], env={}, start_new_session=True)
        return time.sleep(1000)


class Leaks(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        _hoard.append(np.ones(5_000_000))
        return super().forward(x, training)


class LeaksInOneCall(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        while True:
            _hoard.append(np.ones(1_000_000))
            time.sleep(0.01)


class Prints(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        print("chatter " * 100_000)
        return super().forward(x, training)


class Shared(ReferenceSubject):
    """A correct one that starts a process, which survives a crash and keeps inherited files open."""

    def forward(self, x: Any, training: bool) -> Any:
        child = os.fork()
        if child == 0:
            time.sleep(1000)
        print(child, flush=True)
        os._exit(5)


class DiesLater(ReferenceSubject):
    """Its process ends between two calls."""

    def forward(self, x: Any, training: bool) -> Any:
        threading.Timer(0.05, os._exit, [6]).start()
        return super().forward(x, training)

    def moving(self) -> Any:
        time.sleep(1000)


class DiesOfAnOddSignal(ReferenceSubject):
    def forward(self, x: Any, training: bool) -> Any:
        os.kill(os.getpid(), 40)


def _maker(kind: type[ReferenceSubject]) -> Any:
    return lambda num_features, spec, device: kind(num_features, spec)


def right(num_features: int, spec: Any, device: str) -> Any:
    """Make a correct one, on the given device."""
    assert device in ("cpu", "chip:1"), device
    return ReferenceSubject(num_features, spec)


MAKERS = {name: _maker(kind) for name, kind in list(globals().items()) if isinstance(kind, type)}
globals().update({f"make_{name}": make for name, make in MAKERS.items()})

number = 3


def own(num_features: int, spec: Any, device: str) -> Any:
    """Make a correct one with its own defaults."""
    assert spec is None
    return ReferenceSubject(num_features)
