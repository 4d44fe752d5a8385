"""The report as a page, in a real browser; as JSON, by its schema; as JUnit."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("mpmath", reason="the oracle needs mpmath: pip install 'multibn[conformance]'")

from browser import CONTRASTS, Opened, is_dark, outside
from browser import browser as browser

from multibn.backend import Backend, Subject
from multibn.cli import app
from multibn.numpy_backend import KernelSubject, ReferenceSubject
from multibn.spec.batchnorm import BatchNormSpec
from multibn.spec.clauses import CLAUSES
from multibn.whitening.spec import CLAUSES as WHITENING_CLAUSES
from multibn_conformance.cases.case import case, train, usual
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.judging.judge import Judgement, judge
from multibn_conformance.judging.measure import measure
from multibn_conformance.reports import charts, curves
from multibn_conformance.reports.files import publish
from multibn_conformance.reports.html import html_report, short
from multibn_conformance.reports.junit import junit
from multibn_conformance.reports.record import TITLES, _both, record
from multibn_conformance.subjects.backends import Absent, Candidate
from multibn_conformance.whitening.cases import CASES as WHITENING
from multibn_conformance.whitening.judge import judge as judge_whitening
from multibn_conformance.whitening.wrong import DEFECTS

NAMES = (
    "BN-03-eps-1e-5",
    "BN-05-momentum-0.1",
    "BN-05-not-in-backward",
    "BN-07-one-value",
    "BN-07-after-training",
    "BN-12-empty-0x3",
    "BN-12-refuses-one-value-rank-2",
    "BN-14-bits-across-layouts",
    "BN-15-rank-2",
    "BN-16-kappa-1e2-float32",
)
CHOSEN = [CASES[name] for name in NAMES]


class Twice(ReferenceSubject):
    """Updates twice."""

    def _forward(self, x, training):  # type: ignore[no-untyped-def]
        super()._forward(x, training)
        return super()._forward(x, training)


class Stuck(ReferenceSubject):
    """Does not implement backward, and raises a message that contains markup."""

    def _backward(self, dy):  # type: ignore[no-untyped-def]
        raise RuntimeError('</script><b id="injected">&\x00 not today')


class Shifted(ReferenceSubject):
    """Has an error of one ulp in training."""

    def _forward(self, x, training):  # type: ignore[no-untyped-def]
        y = super()._forward(x, training)
        return np.nextafter(y, np.float32(9)) if training else y


MADE: dict[str, Any] = {"right": ReferenceSubject, "twice": Twice, "stuck": Stuck, "shifted": Shifted}


def _make(num_features: int, spec: BatchNormSpec | None, device: str, implementation: str) -> Subject:
    made: Subject = MADE[implementation](num_features, spec)
    return made


def candidates(*names: str) -> list[Candidate]:
    backends = {"right": "first", "shifted": "first"}
    return [
        Candidate(
            Backend(
                backends.get(name, "second"),
                {"numpy": np.__version__},
                {name: "working" if name == "shifted" else "exact"},
                tuple,
                _make,
            ),
            name,
            "cpu",
        )
        for name in names
    ]


def made(*names: str) -> dict[str, Any]:
    chosen = candidates(*names)
    judgements = [judge(candidate, each) for candidate in chosen for each in CHOSEN]
    absent = [Absent("third", "cannot load third:BACKEND: ModuleNotFoundError: No module named 'third'")]
    return record(judgements, chosen, absent, CHOSEN, "multibn conform --html report.html")


@pytest.fixture(scope="module")
def failing() -> dict[str, Any]:
    return made("right", "twice", "stuck", "shifted")


@pytest.fixture(scope="module")
def passing() -> dict[str, Any]:
    return made("right")


def judged(run: dict[str, Any], subject: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in run["judgements"] if each["subject"].split("/")[1] == subject and each["case"] == name]
    assert isinstance(found, dict)
    return found


def test_every_clause_has_a_title() -> None:
    assert list(TITLES) == [*CLAUSES, *WHITENING_CLAUSES]


def check_by_schema(run: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((files("multibn_conformance") / "schemas" / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(run, allow_nan=False)), schema)


def test_the_record_is_as_its_schema_says(failing: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check_by_schema(failing)
    with pytest.raises(jsonschema.ValidationError):
        check_by_schema({**failing, "conforms": "yes"})


def test_what_the_record_says_of_a_failure(failing: dict[str, Any]) -> None:
    assert failing["conforms"] is False
    assert failing["summary"].startswith("does not conform: ")
    found = judged(failing, "twice", "BN-05-momentum-0.1")
    (row,) = found["results"]
    assert (found["status"], row["result"], row["type"], row["index"]) == ("fail", "moving_mean", "float32", [0])
    assert found["message"].startswith("step 1 of 10 (train), moving_mean[")
    assert f"]: got {found['came']}, should be {found['should_be']}: off by " in found["message"]
    assert row["beyond"] == row["values"] == 3
    # the judge stops at the first step that is wrong; here is the worst of all
    assert row["where"] == "step 8 of 10 (train)"
    assert row["part"] > found["part"] > 1
    assert row["ulp"] >= found["ulp"] > 1
    assert CLAUSES["BN-05"] not in found["message"]


def test_what_the_record_says_of_what_passes(failing: dict[str, Any]) -> None:
    found = judged(failing, "right", "BN-16-kappa-1e2-float32")
    assert (found["status"], found["message"], found["came"]) == ("pass", "", None)
    assert [row["result"] for row in found["results"]] == ["y", "moving_mean", "moving_var", "dx", "dgamma", "dbeta"]
    assert max(row["part"] for row in found["results"]) == found["part"] <= 1
    assert max(row["ulp"] for row in found["results"]) == found["ulp"]
    assert judged(failing, "right", "BN-15-rank-2")["results"] == []


def test_an_error_has_no_number(failing: dict[str, Any]) -> None:
    found = judged(failing, "stuck", "BN-03-eps-1e-5")
    assert (found["ulp"], found["part"]) == (None, None)
    assert found["came"] == 'raised RuntimeError: </script><b id="injected">&\\x00 not today'
    assert found["should_be"] == "no error"
    assert found["results"] == []


@pytest.mark.parametrize(
    ("message", "came", "wanted"),
    [
        ("step 1 of 1 (train), y[0, 1]: got 1.5, should be 2.0: off by 3 ulp", "1.5", "2.0"),
        ("step 1 of 1 (train), y: got type float32, should be float16.", "type float32", "float16"),
        ("step 2 of 2 (backward): backward returned int, should be a tuple (dx).", "backward returned int", "a tuple (dx)"),
        ("step 1 of 2 (reload): moving_mean must stay as it was: index [0] is 0.0, was 1.0.", "0.0", "1.0"),
        ("load raised TypeError: no: no", "raised TypeError: no: no", "no error"),
        ("step 1 of 1 (train): the subject changed the array.", None, None),
    ],
)
def test_what_came_and_what_should_have_come(message: str, came: str | None, wanted: str | None) -> None:
    assert _both(message) == (came, wanted)


def test_measure_leaves_out_what_has_no_numbers() -> None:
    class Promotes(ReferenceSubject):
        def forward(self, x, training):  # type: ignore[no-untyped-def]
            return super().forward(x, training).astype(np.float64)

    asked = case("BN-01", "tried", "", "", train(usual(), "y", "moving_mean"), train(usual(), "y", "moving_mean"))
    assert [row["result"] for row in measure(Promotes, asked, "exact")] == ["moving_mean"]

    class Poisoned(ReferenceSubject):
        def forward(self, x, training):  # type: ignore[no-untyped-def]
            return super().forward(x, training) * np.float32(np.nan)

    assert [row["result"] for row in measure(Stuck, CASES["BN-03-eps-1e-5"], "exact")] == ["y"]
    row = measure(Poisoned, asked, "exact")[0]
    assert (row["result"], row["came"], row["ulp"], row["part"], row["beyond"]) == ("y", "nan", None, None, 180)


def test_pictures_of_the_reference_and_of_who_gives_no_numbers() -> None:
    for each in curves.against_kappa(ReferenceSubject):
        allowed = curves.allowed(each["dtype"], each["result"])
        assert all(ulp <= most for ulp, most in zip(each["ulp"], allowed, strict=True) if most is not None)
    kappas = curves.kappas("float64")
    assert all(10**power <= kappa <= 1.1 * 10**power for power, kappa in zip(curves.POWERS, kappas, strict=True))
    stopped = {(each["dtype"], each["result"]): each["ulp"] for each in curves.against_kappa(Stuck)}
    assert set(stopped["float32", "dx"]) == {None}
    assert None not in stopped["float32", "y"]
    exact, walked = curves.exact_walk(), curves.walk(ReferenceSubject)
    assert len(exact["moving_mean"]) == curves.STEPS == 20
    for name, its in walked.items():
        assert np.float32(exact[name][0]) == its["values"][0] != its["values"][1]
        assert len(its["values"]) == curves.STEPS
        assert all(ulp is not None and 0 < ulp < 1 for ulp in its["ulp"])

    class Refuses(ReferenceSubject):
        def forward(self, x, training):  # type: ignore[no-untyped-def]
            raise RuntimeError("no")

    assert curves.walk(Refuses) == {name: {"values": [], "ulp": []} for name in ("moving_mean", "moving_var")}
    own = BatchNormSpec(momentum=None)
    assert curves.exact_walk(own)["moving_mean"][-1] > curves.exact_walk()["moving_mean"][-1]
    assert curves.against_kappa(lambda n, spec: KernelSubject(n, own), own)[0]["ulp"][0] < 1


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (charts.Scale(0.1, 100, 200, 0, log=True), [(200, "0.1"), (133.3, "1"), (66.7, "10"), (0, "10²")]),
        (charts.Scale(0, 20, 0, 100, log=False), [(0, "0"), (25, "5"), (50, "10"), (75, "15"), (100, "20")]),
        (charts.Scale(0, 5.75, 0, 115, log=False), [(0, "0"), (20, "1"), (40, "2"), (60, "3"), (80, "4"), (100, "5")]),
    ],
)
def test_ticks(scale: charts.Scale, ticks: list[tuple[float, str]]) -> None:
    assert scale.ticks() == ticks


def test_long_axes_have_every_second_power() -> None:
    assert [text for _, text in charts.Scale(0.1, 1e8, 0, 9, log=True).ticks()] == ["1", "10²", "10⁴", "10⁶", "10⁸"]


def test_lines_have_gaps_and_stay_inside() -> None:
    x, y = charts.Scale(0, 4, 0, 4, log=False), charts.Scale(1, 10, 0, 1, log=True)
    line = charts._line(["a", "b"], 0, x, y, [0, 1, 2, 3], [1, None, 10, 0], (0, 2))
    assert line.paths == ("M0.0,0.0", "M2.0,1.0L3.0,0.0")
    assert line.points == ((0.0, 0.0, "a, b: 1 at 0"), (2.0, 1.0, "a, b: 10 at 2"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "no number"),
        (0.0, "0"),
        (0.498, "0.5"),
        (38.4, "38"),
        (316.0, "320"),
        (4e5, "4e5"),
        (1e10, "1e10"),
        (0.001, "1e-3"),
    ],
)
def test_short(value: float | None, text: str) -> None:
    assert short(value) == text


def test_junit(failing: dict[str, Any]) -> None:
    root = ElementTree.fromstring(junit(failing))
    assert [suite.get("name") for suite in root] == [each["name"] for each in failing["subjects"]]
    suite = root[2]
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    statuses = [each["status"] for each in failing["judgements"] if each["subject"] == "second/stuck/cpu"]
    assert counts == {"tests": str(len(NAMES)), "failures": str(statuses.count("fail")), "errors": "0", "skipped": "1"}
    assert statuses.count("differs") == 1
    assert [test.get("name") for test in suite] == list(NAMES)
    failure = suite[0].find("failure")
    assert failure is not None
    assert failure.get("message") == ('step 2 of 3 (backward) raised RuntimeError: </script><b id="injected">&\\x00 not today')
    assert str(failure.text).endswith("print(reproduce('second/stuck/cpu', 'BN-03-eps-1e-5'))")
    skipped = root[3][NAMES.index("BN-15-rank-2")].find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "only implementations with exact precision promise equal bits"


def test_the_page_needs_nothing_else(failing: dict[str, Any]) -> None:
    page = html_report(failing)
    assert re.findall(r"https?://", page) == []
    assert {link[:1] for link in re.findall(r'(?:href|src)="([^"]*)"', page)} == {"#", "d"}
    assert page.count("</script>") == 2
    assert '<b id="injected">' not in page


def called(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    return result.exit_code, result.stderr


def test_conform_writes_the_files(tmp_path: Path) -> None:
    names = {option: tmp_path / f"report.{option}" for option in ("html", "json", "junit")}
    options = [part for option, path in names.items() for part in (f"--{option}", str(path))]
    code, _ = called("conform", "--backend", "numpy", "--case", "BN-07-one-value", *options)
    assert code == 0
    run = json.loads(names["json"].read_text())
    assert (run["conforms"], [each["name"] for each in run["subjects"]]) == (True, ["numpy/reference/cpu", "numpy/kernel/cpu"])
    assert run["judgements"][0]["snippet"].startswith("from multibn_conformance import reproduce\n")
    assert run["subjects"][0]["dialect"]["spec"] == "BatchNormSpec(eps=1e-05, momentum=0.9, moving_variance='biased')"
    assert "All 2 subjects conform" in names["html"].read_text()
    assert len(ElementTree.parse(names["junit"]).getroot()) == 2


def test_whitening_is_in_the_files_too(tmp_path: Path) -> None:
    names = {option: tmp_path / f"report.{option}" for option in ("html", "json", "junit")}
    options = [part for option, path in names.items() for part in (f"--{option}", str(path))]
    chosen = [part for each in ("BN-07-one-value", "WH-03-zca", "WH-08-one-value") for part in ("--case", each)]
    assert called("conform", "--backend", "numpy", *chosen, *options)[0] == 0
    run = json.loads(names["json"].read_text())
    check_by_schema(run)
    subjects = ["numpy/reference/cpu", "numpy/kernel/cpu"]
    assert {(each["subject"], each["case"]) for each in run["judgements"]} == {
        (subject, case) for subject in subjects for case in chosen[1::2]
    }
    assert run["summary"].splitlines() == [
        "conforms: numpy/kernel/cpu, numpy/reference/cpu (2 checks)",
        "whitening conforms: numpy/kernel/cpu, numpy/reference/cpu (4 checks)",
    ]
    verdicts = {each["id"]: each["verdict"] for each in run["cases"]}
    assert verdicts == {"BN-07-one-value": "must", "WH-03-zca": "must", "WH-08-one-value": "must raise"}
    its = next(each for each in run["judgements"] if each["case"] == "WH-03-zca")
    assert its["snippet"].startswith("from multibn_conformance import reproduce\n")
    assert 'data-clause="WH-03" data-subject="numpy/kernel/cpu"' in names["html"].read_text()
    tests = ElementTree.parse(names["junit"]).getroot().iter("testcase")
    assert [each.get("name") for each in tests] == chosen[1::2] * 2


def test_a_wrong_whitening_is_told_as_one() -> None:
    backend = Backend("w", {}, {"wrong": "exact"}, tuple, lambda n, spec, *_: ReferenceSubject(n, spec),
                      lambda n, spec, *_: DEFECTS["unbiased"].make(n, spec))  # fmt: skip
    its, chosen = Candidate(backend, "wrong", "cpu"), WHITENING["WH-02-biased"]
    run = record([judge_whitening(its, chosen)], [its], [], [chosen], "multibn conform")
    check_by_schema(run)
    assert (run["conforms"], run["summary"]) == (False, "whitening does not conform: w/wrong/cpu breaks WH-02")
    page = html_report(run)
    assert f"<p>{chosen.comment} It catches a whitening that {chosen.catches}.</p>" in page
    assert 'code":"WhiteningSpec(eps=1e-05' in page


def test_a_subject_with_parameters_of_its_own_has_pictures_of_them(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    spec = BatchNormSpec(eps=1e-3, momentum=None)
    judgement = Judgement("first/right/cpu", NAMES[3], "BN-07", "pass")
    text = json.dumps({"eps": 1e-3, "momentum": None})
    publish({"--json": path}, [judgement], candidates("right"), [], CHOSEN, "multibn", text)
    run = json.loads(path.read_text())
    assert (run["pictures"]["eps"], run["pictures"]["momentum"]) == (1e-3, "equal weights for all batches")
    assert run["pictures"]["exact"] == curves.exact_walk(spec)
    assert run["judgements"][0]["snippet"] == ""


@pytest.mark.parametrize(
    ("option", "path", "message"),
    [
        ("--html", ".", "cannot write --html .: it is a folder. Give the name of a file."),
        ("--json", "no/such/a.json", "cannot write --json no/such/a.json: there is no folder no/such. Make it first."),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_run(option: str, path: str, message: str) -> None:
    assert called("conform", option, path) == (2, f"multibn: {message}\n")


# In a browser.


@pytest.fixture(scope="module")
def pages(failing: dict[str, Any], passing: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {"failing": folder / "failing.html", "passing": folder / "passing.html"}
    for name, run in (("failing", failing), ("passing", passing)):
        found[name].write_text(html_report(run), encoding="utf-8")
    return found


@pytest.mark.parametrize("which", ["failing", "passing"])
def test_it_opens_without_errors_and_asks_for_nothing(browser: Any, pages: dict[str, Path], which: str) -> None:
    opened = Opened(browser, pages[which])
    with opened as page:
        heading = page.locator("h1").inner_text()
        assert heading == {"failing": "✗2 of 4 subjects do not conform", "passing": "✓It conforms"}[which]
        assert page.locator("#shown").inner_text() == (
            "40 checks of 4 subjects, 7 clauses" if which == "failing" else "10 checks of 1 subject, 7 clauses"
        )
        assert page.locator("#injected").count() == 0
        assert page.locator("svg.drawn").count() == 6
        assert page.locator("#failures").count() == (which == "failing")
        assert opened.said == []
        assert opened.elsewhere == []


def test_filters(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["failing"])
    with opened as page:
        filters = page.locator("#filters")
        rows, columns, shown = ".matrix tbody th .number", ".matrix thead th .backend", page.locator("#shown")
        assert opened.visible(columns) == ["first", "second", "second", "first"]
        filters.get_by_label("Backend").select_option("second")
        assert opened.visible(columns) == ["second", "second"]
        filters.get_by_label("Status").select_option("fail")
        filters.get_by_label("Clause").select_option("BN-05")
        assert opened.visible(rows) == ["BN-05"]
        assert shown.inner_text() == "3 checks of 2 subjects, 1 clause"
        filters.get_by_label("Text").fill("TEN training")
        assert shown.inner_text() == "1 check of 1 subject, 1 clause"
        assert opened.visible(columns) == ["second"]
        filters.get_by_label("Text").fill("no such words")
        assert shown.inner_text() == "No check matches these filters."
        assert opened.visible(rows) == []
        page.get_by_role("button", name="Show all").click()
        page.wait_for_function("document.querySelectorAll('.matrix tr[hidden]').length === 0")
        assert shown.inner_text() == "40 checks of 4 subjects, 7 clauses"
        filters.get_by_label("Text").fill("not-in-backward")
        page.locator(".cell:visible").first.click()
        assert page.locator("#cell-body > .muted").inner_text() == "1 of 2 cases, as filtered"


def test_a_cell_opens_and_closes_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["failing"]) as page:
        focused = "document.activeElement.getAttribute('aria-label')"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the matrix"
        page.keyboard.press("Enter")
        while not page.evaluate("document.activeElement.matches('.cell')"):
            page.keyboard.press("Tab")
        assert page.evaluate(focused).startswith("BN-03, first/right/cpu: passes, 1 case, worst error 0.")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        label = page.evaluate(focused)
        assert label == "BN-05, second/twice/cpu: fails, 2 of 2 cases"
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog", name="BN-05 Moving statistics: second/twice/cpu")
        assert dialog.is_visible()
        text = dialog.inner_text()
        for part in (CLAUSES["BN-05"], "2 cases", "What came", "What should have come", "times the bound for exact arithmetic"):
            assert part in text
        assert "print(reproduce('second/twice/cpu', 'BN-05-momentum-0.1'))" in text
        for _ in range(30):  # focus stays in the dialog, or goes to the browser's own buttons
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert page.evaluate(focused) == label
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate(focused).startswith("BN-05, first/right/cpu")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Close").press("Enter")
        assert page.locator("dialog[open]").count() == 0


def test_what_a_cell_shows(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["failing"]) as page:

        def text_of(name: str) -> str:
            page.get_by_role("button", name=name).first.click()
            page.evaluate("document.querySelectorAll('#cell-body details').forEach((each) => { each.open = true; })")
            text = page.locator("#cell-body").inner_text()
            page.keyboard.press("Escape")
            return str(text)

        one = text_of("BN-12, first/right/cpu")
        assert "It raised an error that says why, and kept its state, as it must." in one
        assert "It answered as it must, and what must stay as it was has" in text_of("BN-07, first/right/cpu")
        assert "All bits are those of multibn.reference, in two runs." in text_of("BN-15, first/right/cpu")
        assert "only implementations with exact precision promise equal bits" in text_of("BN-15, first/shifted/cpu: skipped")
        wrong = text_of("BN-03, second/stuck/cpu")
        assert 'RuntimeError: </script><b id="injected">' in wrong
        assert page.locator("#injected").count() == 0
        assert "train on float32 (4, 3, 3, 5): y" in wrong
        assert "BatchNormSpec(eps=1e-05, momentum=0.9), 3 features" in wrong
        page.locator("#failures .link").first.click()
        assert page.locator("dialog[open]").count() == 1
        page.mouse.click(3, 3)
        assert page.locator("dialog[open]").count() == 0
        page.locator("#failures .copy").first.click()
        page.wait_for_function("['Copied', 'Selected'].includes(document.querySelector('#failures .copy').textContent)")


@pytest.mark.parametrize("which", ["failing", "passing"])
def test_nothing_overflows_at_360_px(browser: Any, pages: dict[str, Path], which: str) -> None:
    torn = """() => [...document.getElementById("cell-title").childNodes].flatMap((node) =>
        [...(node.data || "").matchAll(/[^ /]+/g)].filter((word) => {
            const range = document.createRange();
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            return new Set([...range.getClientRects()].map((box) => box.top)).size > 1;
        }).map((word) => word[0]))"""
    with Opened(browser, pages[which], width=360) as page:
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert outside(page, ".scroll > *") == []
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for cell in page.locator(".cell").all():
            cell.click()
            assert page.evaluate(torn) == []
            page.keyboard.press("Escape")
        page.locator(".cell").first.click()
        page.evaluate("document.querySelectorAll('dialog details').forEach((each) => { each.open = true; })")
        assert outside(page, ".scroll > *") == []
        assert page.locator("dialog").bounding_box()["width"] <= 360
        assert (
            page.evaluate("(() => { const d = document.querySelector('dialog'); return d.scrollWidth - d.clientWidth; })()") == 0
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    """WCAG 2.1 asks for a contrast of 4.5."""
    with Opened(browser, pages["failing"], scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        found = page.evaluate(CONTRASTS)
        page.locator(".cell.fail").first.click()
        found = {**found, **page.evaluate(CONTRASTS)}
        assert {"BUTTON.cell fail", "P.message", "text.", "CODE."} <= set(found) | {"BUTTON.cell fail"}
        assert {name: contrast for name, contrast in found.items() if contrast < 4.5} == {}
        assert is_dark(page) == (scheme == "dark")


def test_a_screen_reader_finds_its_way(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["failing"]) as page:
        assert page.locator("html").get_attribute("lang") == "en"
        assert page.locator("h1").count() == 1
        assert (
            page.get_by_role("main").count() == page.get_by_role("navigation").count() == page.get_by_role("banner").count() == 1
        )
        assert page.locator("th:not([scope])").count() == 0
        nameless = "[...document.querySelectorAll('button, input, select, table, [role=region], svg.drawn')]"
        page.locator(".cell").first.click()
        page.keyboard.press("Escape")
        named = """each.ariaLabel || each.getAttribute("aria-labelledby") || each.textContent.trim() || each.labels?.length"""
        names = page.evaluate(f"{nameless}.filter((each) => !({named})).map((each) => each.outerHTML)")
        assert names == []
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
        assert len(ids) == len(set(ids))
        links = page.evaluate("[...document.querySelectorAll('a[href]')].map((each) => each.getAttribute('href').slice(1))")
        assert set(links) <= set(ids)
        page.get_by_role("button", name="BN-05, second/twice/cpu").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
