"""``multibn article``: the statements, what the runs say of the claims, and the page in a browser."""

from __future__ import annotations

import sys
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("mpmath", reason="the defects need mpmath: pip install 'multibn[conformance]'")
pytest.importorskip("latex2mathml", reason="the page needs latex2mathml: pip install 'multibn[article]'")

from browser import CONTRASTS, Opened, is_dark, outside
from browser import browser as browser

from multibn import BatchNormSpec
from multibn.article import facts, page, statements, train, verdicts
from multibn.article import run as processes
from multibn.article.plan import FULL, QUICK, Plan, Run, batches, digits, weights
from multibn.cli import app
from multibn.numpy_backend import BACKEND, ReferenceSubject
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.judging.judge import judge_maker

TINY = Plan(2, (0.1, 1), (0.1, 1), (("sigmoid", 1.0), ("sigmoid", 4.0), ("tanh", 1.0)), (10, 100), 4)


# The statements.


def test_whitening_gives_the_identity() -> None:
    x = statements.pooled()
    white = statements.whiten(x)
    assert np.abs(np.cov(x.T) - np.eye(16)).max() > 0.1
    assert np.abs(white.T @ white / len(white) - np.eye(16)).max() < 1e-3  # 1e-5 beside the least eigenvalue, 0.1


def test_a_bias_grows_only_where_the_gradient_does_not_know() -> None:
    found = statements.bias(60)
    for name in ("mean and variance as constants", "the mean as a constant"):
        its = found[name]["bias"]
        steps = np.diff(its)
        assert (steps > 0).all(), name
        assert its[-1] > 0.95 * 59 * steps[0]  # without bound: the last steps are as long as the first
        assert np.ptp(found[name]["loss"]) < 1e-12
    assert max(found["BatchNorm"]["bias"]) < 1e-14
    assert np.ptp(found["BatchNorm"]["loss"]) < 1e-14


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (statements.StatisticsAsConstants, "statistics-as-constants"),
        (statements.MeanAsConstant, "no-gradient-through-the-mean"),
    ],
)
def test_the_suite_catches_the_layers_whose_bias_grows(wrong: type[ReferenceSubject], name: str) -> None:
    """The classes of the study, on (N, C), fail BN-08, and the message names the bug."""
    message = judge_maker(wrong, CASES["BN-08-training-rank-2-float32"], "study/one/cpu", "exact").message
    assert message.startswith("BN-08-training-rank-2-float32: ")
    assert f"({name}: " in message


def test_the_algorithm_in_a_few_lines_is_the_layer() -> None:
    assert max(statements.algorithm().values()) < 1e-6


def test_both_ways_of_test_time_approach_the_whole_data() -> None:
    off = statements.at_test_time()
    assert off["average of the batches"][-1] < 0.01 < off["moving average"][-1] < 0.3
    spec = BatchNormSpec.article(average=True)
    assert (spec.eps, spec.momentum, spec.moving_variance) == (1e-12, None, "unbiased")


@pytest.mark.parametrize("home", ["numpy", "torch", "mxnet"])
def test_the_articles_example_on_every_backend(home: str) -> None:
    """(0+1+2+3+12+13+14+15)/8 = 7.5; the kernel to the last bit, the frameworks' operators within 4 roundings of float32."""
    backend = BACKEND if home == "numpy" else pytest.importorskip(f"multibn_{home}", reason=f"{home} is not installed").BACKEND
    for name, precision in backend.implementations.items():
        found = facts.example(backend, name)
        assert found["batch"][0] == pytest.approx(
            (0 + 1 + 2 + 3 + 12 + 13 + 14 + 15) / 8, rel=0 if precision == "exact" else 2**-22
        )
        exact = np.array([0.75, 1.15, 1.55], np.float32)
        np.testing.assert_allclose(found["moving"], exact, rtol=0 if precision == "exact" else 2**-21)


# The studies.


def test_runs_are_the_same_for_every_framework_and_with_or_without() -> None:
    assert len({(run.seed, run.norm) for run in FULL.runs()}) == 10
    assert len(set(FULL.runs())) == len(FULL.runs()) > len(QUICK.runs())
    one, other = (Run(norm, 3, activation="tanh") for norm in (False, True))
    for a, b in zip(weights(one), weights(other), strict=True):
        assert np.array_equal(a, b)
    for (a, _), (b, _) in zip(batches(one), batches(other), strict=True):
        assert np.array_equal(a, b)
    seen = {image.tobytes() for x, _ in batches(one) for image in x}
    kept = {image.tobytes() for image in digits()[0][:360]}
    assert not seen & kept


def test_intervals_are_students() -> None:
    found = verdicts.interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.high - found.mean == pytest.approx(3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-6)
    assert verdicts.interval([2.0, 2.0]) == verdicts.Interval(2, 2, 2) == verdicts.interval([2.0])


def made_up(gain: float) -> dict[Run, dict[str, Any]]:
    """Make results in which BatchNorm classifies this many more digits; without it, a little more than half are right."""
    found = {}
    for run in TINY.runs():
        noise = 0.001 * run.seed * (1 + run.norm)
        known = 0.55 + noise + (gain if run.norm else 0)
        curve = [[0.0, 1.0 + run.seed, 2.0]] * 4
        way = 3.0 - gain * 2 * run.norm + noise
        found[run] = {"test": known, "train": 1.0, "losses": [2.0, 1.0, None, 0.5], "shift": way, "percentiles": curve}
    return found


@pytest.mark.parametrize(("gain", "shows"), [(0.4, True), (0.0, False), (-0.2, False)])
def test_a_claim_shows_only_where_the_whole_interval_is_on_its_side(gain: float, shows: bool) -> None:
    for claim, judge in verdicts.CLAIMS.items():
        verdict = judge(made_up(gain), TINY)
        assert verdict.degree == ("shows" if shows else "does not show"), (claim, verdict.text)
        assert verdict.rows


def test_what_is_said_of_several_frameworks() -> None:
    yes, part, no = (verdicts.Verdict(verdicts.degree(*shows), "", ()) for shows in ([True, True], [True, False], [False]))
    assert verdicts.together({"PyTorch": yes, "Gluon": yes}) == "shows in PyTorch and Gluon"
    assert verdicts.together({"PyTorch": part, "Gluon": no}) == "shows in part in PyTorch, does not show in Gluon"


def test_the_way_of_a_median() -> None:
    percentiles = np.array([[[0.0, 0.0], [1.0, 1.0], [2.0, 4.0]], [[0.0, 0.0], [2.0, 1.0], [2.0, 4.0]]])
    assert train.shift(percentiles) == (0.25, 0)


@pytest.fixture(scope="module")
def studies() -> dict[str, processes.Study]:
    from rich.console import Console

    present = processes.frameworks_to_run((), Path("article.html"))
    return processes.run(present, TINY, Console(quiet=True))


def test_both_frameworks_train_the_same_nets(studies: dict[str, processes.Study]) -> None:
    for study in studies.values():
        assert list(study.results) == TINY.runs()
        assert all(len(each["losses"]) == run.steps and 0 <= each["test"] <= 1 for run, each in study.results.items())
        assert study.facts["identity"]["part"] <= 1
    if len(studies) == 2:
        torch, mxnet = (study.results for study in studies.values())
        for run in TINY.runs():  # few steps: roundings have not grown yet
            np.testing.assert_allclose(torch[run]["losses"], mxnet[run]["losses"], rtol=1e-3, err_msg=str(asdict(run)))


def test_a_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "find_spec", lambda name: name == "none")
    monkeypatch.setattr(processes, "modules", lambda: {"none": "none"})
    result = CliRunner().invoke(app, ["article", "--out", str(tmp_path / "a.html")])
    assert result.exit_code == 1
    assert result.stderr == "multibn: none: its process ended with code 1; what it said stands above.\n"
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--framework", "keras"], "--framework must be jax or mxnet or torch, got keras."),
        (["--framework", "mxnet"], "mxnet is not installed: pip install 'multibn[mxnet]'."),
        ([], "no framework is installed to train in: pip install 'multibn[torch]' or 'multibn[mxnet]'."),
    ],
)
def test_wrong_calls(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["article", *arguments])
    assert (result.exit_code, result.stderr) == (2, f"multibn: {message}\n")


def test_a_file_that_cannot_be_written_is_told_before_the_run() -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    result = CliRunner().invoke(app, ["article", "--out", "no/such/a.html"])
    assert result.stderr == "multibn: --out must be the name of a file in a folder that exists, got no/such/a.html.\n"


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("multibn.article.page", "latex2mathml"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["multibn.article"], "page")
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", None)
    result = CliRunner().invoke(app, ["article"])
    assert result.exit_code == 2
    assert "multibn article needs latex2mathml, which is not installed: pip install 'multibn[article]'" in result.stderr


# The page, in a browser.


@pytest.fixture(scope="module")
def written(studies: dict[str, processes.Study], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rich.console import Console

    path = tmp_path_factory.mktemp("article") / "article.html"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(page, "run", lambda *_: studies)
    console = Console(record=True, file=StringIO(), width=200)
    page.write(path, list(studies), TINY, "multibn article", console)
    monkeypatch.undo()
    said = console.export_text()
    assert said.startswith("Claim 1: larger learning rates: ")
    assert said.splitlines()[-1].startswith(f"{path}: ")
    return path


def test_the_page_has_each_statement_in_order_and_asks_for_nothing(
    browser: Any, written: Path, studies: dict[str, processes.Study]
) -> None:
    opened = Opened(browser, written)
    its = opened.page
    assert [section.get_attribute("id") for section in its.locator("main > section").all()] == list(page.SECTIONS)
    for section in its.locator("main > section").all():
        assert section.locator("h2").count() == 1
        assert section.locator("math").count() >= 1
        assert section.locator("pre.code").count() >= 1 or "torch" not in studies
    assert its.locator("svg.drawn").count() == 5 + ("torch" in studies) + 8 * len(studies)
    assert its.locator("svg.drawn path").count() > 100
    assert its.get_by_text("(0+1+2+3+12+13+14+15) / 8 = 7.5").is_visible()
    assert "NumPy, kernel" in its.locator("#training table").inner_text()
    assert "2 seeds: enough to see that everything works, too few to judge a claim" in its.locator("header").inner_text()
    assert "does not show" not in its.locator("header").inner_text()
    assert opened.said == []
    assert opened.elsewhere == []
    its.close()


def test_nothing_overflows_at_360_px(browser: Any, written: Path) -> None:
    its = Opened(browser, written, width=360).page
    its.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert outside(its, ".scroll > *, .code > *, .formula > *, svg *") == []
    assert its.evaluate("document.documentElement.scrollWidth") == 360
    its.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(browser: Any, written: Path, scheme: str) -> None:
    """WCAG 2.1 asks for a contrast of 4.5; Matplotlib's text is among it."""
    its = Opened(browser, written, scheme=scheme).page
    its.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    found = its.evaluate(CONTRASTS)
    assert {"text.", "P.said", "SPAN.k", "TD.", "mi."} <= set(found)
    assert {name: contrast for name, contrast in found.items() if contrast < 4.5} == {}
    assert is_dark(its) == (scheme == "dark")
    its.close()


def test_a_keyboard_and_a_screen_reader_find_their_way(browser: Any, written: Path) -> None:
    its = Opened(browser, written).page
    its.keyboard.press("Tab")
    assert its.evaluate("document.activeElement.textContent") == "Skip to the statements"
    its.keyboard.press("Enter")
    assert its.evaluate("document.activeElement.id") == "main"
    assert its.locator("html").get_attribute("lang") == "en"
    assert its.locator("h1").count() == its.get_by_role("main").count() == its.get_by_role("navigation").count() == 1
    assert its.locator("th:not([scope])").count() == 0
    ids = its.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
    links = its.evaluate("[...document.querySelectorAll('a[href]')].map((each) => each.getAttribute('href').slice(1))")
    assert set(links) <= set(ids)
    uses = its.evaluate("[...document.querySelectorAll('use')].map((each) => each.href.baseVal.slice(1))")
    assert set(uses) <= set(ids)
    nameless = """[...document.querySelectorAll('[role=region], svg.drawn, summary')].filter((each) =>
        !(each.ariaLabel || document.getElementById(each.getAttribute("aria-labelledby"))?.textContent.trim()
            || each.textContent.trim()))"""
    assert its.evaluate(f"{nameless}.length") == 0
    summary = its.locator("summary").first
    summary.focus()
    its.keyboard.press("Enter")
    assert its.locator("details[open]").count() == 1
    its.close()
