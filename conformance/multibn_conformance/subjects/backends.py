"""Find the subjects: every backend of the entry point group ``multibn.backends``, each implementation, on each device."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points

from multibn.backend import Backend, Precision, Subject
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError
from multibn_conformance.usage import chosen

from . import elsewhere
from .elsewhere import GROUP
from .text import plain


@dataclass(frozen=True)
class Candidate:
    """One implementation of a backend on one device; ``python``: the interpreter that has it, None for this one."""

    backend: Backend = field(repr=False)
    implementation: str
    device: str
    python: str | None = None

    @property
    def name(self) -> str:
        """As ``torch/kernel/cpu``."""
        return f"{self.backend.name}/{self.implementation}/{self.device}"

    @property
    def precision(self) -> Precision:
        """The arithmetic that it promises."""
        return self.backend.implementations[self.implementation]

    @property
    def whitens(self) -> bool:
        """Whether it has whitening layers; exact ones run on a CPU only."""
        if self.precision == "exact" and self.device != "cpu":
            return False
        return self.backend.whitening is not None and self.implementation not in self.backend.no_whitening

    def make(self, num_features: int, spec: BatchNormSpec) -> Subject:
        """Make a new subject."""
        return self.backend.make(num_features, spec, self.device, self.implementation)

    def again(self, *options: str) -> str | None:
        """The command that judges it once more, where it is another interpreter's."""
        if self.python is None:
            return None
        name = ["--backend", self.backend.name, "--device", self.device, "--python", self.python]
        return shlex.join(["multibn", "conform", *name, *options])


@dataclass(frozen=True)
class Absent:
    """A backend, or an implementation on a device, that is not judged, and why."""

    name: str
    reason: str


def backends(names: Sequence[str] = (), pythons: Sequence[str] = ()) -> tuple[list[tuple[Backend, str | None]], list[Absent]]:
    """The backends of these names (all if none is given), each with the interpreter that has it, None for this one; and those
    that none can load.

    Args:
        names: backends or patterns of them.
        pythons: other interpreters, for the backends that cannot be loaded here; the first that can loads it.

    Raises:
        UsageError: an unknown name, a backend that was asked for by its name cannot be loaded, or no such interpreter.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    there = {python: elsewhere.names(python) for python in pythons}
    loaded: list[tuple[Backend, str | None]] = []
    absent: list[Absent] = []
    for name in chosen("backend", names, list(dict.fromkeys([*points, *(each for its in there.values() for each in its)]))):
        reasons = []
        for python in [None] * (name in points) + [each for each in pythons if name in there[each]]:
            try:
                loaded.append((_load(points[name]) if python is None else elsewhere.backend(name, python), python))
                break
            except Exception as error:
                reasons.append(
                    f"cannot load {points[name].value}: {type(error).__name__}: {error}" if python is None else str(error)
                )
        else:
            reason = plain("; ".join(reasons))
            if name in names:
                raise UsageError(f"cannot use backend {name!r}: {reason}. Install what it needs.")
            absent.append(Absent(name, reason))
    return loaded, absent


def _load(point: EntryPoint) -> Backend:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a framework says while it is imported is not the user's to mend
        backend: Backend = point.load()
    return backend


def candidates(
    names: Sequence[str] = (), devices: Sequence[str] = (), pythons: Sequence[str] = ()
) -> tuple[list[Candidate], list[Absent]]:
    """Who is judged, and who is not; the arguments are those of ``backends``, and the devices to judge on.

    Raises:
        UsageError: as for ``backends``; or a device that was asked for is not present.
    """
    loaded, absent = backends(names, pythons)
    present = {backend.name: tuple(backend.devices()) for backend, _ in loaded}
    everywhere = list(dict.fromkeys(device for its in present.values() for device in its))
    wanted = chosen("device", devices, everywhere)
    found = []
    for backend, python in loaded:
        for device in present[backend.name]:
            for implementation, precision in backend.implementations.items():
                if device not in wanted:
                    continue
                candidate = Candidate(backend, implementation, device, python)
                if precision == "exact" and device.partition(":")[0] not in backend.exact_on:
                    where = " and ".join(backend.exact_on)
                    absent.append(Absent(candidate.name, f"exact implementations run on {where}"))
                else:
                    found.append(candidate)
    return found, absent
