"""The atlas as a page: Markdown made of the data in ``docs/atlas.json`` alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from multibn.spec.clauses import CLAUSES

Framework = dict[str, Any]

INTRO = """# Who does what: an atlas of BatchNorm

Every cell comes from a run: {count} BatchNorms, each in an environment of its own, {made} ({machine}).
`momentum` is the weight of the **old** value, as everywhere in this project.
The same data, with every case and how each property was measured, is in [atlas.json](atlas.json).

- [Parameters](#parameters), [formulas](#formulas), [hard input](#hard-input), [types](#types), [accuracy](#accuracy): measured
  from outside by `multibn identify`, with each framework's own defaults.
- [By clause](#by-clause): where each one differs from [the specification](../README.md) (`multibn clauses`).
- [One by one](#one-by-one): why it differs, and its habits.
- [What is missing](#what-is-missing) and [how this was made](#how-this-was-made).
"""

HOW = """## How this was made

`make atlas` installs the packages pinned in `conformance/multibn_conformance/frameworks/environments` into `.atlas`, runs each
subject of `frameworks/layers` there in a process of its own, and writes this page. For each BatchNorm,

1. `multibn identify` measures it with its own defaults;
2. every fixed case is judged by this specification, with bounds for the arithmetic of the input's type (`docs/bounds.md`);
3. every fixed case is judged by its own dialect: with the parameters that it does not let choose, with its moving statistics
   observed where it moves them, and with its known differences, each of which must show up. The page names those that do
   not follow their dialect;
4. short functions in `atlas/habits` ask about its other habits.

`multibn conform --own` does 2 and 3 for the frameworks that are installed beside it.
"""


def page(atlas: dict[str, Any]) -> str:
    """The whole page."""
    frameworks = _with_defaults(atlas["frameworks"])
    first, last = (most((each["made"] for each in frameworks), default="no day") for most in (min, max))
    made = f"on {last}" if first == last else f"from {first} to {last}"
    intro = INTRO.format(count=len(frameworks), made=made, machine=atlas["machine"])
    parts = [intro, *(_section(title, text, columns, frameworks) for title, text, columns in SECTIONS), _by_clause(frameworks)]
    parts += ["## One by one\n", *map(_one, frameworks), _missing(atlas["missing"]), HOW]
    return "\n".join(parts)


def _with_defaults(frameworks: list[Framework]) -> list[Framework]:
    """With its defaults in its own words; of two BatchNorms of one package the first is asked."""
    told: dict[str, str] = {}
    done = []
    for each in frameworks:
        package = list(each["packages"])[-1]
        own = next((habit["answer"] for habit in each["habits"] if habit["id"] == "defaults"), told.get(package, ""))
        told.setdefault(package, own)
        done.append({**each, "defaults": own})
    return done


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def _section(title: str, text: str, columns: dict[str, Callable[[Framework], str]], frameworks: list[Framework]) -> str:
    rows = [[f"[{each['name']}](#{_anchor(each['name'])})", *(cell(each) for cell in columns.values())] for each in frameworks]
    return f"## {title}\n\n{text}\n\n{_table(['BatchNorm', *columns], rows)}"


def _anchor(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c in "-_")


def _found(key: str) -> Callable[[Framework], str]:
    def cell(framework: Framework) -> str:
        return _words(framework["findings"][key]["finding"])

    return cell


def _short(key: str, words: dict[Any, str]) -> Callable[[Framework], str]:
    """A short form of the value, or the finding itself where there is no short form."""

    def cell(framework: Framework) -> str:
        found = framework["findings"][key]
        value = found["value"]
        return words.get(value, _words(found["finding"])) if isinstance(value, str) else _words(found["finding"])

    return cell


SHORTER = (
    (r".*NotImplementedError: ", ""),
    (r"^normalises with the ", ""),
    (r"^cannot tell: it changes from step to step: the old value weighs ", "changes: "),
    (r"\d\.\d+e-1\d", "0"),
    (r"(\d\.\d{3})\d*", r"\1"),
    (r"moving mean goes from (\S+) to (\S+), moving variance goes from (\S+) to (\S+)", r"mean \1 to \2, variance \3 to \4"),
    (r"the output is empty; moving mean becomes NaN, moving variance becomes NaN", "statistics NaN"),
    (r"the output is empty; the moving statistics stay", "statistics stay"),
    (r"stays in its channel, whose moving statistics become (\S+) and (\S+)", r"its channel's statistics \1, \2"),
    (r"^(refused: \w+): (?:\w+Error: )?(.{0,60}).*", r"\1: \2"),
)
"""Words of a finding that the page leaves out."""


def _words(finding: str) -> str:
    for long, short in SHORTER:
        finding = re.sub(long, short, finding)
    return finding


def _versions(framework: Framework) -> str:
    return ", ".join(f"{name} {version}" for name, version in framework["packages"].items())


def _eps(framework: Framework) -> str:
    found = framework["findings"]["eps"]
    return f"{found['value']:g}" if isinstance(found["value"], float) else found["finding"]


def _momentum(framework: Framework) -> str:
    found = framework["findings"]["momentum"]
    return f"{found['value']:g}" if isinstance(found["value"], (int, float)) else _words(found["finding"])


def _estimator(framework: Framework) -> str:
    """As it was identified, and what the habits say of other ranks; only that where it could not be identified."""
    found = framework["findings"]["moving_variance"]
    habits = [each for each in framework["habits"] if each["id"].startswith("estimator_") and each["answer"] != found["value"]]
    told = [f"{each['question'].rstrip('.').partition(', ')[2]}: {each['answer']}" for each in habits]
    return "; ".join(told if found["value"] is None and told else [found["finding"], *told])


def _own_number(framework: Framework) -> str:
    """The framework's own momentum, and whether it weighs the old or the new value, as measured."""
    numbers = dict(part.rsplit(" ", 1) for part in framework["defaults"].split(", ") if " " in part)
    text = numbers.get("momentum") or numbers.get("exponential_avg_factor")
    weight = framework["findings"]["momentum"]["value"]
    if text is None or not isinstance(weight, (int, float)):
        return text or ""
    whose = "old" if abs(float(text) - weight) < 1e-6 else "new" if abs(float(text) - (1 - weight)) < 1e-6 else "neither"
    return f"{text} of the {whose}"


def _initial(framework: Framework) -> str:
    value = framework["findings"]["initial"]["value"]
    if not isinstance(value, list):
        return str(framework["findings"]["initial"]["finding"])
    return ", ".join("-" if each is None else f"{each:g}" for each in value)


def _type(name: str) -> Callable[[Framework], str]:
    def cell(framework: Framework) -> str:
        value = framework["findings"]["types"]["value"] or {}
        told = value.get(name, "?")
        if told is None:
            return "refused"
        return " ".join(_bits(each) for each in told) if isinstance(told, list) else str(told)

    return cell


def _bits(dtype: str) -> str:
    return dtype.replace("float", "f")


def _digits(dtype: str, at: int) -> Callable[[Framework], str]:
    def cell(framework: Framework) -> str:
        told = (framework["findings"]["accuracy"]["value"] or {}).get(dtype)
        if not told:
            return "-"
        return "NaN" if told[at] is None else f"{told[at]:.1f}"

    return cell


SECTIONS: list[tuple[str, str, dict[str, Callable[[Framework], str]]]] = [
    (
        "Parameters",
        "The defaults. *Its own number*: what it calls momentum, and whose weight that is. *Initial*: moving mean, moving "
        "variance, gamma, beta. Where an operator hands its statistics out (ONNX, TensorFlow's fused one), the subject keeps "
        "them, so that they count as moved in forward.",
        {
            "version": _versions,
            "eps": _eps,
            "momentum": _momentum,
            "its own number": _own_number,
            "moving variance": _estimator,
            "moves in": _short("updates", {"forward": "forward", "backward": "backward", "both": "both", "never": "never"}),
            "initial": _initial,
        },
    ),
    (
        "Formulas",
        "What normalises in training and in inference; whether gradients flow through mean and variance; gamma and beta.",
        {
            "training normalises with": _found("normalize_with"),
            "inference": _found("inference"),
            "through the statistics": _short("through_statistics", {"both": "yes"}),
            "gamma": _short("gamma", {"acts": "acts"}),
            "beta": _short("beta", {"acts": "acts"}),
        },
    ),
    (
        "Hard input",
        "In training. Loaded before: moving mean 5, moving variance 900.",
        {
            "one value per channel": _found("one_value"),
            "empty batch": _found("empty"),
            "a NaN": _found("nan"),
            "an infinity": _found("inf"),
        },
    ),
    (
        "Types",
        "Type of the output and of the moving statistics, for input of each type (f32: float32). bfloat16 is among the habits.",
        {name: _type(name) for name in ("float16", "float32", "float64", "int32")},
    ),
    (
        "Accuracy",
        "Digits of the output in training that are right, where mean/std is 1, 1e2, 1e4, 1e6; float32 has 7.2, float64 16.0.",
        {
            **{f"f32, {ratio}": _digits("float32", at) for at, ratio in enumerate(("1", "1e2", "1e4", "1e6"))},
            **{f"f64, {ratio}": _digits("float64", at) for at, ratio in enumerate(("1", "1e2", "1e4", "1e6"))},
        },
    ),
]


def _by_clause(frameworks: list[Framework]) -> str:
    text = (
        "`=` all cases as here; a number: so many differ; `-`: the framework has no way to do what the cases ask for, or nothing "
        "is promised there. *Dialect*: whether it keeps its own. Clauses (`multibn clauses`): 01 shapes, 02 statistics, 03 eps, "
        "04 gamma and beta, 05 momentum and when, 06 estimator, 07 inference, 08 gradients, 09 switches, 10 types, 11 NaN, "
        "12 empty and one value, 13 state, 14 memory layout, 16 accuracy. BN-15, bits, is asked of our layers only."
    )
    clauses = [clause for clause in CLAUSES if any(clause in each["same"] for each in frameworks)]
    rows = []
    for each in frameworks:
        cells = []
        for clause in clauses:
            differ = sum(case["here"] == "differs" for case in each["cases"] if case["clause"] == clause)
            cells.append(str(differ) if differ else "=" if each["same"].get(clause) else "-")
        broken = each["keeping"].get("breaks")
        rows.append([f"[{each['name']}](#{_anchor(each['name'])})", *cells, "**breaks**" if broken else "keeps"])
    return f"## By clause\n\n{text}\n\n{_table(['BatchNorm', *(clause[3:] for clause in clauses), 'dialect'], rows)}"


def _one(framework: Framework) -> str:
    here = {word: sum(case["here"] == word for case in framework["cases"]) for word in ("differs", "cannot")}
    keeping = {word: framework["keeping"].get(word, 0) for word in ("keeps", "as stated", "breaks")}
    run = f"{_versions(framework)}, NumPy {framework['numpy']}, Python {framework['python']}; {framework['made']}."
    lines = [f"### {framework['name']}", "", run]
    nearest = framework["nearest"]
    if nearest is not None:
        others = f" (as near: {', '.join(nearest['names'][1:])})" if nearest["names"][1:] else ""
        but = "".join(f"; {each}" for each in nearest["differs"])
        lines.append(f"Nearest dialect by `multibn identify`: {nearest['names'][0]}{others}{but}.")
    lines.append(
        f"By this specification: {sum(framework['same'].values())} cases the same, {here['differs']} differ, "
        f"{here['cannot']} it has no way to do. "
        f"By its dialect: {keeping['keeps'] + keeping['as stated']} cases kept, {keeping['as stated']} of them as differences "
        f"that are stated; {keeping['breaks']} broken."
    )
    lines.append("")
    if framework["differences"]:
        rows = [[each["why"], ", ".join(each["clauses"]), str(each["cases"])] for each in framework["differences"]]
        lines.append(_table(["why it differs", "clauses", "cases"], rows))
    cannot = sorted({why for case in framework["cases"] if case["here"] == "cannot" for why in case["because"]})
    if cannot:
        lines.append("No way to do: " + " ".join(cannot) + "\n")
    if framework["habits"]:
        lines.append(_table(["habit", "found"], [[each["question"], each["answer"]] for each in framework["habits"]]))
    return "\n".join(lines)


def _missing(missing: dict[str, str]) -> str:
    return "## What is missing\n\n" + "\n".join(f"- {what}: {why}" for what, why in missing.items()) + "\n"
