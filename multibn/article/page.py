"""The page: each statement of the article with its formula, the code that runs it, a picture and the numbers, in one file."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from latex2mathml.converter import convert
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from rich.console import Console

import multibn
from multibn import identity
from multibn.interpreters import Elsewhere
from multibn.numpy_backend import BACKEND

from . import facts, pictures, statements, train, verdicts
from .plan import Plan, Run
from .run import Study, run

SECTIONS: Final = {
    "whitening": "Whitening would help",
    "cost": "Whitening is too expensive",
    "bias": "A bias that grows without bound",
    "training": "The algorithm: training",
    "testing": "The algorithm: test time",
    "convolutions": "In convolutional networks",
    "identity": "The identity is within reach",
    "rates": "Claim 1: larger learning rates",
    "starts": "Claim 2: the start matters less",
    "saturating": "Claim 3: saturating activations train",
    "regularising": "Claim 4: a regularising effect",
    "shift": "The shift of distributions",
}
"""The statements, in the article's order."""


def write(
    out: Path,
    frameworks: Sequence[str],
    plan: Plan,
    command: str,
    console: Console,
    others: Mapping[str, Elsewhere] = MappingProxyType({}),
) -> None:
    """Run everything, write the page, and print what the claims came to; ``others`` are the frameworks of other interpreters.

    Raises:
        ChildProcessError: a framework's process failed; nothing is written then.
    """
    start = time.perf_counter()
    studies = run(frameworks, plan, console, others)
    text, claims = page(studies, plan, time.perf_counter() - start, command)
    out.write_text(text, encoding="utf-8")
    for claim, verdict in claims.items():
        console.print(f"{SECTIONS[claim]}: {verdict}", highlight=False, soft_wrap=True)
    console.print(f"{out}: {len(text) // 1024} KiB", highlight=False, soft_wrap=True)


def page(studies: Mapping[str, Study], plan: Plan, seconds: float, command: str) -> tuple[str, dict[str, str]]:
    """The page of a run, and where each claim shows."""
    loader = PackageLoader("multibn.article", "page")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(math=formula, code=code, sci=sci)
    style = Markup(loader.get_source(environment, "article.css")[0])
    names = {name: study.facts["title"] for name, study in studies.items()}
    claims = {
        claim: {name: judge(study.results, plan) for name, study in studies.items()} for claim, judge in verdicts.CLAIMS.items()
    }
    judged = plan.seeds >= verdicts.FEWEST
    together = {
        claim: verdicts.together({names[n]: v for n, v in its.items()}) if judged else verdicts.NOT_JUDGED
        for claim, its in claims.items()
    }
    text = environment.get_template("article.html.j2").render(
        css=style,
        sections=SECTIONS,
        names=names,
        claims=claims,
        judged=judged,
        together=together,
        numbers=_numbers(studies),
        pictures={name: Markup(svg) for name, svg in _pictures(studies, plan).items()},
        plan=plan,
        runs=len(plan.runs()),
        versions={
            "multibn": multibn.__version__,
            **{k: v for each in studies.values() for k, v in each.facts["versions"].items()},
        },
        seconds=round(seconds),
        command=command,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        functions=_functions(studies),
    )
    return text, together


def formula(*parts: str) -> Markup:
    """LaTeX as MathML on a line of its own, of which each part may begin a new one where there is little room."""
    return Markup(f'<div class="formula">{"".join(convert(part, display="block") for part in parts)}</div>')


def code(*functions: Any) -> Markup:
    """The source of functions, as they ran. A text is taken as it is."""
    text = "\n\n".join(each if isinstance(each, str) else inspect.getsource(each).rstrip() for each in functions)
    shown = highlight(text, PythonLexer(), HtmlFormatter(nowrap=True))
    return Markup(f'<pre class="code" tabindex="0" role="region" aria-label="Code">{shown.rstrip()}</pre>')


def sci(value: float) -> Markup:
    """1.2 x 10^-7, or a plain number where it is short."""
    if value == 0 or 0.001 <= abs(value) < 10000:
        return Markup(f"{value:.3g}")
    mantissa, exponent = f"{value:.1e}".split("e")
    return Markup(f"{mantissa} &times; 10<sup>{int(exponent)}</sup>".replace("<sup>-", "<sup>&minus;"))


def _functions(studies: Mapping[str, Study]) -> dict[str, Any]:
    """What the template shows the source of: functions, and the sources that the frameworks' processes sent."""
    return {
        **{
            name: getattr(statements, name)
            for name in ("whiten", "train_a_bias", "normalise", "normalise_images", "at_test_time", "begins_as_identity")
        },
        "example": facts.example,
        "parameters": identity.parameters,
        "run": Run,
        "train": train.train,
        "shift": train.shift,
        "rate": Plan.rate,
        "start": Plan.start,
        "saturating": Plan.saturating,
        "few": Plan.few,
        **{f"net_{name}": study.facts["sources"]["net"] for name, study in studies.items()},
        **{key: text for study in studies.values() for key, text in study.facts["sources"].items() if key != "net"},
    }


def _numbers(studies: Mapping[str, Study]) -> dict[str, Any]:
    its = {study.facts["title"]: study.facts for study in studies.values()}
    found = {"NumPy": facts.of(BACKEND, statements.begins_as_identity), **its}
    biases = statements.bias()
    off = statements.at_test_time()
    return {
        "whitening": statements.whitening(),
        "biases": biases,
        "moved": {name: abs(each["loss"][-1] - each["loss"][0]) for name, each in biases.items()},
        "algorithm": statements.algorithm(),
        "off": off,
        "facts": found,
        "cost": _first(studies, "cost"),
        "block": _first(studies, "block"),
    }


def _first(studies: Mapping[str, Study], fact: str) -> Any:
    """A fact that one framework has; None where none has it."""
    return next((study.facts[fact] for study in studies.values() if fact in study.facts), None)


def _pictures(studies: Mapping[str, Study], plan: Plan) -> dict[str, str]:
    numbers = statements.whitening()
    biases = statements.bias()
    found = {
        "before": pictures.scatter(numbers["before"], "before", "Two numbers of each digit, standardised: a slanted cloud."),
        "after": pictures.scatter(numbers["after"], "after", "The same, whitened: a round cloud."),
        "bias": pictures.biases(
            biases, "bias", "largest bias", "bias", "The bias grows with every step, but not with BatchNorm."
        ),
        "loss": pictures.biases(biases, "loss", "loss", "loss", "The loss stays the same in all three."),
        "averages": pictures.averages(
            statements.at_test_time(), "averages", "Both averages come close to the statistics of all data."
        ),
    }
    cost = _first(studies, "cost")
    if cost is not None:
        about = "Whitening takes more time than BatchNorm, the more channels, the more so."
        found["cost"] = pictures.costs(cost, "cost", about)
    for name, study in studies.items():
        results, where = study.results, study.facts["title"]
        about = f"{where}: test digits known with and without BatchNorm, against the"
        found[f"rates-{name}"] = pictures.study(
            results, plan, plan.rate, plan.rates, "learning rate", f"rates-{name}", f"{about} learning rate."
        )
        found[f"starts-{name}"] = pictures.study(
            results,
            plan,
            plan.start,
            plan.scales,
            "initial weights, x usual",
            f"starts-{name}",
            f"{about} size of the initial weights.",
        )
        found[f"regularising-{name}"] = pictures.study(
            results, plan, plan.few, plan.batches, "batch", f"regularising-{name}", f"{about} size of the batches.", close=True
        )
        for number, activation in enumerate(plan.activations):
            key = f"saturating-{number}-{name}"
            found[key] = pictures.losses(
                results,
                plan,
                activation,
                key,
                f"{where}, {activation[0]}: training loss over the steps, with and without BatchNorm.",
            )
        for norm, word in ((False, "without"), (True, "with")):
            key = f"shift-{word}-{name}"
            found[key] = pictures.shift(
                results, plan, norm, key, f"{where}, {word} BatchNorm: percentiles of a unit's input over the steps."
            )
    return found
