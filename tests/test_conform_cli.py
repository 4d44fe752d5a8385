"""The command line and the pytest run of the suite: choices, messages, exit codes, third-party backends."""

from __future__ import annotations

import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from rich.console import Console

from multibn.backend import Backend
from multibn.cli import app
from multibn.numpy_backend import BACKEND
from multibn.spec.clauses import CLAUSES
from multibn.sync.clauses import CLAUSES as SYNCHRONISED
from multibn.usage import UsageError
from multibn.whitening.spec import CLAUSES as WHITENING
from multibn_conformance import reproduce
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.judging.judge import Judgement
from multibn_conformance.reports import terminal as terminal_
from multibn_conformance.runs import backends as backends_
from multibn_conformance.subjects import backends as subjects
from multibn_conformance.whitening.cases import CASES as WHITENING_CASES

ROOT = Path(__file__).parents[1]

THIRD_PARTY = """
from multibn.numpy_backend import KernelSubject, ReferenceSubject
from multibn.backend import Backend

class Wrong(ReferenceSubject):
    def _forward(self, x, training):
        super()._forward(x, training)
        return super()._forward(x, training)

def make(num_features, spec, device, implementation):
    return {"right": ReferenceSubject, "wrong": Wrong}[implementation](num_features, spec)

RIGHT = Backend("right", {"third": "3.0"}, {"right": "exact"}, lambda: ("cpu", "chip:0"), make)
WRONG = Backend("wrong", {"third": "3.0"}, {"wrong": "exact"}, lambda: ("cpu",), make)
LOOSE = Backend("loose", {"third": "3.0"}, {"right": "working"}, lambda: ("cpu", "chip:0"), make)
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A third-party distribution, whose backends are found through entry points only."""
    (tmp_path / "third_party_norm.py").write_text(THIRD_PARTY)
    info = tmp_path / "third_party_norm-3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-norm\nVersion: 3.0\n")
    (info / "entry_points.txt").write_text(
        "[multibn.backends]\n"
        + "".join(f"{name} = third_party_norm:{name.upper()}\n" for name in ("right", "wrong", "loose"))
        + "missing = no_such_module:BACKEND\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(subjects, "entry_points", lambda group: _points(tmp_path, group))
    return tmp_path


def _points(path: Path, group: str) -> list[object]:
    from importlib.metadata import distributions

    return [point for found in distributions(path=[str(path)]) for point in found.entry_points if point.group == group]


def called(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.usefixtures("third_party")
def test_conforms() -> None:
    code, out, err = called("conform", "--backend", "right", "--clause", "BN-07")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.fullmatch(r" BN-07 +ok \d\.\d, \d\.\dd *", next(line for line in lines if "BN-07" in line))
    assert lines[-3:] == [
        "Worst error in ulp of the output's type, at the scale of the result; d: in float64, which has nothing wider to work in, "
        "so that it loses kappa (the mean over the deviation, up to 1e6 here) where the values lie far from 0. "
        "Judged with third 3.0.",
        "skipped right/right/chip:0: exact implementations run on cpu",
        "conforms: right/right/cpu (11 checks)",
    ]


@pytest.mark.usefixtures("third_party")
def test_does_not_conform() -> None:
    code, out, _ = called("conform", "--backend", "right", "--backend", "wrong", "--device", "cpu", "--clause", "BN-05")
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith("wrong/wrong/cpu fails BN-05-ten-steps-rank-2-float32: step 1 of 10 (train), moving_mean[")
    assert lines[1] == f"BN-05: {CLAUSES['BN-05']}"
    assert lines[3].startswith("These are the values of a BatchNorm that updates twice per forward (updates-twice: ")
    assert lines[4].startswith(
        "It fails 14 more of this clause: BN-05-ten-steps-rank-3-float32, BN-05-ten-steps-rank-4-float32, "
    )
    assert lines[5:7] == [
        "from multibn_conformance import reproduce",
        "print(reproduce('wrong/wrong/cpu', 'BN-05-ten-steps-rank-2-float32'))",
    ]
    assert lines[-1] == "does not conform: wrong/wrong/cpu breaks BN-05"
    assert reproduce("wrong/wrong/cpu", "BN-05-ten-steps-rank-2-float32").splitlines() == [
        lines[0].removeprefix("wrong/wrong/cpu fails "),
        *lines[1:4],
    ]
    assert reproduce("right/right/cpu", "BN-05-ten-steps-rank-2-float32") == "pass"


@pytest.mark.usefixtures("third_party")
def test_one_failure_and_what_is_left_out() -> None:
    code, out, _ = called(
        "conform", "--backend", "[lw]*", "--device", "cpu", "--case", "BN-15-rank-?", "--case", "BN-05-momentum-0.1"
    )
    lines = out.splitlines()
    assert code == 1
    assert lines[4].startswith("from")
    assert lines[-2:] == [
        "skipped loose/right/cpu: BN-15-rank-2, BN-15-rank-4: only implementations with exact precision promise equal bits",
        "does not conform: wrong/wrong/cpu breaks BN-05, BN-15",
    ]


@pytest.mark.usefixtures("third_party")
def test_a_case_that_differs_where_it_may_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    import third_party_norm  # type: ignore[import-not-found]

    monkeypatch.setattr(third_party_norm.Wrong, "_forward", lambda self, x, training: 1 + _reference(self, x, training))
    code, out, _ = called("conform", "--backend", "wrong", "--case", "BN-14-bits-across-layouts")
    assert code == 0
    assert out.splitlines()[-2:] == [
        "noted wrong/wrong/cpu: BN-14-bits-across-layouts: may differ, and does",
        "conforms: wrong/wrong/cpu (0 checks)",
    ]


def _reference(subject: Any, x: Any, training: bool) -> Any:
    from multibn.numpy_backend import ReferenceSubject

    return ReferenceSubject._forward(subject, x, training)


@pytest.mark.usefixtures("third_party")
def test_all_of_the_third_party() -> None:
    code, out, _ = called("conform", "--case", "BN-07-one-value")
    assert code == 0
    assert "skipped missing: cannot load no_such_module:BACKEND: ModuleNotFoundError: No module named 'no_such_module'" in out
    assert out.splitlines()[-1] == "conforms: loose/right/chip:0, loose/right/cpu, right/right/cpu, wrong/wrong/cpu (4 checks)"


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "keras"), "unknown backend 'keras'; choose from right, wrong, loose, missing."),
        (
            ("--backend", "missing"),
            "cannot use backend 'missing': cannot load no_such_module:BACKEND: ModuleNotFoundError: "
            "No module named 'no_such_module'. Install what it needs.",
        ),
        (("--device", "cuda:0"), "unknown device 'cuda:0'; choose from cpu, chip:0."),
        (("--backend", "wrong", "--device", "cuda:0"), "unknown device 'cuda:0'; choose from cpu."),
        (
            ("--backend", "right", "--device", "chip:0"),
            "no subjects found: right/right/chip:0: exact implementations run on cpu.",
        ),
        (("--case", "BN-99-*"), f"unknown case 'BN-99-*'; choose from {', '.join([*CASES, *WHITENING_CASES])}."),
        (("--clause", "SY-01", "--clause", "BN-05"), "SY-01 cannot be judged in one process. Add --ranks 3."),
        (("--clause", "BN-99"), f"unknown clause 'BN-99'; choose from {', '.join([*CLAUSES, *WHITENING])}."),
        (
            ("--case", "BN-05-*", "--clause", "BN-06"),
            "no case that matches BN-05-* belongs to BN-06. Drop --case or --clause.",
        ),
    ],
)
def test_a_wrong_call(arguments: tuple[str, ...], message: str) -> None:
    assert called("conform", *arguments) == (2, "", f"multibn: {message}\n")


def test_no_subjects_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "entry_points", lambda group: [])
    assert called("conform") == (2, "", "multibn: no subjects found: no backend.\n")
    assert called("conform", "--backend", "torch") == (2, "", "multibn: unknown backend 'torch'; there is none.\n")


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize(
    ("subject", "case", "message"),
    [
        (
            "a/b/c",
            "BN-07-one-value",
            "unknown subject 'a/b/c'; choose from right/right/cpu, wrong/wrong/cpu, loose/right/cpu, loose/right/chip:0.",
        ),
        ("*", "BN-07-one-value", "reproduce runs one case on one subject; these are patterns of several."),
        ("wrong/wrong/cpu", "BN-0*", "reproduce runs one case on one subject; these are patterns of several."),
    ],
)
def test_reproduce_refuses(subject: str, case: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        reproduce(subject, case)
    assert str(caught.value) == message


def test_an_unknown_option_is_a_wrong_call() -> None:
    assert called("conform", "--backends", "numpy")[0] == 2


def test_what_the_oracle_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("mpmath", "multibn_conformance"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mpmath", None)
    needed = "multibn conform needs mpmath, which is not installed: pip install 'multibn[conformance]'"
    assert called("conform") == (2, "", f"multibn: {needed}\n")


def test_clauses_and_dialects() -> None:
    known = {**CLAUSES, **WHITENING, **SYNCHRONISED}
    assert called("clauses") == (0, "".join(f"{number}  {text}\n" for number, text in known.items()), "")
    code, out, _ = called("dialects")
    assert code == 0
    assert "gluon" in out


def test_help_loads_no_framework() -> None:
    code = (
        "import sys; sys.argv = ['multibn', 'conform', '--help']\n"
        "from multibn.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'numba', 'torch', 'mxnet', 'mpmath', 'sklearn', 'pytest'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_progress_bar_is_for_terminals() -> None:
    for terminal in (True, False):
        text = StringIO()
        candidates = [subjects.Candidate(BACKEND, "reference", "cpu")]
        judgements = backends_.run(candidates, [CASES["BN-07-one-value"]], Console(file=text, force_terminal=terminal, width=100))
        assert [each.status for each in judgements] == ["pass"]
        assert ("numpy/reference/cpu" in text.getvalue()) == terminal


def test_the_table_of_seven_is_whole_in_80_columns() -> None:
    names = [
        *(("mxnet", which) for which in ("kernel", "framework", "composed")), ("numpy", "reference"), ("numpy", "kernel"),
        ("torch", "kernel"), ("torch", "framework"),
    ]  # fmt: skip
    its = [subjects.Candidate(Backend(name, {}, {}, tuple, BACKEND.make), which, "cpu") for name, which in names]
    judged = [
        Judgement(one.name, "a", "BN-01", "pass", ulp=ulp, dtype=dtype)
        for one in its
        for ulp, dtype in ((2.3e5, "float32"), (1.2e4, "float64"))
    ]
    text = StringIO()
    Console(file=text, width=80).print(terminal_._table(judged, its))
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert lines[1:3] == [[name for name, _ in names], [which for _, which in names]]
    assert lines[5:7] == [["BN-01", *["ok", "2e5,"] * 7], ["1e4d"] * 7]


def checked(*arguments: str, path: Path | None = None, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``pytest conformance`` in a separate process."""
    start = f"import sys; sys.path[:0] = [{str(path)!r}]" if path else "import sys"
    given = ["conformance", "-q", "-p", "no:cacheprovider", *arguments]
    code = f"{start}\n{before}\nimport pytest; sys.exit(pytest.main({given!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_pytest_names_subject_and_case(third_party: Path) -> None:
    done = checked("--backend", "right", "--backend", "wrong", "--case", "BN-05-momentum-0*", "-rA", path=third_party)
    assert done.returncode == 1, done.stdout
    for line in (
        "PASSED conformance/multibn_conformance/checks.py::test_conforms[right-right-cpu-BN-05-momentum-0.1]",
        "FAILED conformance/multibn_conformance/checks.py::test_conforms[wrong-wrong-cpu-BN-05-momentum-0.1]",
    ):
        assert any(each.startswith(line) for each in done.stdout.splitlines()), done.stdout
    assert "right/right/chip:0: exact implementations run on cpu" in done.stdout


def test_pytest_skips_what_is_not_promised(third_party: Path) -> None:
    done = checked("--backend", "loose", "--device", "cpu", "--case", "BN-15-rank-2", "-rs", path=third_party)
    assert done.returncode == 0, done.stdout
    assert "only implementations with exact precision promise equal bits" in done.stdout


def test_pytest_with_a_backend_that_cannot_load_is_an_error(third_party: Path) -> None:
    done = checked("--backend", "missing", path=third_party)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr == (
        "ERROR: cannot use backend 'missing': cannot load no_such_module:BACKEND: ModuleNotFoundError: "
        "No module named 'no_such_module'. Install what it needs.\n\n"
    )


def test_pytest_without_mpmath_is_a_skip() -> None:
    done = checked("-rs", before="sys.modules['mpmath'] = None")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "the oracle needs mpmath: pip install 'multibn[conformance]'" in done.stdout


def test_a_candidate_is_named_by_backend_implementation_and_device() -> None:
    backend = Backend("a", {}, {"b": "exact"}, lambda: ("c",), lambda *_: None)  # type: ignore[arg-type]
    assert repr(subjects.Candidate(backend, "b", "c")) == "Candidate(implementation='b', device='c', python=None)"
    assert subjects.Candidate(backend, "b", "c").name == "a/b/c"


@pytest.mark.parametrize(
    ("command", "arguments", "module"),
    [
        ("identify", ["plain:make"], "identify.identity"),
        ("vectors", ["write", "DIR"], "vectors.run"),
        ("vectors", ["check", "DIR", "A"], "vectors.run"),
    ],
)
def test_what_is_not_installed_is_a_wrong_call(
    command: str, arguments: list[str], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"multibn_conformance.{module}", None)
    monkeypatch.delattr(f"multibn_conformance.{module}", raising=False)
    code, _, err = called(command, *arguments)
    needs = "multibn_conformance, which is not installed: pip install 'multibn[conformance]'"
    assert (code, err) == (2, f"multibn: multibn {command} needs {needs}\n")
