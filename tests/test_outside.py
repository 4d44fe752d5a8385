"""External subjects in a separate process: whatever a subject does, its case fails with a message, and the run continues."""

from __future__ import annotations

import ast
import io
import os
import re
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from typer.testing import CliRunner

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from multibn.cli import app
from multibn.dialects import DIALECTS
from multibn.numpy_backend import ReferenceSubject
from multibn.spec.batchnorm import BatchNormSpec
from multibn.spec.clauses import CLAUSES
from multibn_conformance.cases import fixed
from multibn_conformance.cases.fit import fitted
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.cases.inputs import Layout, Values
from multibn_conformance.defects.catalogue import DEFECTS
from multibn_conformance.judging.judge import judge, judge_maker
from multibn_conformance.runs.external import judged
from multibn_conformance.subjects import ending, outside, worker
from multibn_conformance.subjects.outside import Broken, started
from multibn_conformance.subjects.text import plain
from multibn_conformance.usage import spec_from

TESTS = Path(__file__).parent
GUIDE = TESTS.parent / "docs" / "judge-your-own.md"
TRAIN, INFER, REFUSE = "BN-01-rank-3-float32", "BN-07-one-value", "BN-12-refuses-one-value-rank-2"


@pytest.fixture(autouse=True)
def where_the_zoo_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subject is found from the folder in which the command runs."""
    monkeypatch.chdir(TESTS)


def message(name: str, case: str, timeout: float | None = None) -> str:
    """Return the first line of the message for one case on one subject."""
    theirs = judged(f"zoo:make_{name}", [CASES[case]], timeout=timeout)
    assert theirs is not None
    return judge(theirs.candidate, CASES[case]).message.partition("\n")[0]


def called(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    "name",
    [
        "Raises",
        "LosesAnAxis",
        "Promotes",
        "GivesNaN",
        "GivesNothing",
        "GivesAList",
        "WritesIntoItsInput",
        "HasNoMoving",
        "RefusesToBe",
    ],
)
def test_what_is_wrong_here_is_as_wrong_there(name: str) -> None:
    kind: type[ReferenceSubject] = getattr(zoo, name)
    here = judge_maker(kind, CASES[TRAIN], "zoo/one/cpu", "working").message.splitlines()[0]
    assert message(name, TRAIN) == here


@pytest.mark.parametrize(
    ("name", "case", "wanted"),
    [
        ("Hangs", TRAIN, "step 1 of 1 (train): forward did not come back within 0.3 s; its process was stopped."),
        ("Hangs", REFUSE, "step 1 of 1 (refuse): forward did not come back within 0.3 s; its process was stopped."),
        ("Exits", TRAIN, "step 1 of 1 (train): forward raised SystemExit: 4. That ends a process; refuse with an Exception."),
        ("Exits", REFUSE, "step 1 of 1 (refuse): forward raised SystemExit: 4. That ends a process; refuse with an Exception."),
        (
            "ExitsAtOnce",
            TRAIN,
            "step 1 of 1 (train): forward ended its process with exit code 3. The last that it printed: farewell",
        ),
        ("Crashes", TRAIN, "step 1 of 1 (train): forward ended its process by signal SIGSEGV."),
        ("DiesOfAnOddSignal", TRAIN, "step 1 of 1 (train): forward ended its process by signal 40."),
        (
            "DiesLater",
            TRAIN,
            "step 1 of 1 (train), reading the moving statistics: moving ended its process with exit code 6.",
        ),
        ("SpeaksOutOfTurn", TRAIN, "step 1 of 1 (train): forward wrote into the pipe to the suite; its process was stopped."),
        ("ClosesEverything", TRAIN, "step 1 of 1 (train): forward closed the pipe to the suite; its process was stopped."),
        ("SendsOneByte", TRAIN, "step 1 of 1 (train): forward did not come back within 0.3 s; its process was stopped."),
        ("SendsByteByByte", TRAIN, "step 1 of 1 (train): forward did not come back within 0.3 s; its process was stopped."),
        ("Stops", TRAIN, "step 1 of 1 (train): forward did not come back within 0.3 s; its process was stopped."),
        ("AnnouncesTooMuch", TRAIN, "step 1 of 1 (train): forward sent an answer of more than 256 MiB; its process was stopped."),
        ("SendsDeepJson", TRAIN, "step 1 of 1 (train): forward wrote into the pipe to the suite; its process was stopped."),
        ("SendsAList", TRAIN, "step 1 of 1 (train): forward wrote into the pipe to the suite; its process was stopped."),
        ("SendsNull", TRAIN, "step 1 of 1 (train): forward wrote into the pipe to the suite; its process was stopped."),
        ("SendsTwoKinds", TRAIN, "step 1 of 1 (train): forward wrote into the pipe to the suite; its process was stopped."),
        ("SendsHalfAnError", TRAIN, "step 1 of 1 (train): forward wrote into the pipe to the suite; its process was stopped."),
        ("SendsObjects", TRAIN, "step 1 of 1 (train): forward wrote into the pipe to the suite; its process was stopped."),
        ("ChangesWhatIsNot", TRAIN, "step 1 of 1 (train): forward wrote into the pipe to the suite; its process was stopped."),
        (
            "SendsHugeStrides",
            TRAIN,
            "step 1 of 1 (train), reading the moving statistics: moving did not come back within 0.3 s; its process was stopped.",
        ),
        ("SendsAName", TRAIN, "step 1 of 1 (train) raised a\\x00\\udcff: \\x1b[31mred"),
        ("Escapes", TRAIN, "step 1 of 1 (train) raised ValueError: \\x1b]0;title\\x07\\x1b[2J \\udcff \\u202e end"),
        ("SaysTooMuch", TRAIN, f"step 1 of 1 (train) raised ValueError: {'y' * 4000}... (10000 characters)"),
        ("NestsTooDeep", TRAIN, "step 1 of 1 (train), y: got tuple, should be a NumPy array."),
        ("GivesAnEndlessInteger", TRAIN, "step 1 of 1 (train), y: got int, should be a NumPy array."),
        ("GivesALyingArray", TRAIN, ""),
        ("PrintsForever", TRAIN, "step 1 of 1 (train): forward printed more than 1 MiB; its process was stopped."),
        ("GivesATruth", TRAIN, "step 1 of 1 (train), y: got dict, should be a NumPy array."),
        ("GivesObjects", TRAIN, "step 1 of 1 (train), y: got ndarray of object, should be a NumPy array."),
        ("RaisesWithoutText", TRAIN, "step 1 of 1 (train) raised Silent: (its message cannot be read)"),
        ("HasNoMoving", INFER, "step 1 of 1 (infer): moving returned NoneType, should be a tuple (moving_mean, moving_var)."),
    ],
)
def test_the_message_says_what_happened(name: str, case: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "PRINTED", 1)
    told = message(name, case, timeout=0.3 if "0.3 s" in wanted else None)
    assert told == (f"{case}: {wanted}" if wanted else "")


@pytest.mark.parametrize("name", ["Leaks", "LeaksInOneCall"])
def test_a_leak_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "GROWTH", 100)
    told = message(name, "BN-05-momentum-0.1")
    found = re.fullmatch(
        r"BN-05-momentum-0\.1: step (\d+) of 10 \(train\): forward leaks memory: the process has grown to (\d+) MiB, "
        r"from (\d+) MiB after its first subject was made, by more than the 100 MiB that it may; it was stopped\.",
        told,
    )
    assert found, told
    step, now, before = map(int, found.groups())
    assert now - before > 100
    assert (step > 1) == (name == "Leaks")


def test_the_run_goes_on_to_the_end() -> None:
    code, out, err = called("conform", "--subject", "zoo:make_CrashesInHalf", "--clause", "BN-10", "--clause", "BN-07")
    lines = out.splitlines()
    assert (code, err) == (1, "")
    assert lines[0] == (
        "zoo/make_CrashesInHalf/cpu fails BN-10-float16: step 1 of 3 (infer): forward ended its process by signal SIGKILL."
    )
    assert lines[1] == f"BN-10: {CLAUSES['BN-10']}"
    assert "multibn conform --subject zoo:make_CrashesInHalf --case BN-10-float16" in lines
    assert lines[-1] == "does not conform: zoo/make_CrashesInHalf/cpu breaks BN-10"


def test_the_snippet_runs_the_case_again() -> None:
    _, out, _ = called("conform", "--subject", "zoo:make_Raises", "--spec", "torch", "--python", sys.executable, "--case", TRAIN)
    command = next(line for line in out.splitlines() if line.startswith("multibn conform"))
    assert command == f"multibn conform --subject zoo:make_Raises --spec torch --python {sys.executable} --case {TRAIN}"
    code, again, _ = called(*command.split()[1:])
    assert (code, again) == (1, out)


def test_what_it_prints_is_not_in_the_report() -> None:
    code, out, _ = called("conform", "--subject", "zoo:make_Prints", "--case", TRAIN)
    assert code == 0
    assert "chatter" not in out
    assert out.splitlines()[-1] == "conforms: zoo/make_Prints/cpu (1 checks)"


def test_after_a_hang_others_of_its_kind_get_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "LEAST", 0.2)
    with started("zoo:make_Hangs", timeout=0.5) as hangs:
        for limit in ("0.5", "0.2"):
            subject = hangs.make(3, BatchNormSpec())
            subject.load(None, None, np.zeros(3, np.float32), np.ones(3, np.float32))
            with pytest.raises(Broken) as caught:
                subject.forward(np.zeros((2, 3), np.float32), True)
            assert str(caught.value) == f"forward did not come back within {limit} s; its process was stopped."
        with pytest.raises(Broken) as caught:
            subject.moving()
        assert str(caught.value) == "moving was not called: its process has ended before."


def test_a_process_ends_with_what_it_started() -> None:
    with started("zoo:right") as right:
        process = right._process
        assert process is not None
        assert process.poll() is None
    assert process.poll() == -9
    gone = started("zoo:right")
    process = gone._process
    del gone
    assert process is not None
    assert process.poll() == -9


def test_what_a_crash_leaves_behind_ends_too() -> None:
    told = message("Shared", TRAIN)
    found = re.fullmatch(r".*forward ended its process with exit code 5\. The last that it printed: (\d+)", told)
    assert found, told
    stat = Path(f"/proc/{found[1]}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {found[1]} lives on")


def test_device_and_exact() -> None:
    arguments = ("conform", "--subject", "zoo:right", "--device", "chip:1", "--precision", "exact", "--case", "BN-15-rank-2")
    code, out, err = called(*arguments)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "conforms: zoo/right/chip:1 (1 checks)"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("zoo",), "expected MODULE:MAKE, such as package.module:make, got 'zoo'."),
        (("zoo:a b",), "expected MODULE:MAKE, such as package.module:make, got 'zoo:a b'."),
        (
            ("no_such_module:make",),
            "cannot load subject no_such_module:make: importing it raised ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (
            ("zoo:no_such",),
            "cannot load subject zoo:no_such: importing it raised AttributeError: module 'zoo' has no attribute 'no_such'",
        ),
        (
            ("zoo:number",),
            "cannot load subject zoo:number: importing it raised AttributeError: zoo:number is not callable, but int",
        ),
        (
            ("zoo:right", "--python", "/no/such/python"),
            "cannot start --python /no/such/python: No such file or directory. Give the path of a Python interpreter.",
        ),
        (
            ("zoo:right", "--python", "/bin/false"),
            "cannot load subject zoo:right: importing it ended its process with exit code 1.",
        ),
        (("zoo:right", "--timeout", "0"), "--timeout must be a number of seconds > 0, got 0.0."),
        (("zoo:right", "--precision", "half"), "--precision must be working or exact, got 'half'."),
        (("zoo:right", "--backend", "numpy"), "--subject takes one --device and no --backend."),
        (
            ("zoo:right", "--device", "a", "--device", "b"),
            "--subject takes one --device and no --backend.",
        ),
        (
            ("zoo:right", "--spec", "keras"),
            f"--spec must be the name of a dialect ({', '.join(DIALECTS)}) or JSON such as '{{\"eps\": 1e-3}}', got 'keras'.",
        ),
        (
            ("zoo:right", "--spec", "3"),
            f"--spec must be the name of a dialect ({', '.join(DIALECTS)}) or JSON such as '{{\"eps\": 1e-3}}', got '3'.",
        ),
        (
            ("zoo:right", "--spec", '{"epsilon": 1}'),
            "--spec {\"epsilon\": 1}: BatchNormSpec has no parameter 'epsilon'; it has eps, momentum, moving_variance, scale, "
            "center, normalize_with, update_statistics, learn_affine. 'epsilon' is another framework's word; see 'eps'.",
        ),
        (
            ("zoo:right", "--spec", "torch", "--case", "BN-05-momentum-0"),
            "none of the chosen cases fits this --spec: they are about momentum=0.0, and the subject has 0.9. Choose others.",
        ),
    ],
)
def test_a_wrong_call(arguments: tuple[str, ...], wanted: str) -> None:
    assert called("conform", "--subject", *arguments) == (2, "", f"multibn: {wanted}\n")


@pytest.mark.parametrize("option", ["--spec", "--precision", "--timeout"])
def test_options_of_a_subject_need_one(option: str) -> None:
    needed = f"{option} needs a --subject: --subject package.module:make"
    assert called("conform", option, "1") == (2, "", f"multibn: {needed}\n")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make another interpreter, with nothing installed."""
    return _environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make another interpreter, with NumPy only."""
    python = _environment(tmp_path_factory.mktemp("other"))
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    for package in Path(np.__file__).parents[1].glob("numpy*"):
        (site / package.name).symlink_to(package)
    return python


def _environment(folder: Path) -> Path:
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def test_an_interpreter_without_numpy(bare: Path) -> None:
    wanted = f"{bare} has no NumPy, which the subject's process needs: {bare} -m pip install numpy"
    assert called("conform", "--subject", "zoo:right", "--python", str(bare)) == (2, "", f"multibn: {wanted}\n")


NEEDS_NUMPY_ALONE = """
import sys
import plain

def make(num_features, spec, device):
    found = any(name.startswith("multibn") for name in sys.modules)
    assert not found and repr(spec) == WANTED and spec.eps == 1e-12, repr(spec)
    return plain.make(num_features, spec, device)
"""


def test_another_interpreter_needs_numpy_alone(other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.py").write_text(example())
    Path("alone.py").write_text(NEEDS_NUMPY_ALONE.replace("WANTED", repr(repr(BatchNormSpec.article()))))
    code, out, err = called(
        "conform", "--subject", "alone:make", "--python", str(other), "--spec", "article", "--clause", "BN-07"
    )
    assert (code, err) == (0, ""), out
    assert out.splitlines()[-1].startswith("conforms: alone/make/cpu (")


def test_the_worker_is_for_old_pythons_and_numpy_alone() -> None:
    tree = ast.parse(Path(worker.__file__).read_text(), feature_version=(3, 8))
    imports = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([each.name for each in node.names] if isinstance(node, ast.Import) else [node.module or "."])
    }
    assert imports - sys.stdlib_module_names == {"numpy", "multibn"}  # multibn only if it is installed


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last", "sliced", "negative"])
@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "bool"])
def test_arrays_travel_with_their_strides(layout: Layout, dtype: str) -> None:
    sent = Values((4, 3, 5, 6), dtype=dtype, layout=layout).array()
    came = _travelled(sent)
    assert came.dtype == sent.dtype
    assert came.strides == sent.strides
    assert np.array_equal(came, sent)
    came[...] = 0  # it may be written to


@pytest.mark.parametrize("sent", [np.zeros((0, 3)), np.broadcast_to(np.float32(2), (4, 3)), np.array(3.5)])
def test_odd_arrays_travel(sent: np.ndarray) -> None:  # type: ignore[type-arg]
    came = _travelled(sent)
    assert came.dtype == sent.dtype
    assert came.shape == sent.shape
    assert np.array_equal(came, sent)


def test_values_travel() -> None:
    values = {"a": [1, 2.5, None, True], "b": ("x", float("inf")), "c": 1e-300}
    assert _travelled(values) == values
    assert _travelled(np.float32(1)).name == "float32"


def _travelled(value: object) -> Any:
    pipe = io.BytesIO()
    worker.send(pipe, value)
    pipe.seek(0)
    return worker.receive(pipe)


def test_a_subject_that_is_gone_before_the_call() -> None:
    with started("zoo:right") as right:
        subject = right.make(3, None)
        assert right._process is not None
        right._process.kill()
        right._process.wait()
        with pytest.raises(Broken) as caught:
            subject.moving()
        assert str(caught.value) == "moving ended its process by signal SIGKILL."


def test_where_memory_is_not_told_it_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "GROWTH", -1)
    read = Path.read_text  # of other files: an earlier subject may be ended meanwhile, which reads /proc
    monkeypatch.setattr(Path, "read_text", lambda self, **how: "" if self.name == "statm" else read(self, **how))
    assert message("Prints", TRAIN) == ""


def test_the_worker_answers() -> None:
    """As the subject's process, which is killed before it can save its coverage."""
    x, spec = np.ones((2, 3), np.float32), BatchNormSpec().to_dict()
    requests, answers = io.BytesIO(), io.BytesIO()
    asked: tuple[tuple[str, tuple[Any, ...], int], ...] = (
        ("make", (3, spec, []), 1),
        ("forward", (x, True), 1),
        ("no_such", (), 1),
        ("make", (3, None, [1]), 2),
        ("versions", (), 0),
    )
    for request in asked:
        worker.send(requests, request)
    requests.seek(0)
    worker.serve("zoo:make_WritesIntoItsInput", "cpu", requests, answers)
    answers.seek(0)
    told = [worker.receive(answers) for _ in range(6)]
    assert told[0]["returned"]["NumPy"] == told[5]["returned"]["NumPy"] == np.__version__
    assert told[1] == told[4] == {"returned": None}
    assert np.array_equal(told[2]["returned"], np.zeros((2, 3)))
    assert np.array_equal(told[2]["changed"]["0"], np.zeros((2, 3)))
    assert told[3]["raised"] == ["AttributeError", "'WritesIntoItsInput' object has no attribute 'no_such'", True]
    assert np.array_equal(told[3]["changed"]["0"], np.zeros((2, 3)))
    for name, wanted in (("zoo:number", "AttributeError"), ("zoo:RaisesWithoutText", None)):
        requests, answers = io.BytesIO(), io.BytesIO()
        worker.serve(name, "cpu", requests, answers)
        answers.seek(0)
        assert worker.receive(answers).get("raised", [None])[0] == wanted
    assert worker.spec_of(None) is None


def test_half_a_message_is_none() -> None:
    pipe = io.BytesIO()
    worker.send(pipe, np.ones(9))
    with pytest.raises(EOFError):
        worker.receive(io.BytesIO(pipe.getvalue()[:-1]))


ODD_SPECS = {
    "torch": "torch",
    "caffe": "caffe",
    "article": "article",
    "paper": "paper",
    "frozen": '{"update_statistics": false, "eps": 0.3}',
    "moving": '{"normalize_with": "moving", "update_statistics": false, "momentum": 0.2}',
    "not learned": '{"learn_affine": false, "center": false, "momentum": 0}',
}
SMALL = [
    case
    for case in CASES.values()
    if case.against == "oracle" and sum(int(np.prod(step.values.shape)) for step in case.steps if step.values) < 800
]


@pytest.mark.parametrize("text", ODD_SPECS.values(), ids=ODD_SPECS)
def test_a_right_one_of_fixed_parameters_conforms(text: str) -> None:
    """Whatever it is told: so no case may hand it another spec and expect that to count."""
    spec = spec_from(text)
    cases, others = fitted(SMALL, spec)
    found = [judge_maker(lambda features, _: ReferenceSubject(features, spec), case, "one", "exact") for case in cases]
    assert [each.message for each in found if each.status != "pass"] == []
    assert {each.clause for each in cases} >= set(CLAUSES) - {"BN-04", "BN-06", "BN-09", "BN-15", "BN-16"}
    assert len(cases) + sum(map(len, others.values())) == len(SMALL)


@pytest.mark.parametrize(
    ("its", "clause"),
    [
        ({"eps": 1e-6}, "BN-03"),
        ({"momentum": 0.1}, "BN-05"),
        ({"moving_variance": "biased"}, "BN-06"),
        ({"scale": False}, "BN-04"),
        ({"update_statistics": False}, "BN-05"),
        ({"normalize_with": "moving"}, "BN-01"),
    ],
)
def test_a_wrong_parameter_is_caught(its: dict[str, object], clause: str) -> None:
    spec = spec_from("torch")
    cases, _ = fitted([case for case in SMALL if case.clause == clause], spec)
    other = replace(spec, **its)  # type: ignore[arg-type]
    found = {judge_maker(lambda features, _: ReferenceSubject(features, other), case, "one", "exact").status for case in cases}
    assert "fail" in found


def test_what_needs_statistics_that_stay_is_caught_where_they_move() -> None:
    """The state is loaded again between training and inference, so that rounding of the state does not matter."""
    cases, _ = fitted([CASES["BN-08-the-last-forward"]], spec_from("torch"))
    assert [step.do for step in cases[0].steps] == ["train", "load", "infer", "backward"]
    judgement = judge_maker(DEFECTS["gradient-of-an-old-forward"].make, cases[0], "one", "exact")
    assert judgement.status == "fail"
    assert "step 4 of 4 (backward), dx[" in judgement.message
    moving = BatchNormSpec(normalize_with="moving")
    assert "about statistics that do not move, and the subject's do" in fitted(list(CASES.values()), moving)[1]


def test_which_cases_fit() -> None:
    cases, others = fitted(list(CASES.values()), BatchNormSpec())
    assert [case for case in cases if case.spec != BatchNormSpec()] == []
    assert others["about momentum=0.0, and the subject has 0.9"] == ["BN-05-momentum-0"]
    assert "BN-06-unbiased-rank-2" in others["about moving_variance='unbiased', and the subject has 'biased'"]
    (unchanged,) = (case for case in cases if case.id == TRAIN)
    assert unchanged is CASES[TRAIN]
    (scaled,) = fitted([CASES["BN-03-eps-half"]], BatchNormSpec(eps=0.02, scale=False))[0]
    assert scaled.comment == (
        "eps 0.5 where the spread is 1.0, in training and its gradient. Run with the subject's own eps=0.02, scale=False."
    )
    assert scaled.steps[0].values is not None
    assert scaled.steps[0].values.std == pytest.approx(0.2, rel=1e-15, abs=0)
    assert scaled.steps[1] == CASES["BN-03-eps-half"].steps[1]
    _, others = fitted(list(CASES.values()), BatchNormSpec(momentum=None))
    reason = "about training on from a saved state, and momentum=None counts its batches from there"
    assert others[reason] == ["BN-13-in-the-middle"]
    frozen = BatchNormSpec(normalize_with="moving", update_statistics=False)
    assert "about batch statistics, and the subject never uses them" in fitted(list(CASES.values()), frozen)[1]


def example() -> str:
    """Return the Python code of the guide."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(code.splitlines()) == 20
    return str(code)


def test_the_guide_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fixed, "CASES", {case.id: case for case in SMALL})
    guide = GUIDE.read_text()
    (command,) = re.findall(r"```sh\nmultibn (.*?)\n```", guide)
    Path("plain.py").write_text(example())
    code, out, err = called(*command.split())
    assert (code, err) == (0, ""), out
    assert out.splitlines()[-1].startswith("conforms: plain/make/cpu (")
    assert {each.split("'")[1] for each in re.findall(r"`(--spec '.*?')`", guide)} == {'{"eps": 1e-3, "momentum": 0.99}'}
    (told,) = re.findall(r"```text\n(nearest.*?)```", guide, re.DOTALL)
    code, out, err = called("identify", "plain:make")
    assert (code, err) == (0, "")
    assert out.endswith(told)


def test_a_line_of_the_guide_that_is_wrong_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (wrong,) = re.findall(r"`(0\.1 \* .*?)`", GUIDE.read_text())
    right = "0.9 * self.moved + 0.1 * used"
    assert example().count(right) == 1
    Path("plain.py").write_text(example().replace(right, wrong))
    code, out, _ = called("conform", "--subject", "plain:make", "--spec", "article", "--clause", "BN-05", "--clause", "BN-06")
    assert code == 1
    assert out.splitlines()[-1] == "does not conform: plain/make/cpu breaks BN-05, BN-06"


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _started_by(pid: int) -> set[int]:
    """Return the subjects' processes that a process started, with their descendants."""
    marks = set()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            marks |= {each for each in entry.read_bytes().split(b"\0") if each.startswith(f"{ending.VARIABLE}={pid}-".encode())}
    found = {each for mark in marks for each in ending.marked(mark.decode().partition("=")[2])}
    return found | ending._descendants(found)


def _wait_until(true: Callable[[], bool]) -> bool:
    for _ in range(600):
        if true():
            return True
        time.sleep(0.1)
    return False


needs_linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc, to find processes by their mark")


@needs_linux
def test_what_left_its_session_ends_too() -> None:
    """Also an orphaned process, and one without the environment."""
    others = _started_by(os.getpid())
    told = message("LeavesSomethingBehind", TRAIN, timeout=1.5)
    assert told == f"{TRAIN}: step 1 of 1 (train): forward did not come back within 1.5 s; its process was stopped."
    assert _started_by(os.getpid()) <= others


@needs_linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda each: each.name)
def test_a_signal_ends_the_subject_too(number: signal.Signals) -> None:
    arguments = ("conform", "--subject", "zoo:make_LeavesSomethingBehind", "--case", TRAIN, "--timeout", "300")
    code = (  # pytest may run in the background or under nohup, with signals ignored, which the suite would leave as they are
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "from multibn.cli import main; main()"
    )
    suite = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=TESTS, stdout=subprocess.DEVNULL)
    started: set[int] = set()
    try:
        assert _wait_until(lambda: len(_started_by(suite.pid)) == 3)
        started = _started_by(suite.pid)
        suite.send_signal(number)
        assert suite.wait(30) == -number
        assert _wait_until(lambda: not any(map(_alive, started)))
    finally:
        for each in (suite.pid, *started):
            with suppress(OSError):
                os.kill(each, signal.SIGKILL)
        suite.wait(30)


def test_signals_are_as_before_after_a_command() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with ending.ending_on_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is ending._end_all
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not ending._end_all
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "case", "told"),
    [
        ("KeepsItsState", "BN-05-momentum-0", "step 1 of 10 (train): the subject modified an array that it received at load."),
        (
            "KeepsItsInput",
            "BN-08-training-rank-4-float32",
            "the subject modified an array that it received at step 1 of 2 (train).",
        ),
    ],
)
def test_what_was_given_earlier_must_stay(name: str, case: str, told: str) -> None:
    """The same here as in a separate process."""
    kind: type[ReferenceSubject] = getattr(zoo, name)
    here = judge_maker(kind, CASES[case], "zoo/one/cpu", "working").message.splitlines()[0]
    assert here.endswith(f"{told} It must copy arrays that it keeps.")
    assert message(name, case) == here


@pytest.mark.parametrize(
    ("text", "shown"), [("a\nb\tc é", "a\nb\tc é"), ("\x1b\0\ud800\u202e\u2028", "\\x1b\\x00\\ud800\\u202e\\u2028")]
)
def test_text_is_made_safe_to_show(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert plain(shown * 100, 10) == f"{(shown * 100)[:10]}... ({len(shown) * 100} characters)"
