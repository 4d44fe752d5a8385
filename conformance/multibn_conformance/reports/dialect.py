"""The dialect of a subject for the report, determined from its answers when it is made without a spec."""

from __future__ import annotations

import warnings
from typing import Any

from multibn.backend import Subject
from multibn_conformance.identify.identity import TITLES, identify
from multibn_conformance.subjects.backends import Candidate


def dialect_of(candidate: Candidate) -> dict[str, Any]:
    """The parameters as code, the nearest dialect, the differences from it, and how each was determined."""

    def make(num_features: int) -> Subject:
        return candidate.backend.make(num_features, None, candidate.device, candidate.implementation)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hostile input is meant to make a framework warn
        found = identify(make)
    return {
        "spec": found.code(),
        "nearest": None if found.nearest is None else ", ".join(found.nearest.names),
        "differs": [] if found.nearest is None else list(found.nearest.differs),
        "findings": [{"property": TITLES[key], "finding": each.finding, "how": each.how} for key, each in found.findings.items()],
    }
