"""The cases of whitening as pytest: one test for each subject and case, ``pytest conformance --clause WH-07``."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("mpmath") is None:
    pytest.skip("the oracle needs mpmath: pip install 'multibn[conformance]'", allow_module_level=True)

from multibn_conformance.plugin import OPTIONS, other_tier
from multibn_conformance.subjects import Candidate, candidates
from multibn_conformance.whitening.case import WhiteningCase
from multibn_conformance.whitening.judge import judge
from multibn_conformance.whitening.run import split


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Subjects that whiten, and cases, as the options choose them."""
    backends, devices, ids, clauses = (metafunc.config.getoption(name) for name in OPTIONS)
    able = [each for each in candidates(backends, devices)[0] if each.whitens]
    cases = split(ids, clauses, other_tier(metafunc.config))[2]
    checks = [pytest.param(each, case, id=f"{each.name}-{case.id}".replace("/", "-")) for each in able for case in cases]
    none = pytest.param(None, None, id="none", marks=pytest.mark.skip(reason="no case of whitening was chosen"))
    metafunc.parametrize(("candidate", "case"), checks or [none])


def test_whitening_conforms(candidate: Candidate, case: WhiteningCase) -> None:
    """The layer gives what the case wants."""
    judgement = judge(candidate, case)
    if judgement.status == "skip":
        pytest.skip(judgement.message)
    assert judgement.status == "pass", f"{judgement.message}\n{judgement.snippet}"
