"""Who is judged: every backend of the entry point group ``multibn.backends``, each implementation, on each device present."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from multibn.backend import Backend, Precision, Subject
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError
from multibn_conformance.usage import chosen

GROUP = "multibn.backends"


@dataclass(frozen=True)
class Candidate:
    """One implementation of a backend on one device."""

    backend: Backend = field(repr=False)
    implementation: str
    device: str

    @property
    def name(self) -> str:
        """As ``torch/kernel/cpu``."""
        return f"{self.backend.name}/{self.implementation}/{self.device}"

    @property
    def precision(self) -> Precision:
        """What it promises."""
        return self.backend.implementations[self.implementation]

    @property
    def whitens(self) -> bool:
        """Whether it has whitening layers; exact ones run on a CPU only."""
        if self.precision == "exact" and self.device != "cpu":
            return False
        return self.backend.whitening is not None and self.implementation not in self.backend.no_whitening

    def make(self, num_features: int, spec: BatchNormSpec) -> Subject:
        """A subject of its own."""
        return self.backend.make(num_features, spec, self.device, self.implementation)


@dataclass(frozen=True)
class Absent:
    """A backend, or an implementation on a device, that is not judged, and why."""

    name: str
    reason: str


def backends(names: Sequence[str] = ()) -> tuple[list[Backend], list[Absent]]:
    """The backends of these names (all if none is given) that load, and those that do not.

    Raises:
        UsageError: an unknown name, or a backend that was asked for by its name cannot be loaded.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    loaded: list[Backend] = []
    absent: list[Absent] = []
    for name in chosen("backend", names, list(points)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a framework says while it is imported is not the user's to mend
                backend = points[name].load()
        except Exception as error:
            reason = f"{points[name].value} cannot be loaded: {type(error).__name__}: {error}"
            if name in names:
                raise UsageError(f"backend {name!r} was asked for, but {reason}. Install what it needs.") from error
            absent.append(Absent(name, reason))
        else:
            loaded.append(backend)
    return loaded, absent


def candidates(names: Sequence[str] = (), devices: Sequence[str] = ()) -> tuple[list[Candidate], list[Absent]]:
    """Who is judged, and who is not.

    Raises:
        UsageError: as for ``backends``; or a device that was asked for is not present.
    """
    loaded, absent = backends(names)
    present = {backend.name: tuple(backend.devices()) for backend in loaded}
    everywhere = list(dict.fromkeys(device for its in present.values() for device in its))
    wanted = chosen("device", devices, everywhere)
    found = []
    for backend in loaded:
        for device in present[backend.name]:
            for implementation, precision in backend.implementations.items():
                if device not in wanted:
                    continue
                candidate = Candidate(backend, implementation, device)
                if precision == "exact" and device.partition(":")[0] not in backend.exact_on:
                    where = " and ".join(backend.exact_on)
                    absent.append(Absent(candidate.name, f"exact implementations run on {where}"))
                else:
                    found.append(candidate)
    return found, absent
