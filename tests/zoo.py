"""Subjects that misbehave in a process of their own, each made by the function ``make_`` and its name."""

from __future__ import annotations

import ctypes
import os
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
    """A right one that starts a process, which outlives a crash and holds on to what it inherits."""

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
    """As it should be, on the device that it is told."""
    assert device in ("cpu", "chip:1"), device
    return ReferenceSubject(num_features, spec)


MAKERS = {name: _maker(kind) for name, kind in list(globals().items()) if isinstance(kind, type)}
globals().update({f"make_{name}": make for name, make in MAKERS.items()})

number = 3


def own(num_features: int, spec: Any, device: str) -> Any:
    """A right one that is asked for its own defaults."""
    assert spec is None
    return ReferenceSubject(num_features)
