"""The suite as pytest tests, one for each subject and case: ``pytest conformance --backend torch``."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("mpmath") is None:
    pytest.skip("the oracle needs mpmath: pip install 'multibn[conformance]'", allow_module_level=True)

from .cases.case import Case
from .judging.judge import judge
from .plugin import chosen_by, seeds_by, whitening_by
from .subjects.backends import Absent, Candidate
from .whitening.case import WhiteningCase
from .whitening.judge import judge as judge_whitening


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Subjects and cases, as the options choose them."""
    if "whitening_case" in metafunc.fixturenames:
        able, whitening = whitening_by(metafunc.config)
        of_whitening = [
            pytest.param(each, case, id=f"{each.name}-{case.id}".replace("/", "-")) for each in able for case in whitening
        ]
        none = pytest.param(None, None, id="none", marks=pytest.mark.skip(reason="no case of whitening was chosen"))
        metafunc.parametrize(("candidate", "whitening_case"), of_whitening or [none])
        return
    present, absent, cases = chosen_by(metafunc.config)
    if "number" in metafunc.fixturenames:
        seeds = [(each, number) for number in seeds_by(metafunc.config) for each in present]
        checks = [pytest.param(*each, id=f"{each[0].name}-random-{each[1]}".replace("/", "-")) for each in seeds]
        none = pytest.param(None, None, id="none", marks=pytest.mark.skip(reason="no random cases: --random N runs some"))
        metafunc.parametrize(("candidate", "number"), checks or [none])
        return
    checks = [pytest.param(each, case, id=f"{each.name}-{case.id}".replace("/", "-")) for each in present for case in cases]
    missing = [pytest.param(each, None, id=f"{each.name}-absent".replace("/", "-")) for each in absent]
    metafunc.parametrize(("candidate", "case"), checks + missing)


def test_conforms(candidate: Candidate | Absent, case: Case) -> None:
    """The subject passes the case; absent subjects are skipped with a reason."""
    if isinstance(candidate, Absent):
        pytest.skip(f"{candidate.name}: {candidate.reason}")
    judgement = judge(candidate, case)
    if judgement.status in ("skip", "differs"):
        pytest.skip(judgement.message)
    assert judgement.status == "pass", f"{judgement.message}\n{judgement.snippet}"


def test_conforms_at_random(candidate: Candidate, number: int) -> None:
    """The same for the case of a seed."""
    pytest.importorskip("hypothesis", reason="random cases need hypothesis: pip install 'multibn[conformance]'")
    from .runs.seeds import judge_seed

    _, judgement = judge_seed(candidate, number)
    if judgement.status == "skip":
        pytest.skip(judgement.message)
    assert judgement.status == "pass", f"{judgement.message}\n{judgement.snippet}"


def test_whitening_conforms(candidate: Candidate, whitening_case: WhiteningCase) -> None:
    """The whitening layer gives what the case wants."""
    judgement = judge_whitening(candidate, whitening_case)
    if judgement.status == "skip":
        pytest.skip(judgement.message)
    assert judgement.status == "pass", f"{judgement.message}\n{judgement.snippet}"
