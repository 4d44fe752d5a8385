"""The command line: ``multibn conform | bench | article | dialects | clauses``. Nothing is loaded before it is needed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from .spec import CLAUSES
from .whitening import CLAUSES as WHITENING_CLAUSES

app = typer.Typer(
    help="One BatchNorm that means the same everywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _multibn() -> None:
    """One BatchNorm that means the same everywhere."""


@app.command()
def conform(
    backend: Annotated[list[str] | None, typer.Option(help="Judge this backend; it must load. May be repeated.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="Judge on this device; it must be there.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Run this case, or the cases that match this pattern.")] = None,
    clause: Annotated[list[str] | None, typer.Option(help="Run the cases of this clause, such as BN-05.")] = None,
    subject: Annotated[str | None, typer.Option(metavar="MODULE:MAKE", help="Judge this one: docs/judge-your-own.md.")] = None,
    spec: Annotated[str | None, typer.Option(help="The --subject's fixed parameters: a dialect's name or JSON.")] = None,
    python: Annotated[str | None, typer.Option(help="The interpreter that runs the --subject.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a call of the --subject may take; 20.")] = None,
    precision: Annotated[str | None, typer.Option(help="What the --subject promises: working (its type's) or exact.")] = None,
    own: Annotated[
        bool, typer.Option("--own", help="Judge the frameworks' own (--backend: these), by their dialect too.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the report as JUnit XML to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run the few cases that catch every known defect.")] = False,
    random: Annotated[int | None, typer.Option(metavar="N", help="Run the cases of N seeds, not the fixed ones.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first of these seeds.")] = 0,
    self_test: Annotated[bool, typer.Option("--self-test", help="Judge the suite itself, by wrong BatchNorms.")] = False,
) -> None:
    """Judge every BatchNorm that is installed, on every device present, by every clause.

    Exits with 0 if all conform, 1 if one does not, 2 if the call is wrong.
    """
    try:
        from multibn_conformance import anyone, publish, report
        from multibn_conformance.choice import WrongCall, check_tier, chosen_cases
        from multibn_conformance.fixed import CASES
        from multibn_conformance.subjects import candidates
        from multibn_conformance.whitening import run as whitening

        if self_test or random is not None:
            from multibn_conformance import random_tier
            from multibn_conformance import self_test as own_test
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        _wrong_call(f"multibn conform needs {package}, which is not installed: pip install 'multibn[conformance]'")
    files = {"--html": html, "--json": json, "--junit": junit}
    try:
        publish.check(files)
        others = [name for name, given in (("--case", case), ("--clause", clause), ("--quick", quick)) if given]
        check_tier(random, others, self_test, subject is not None)
        case, clause, whitening_cases = whitening.split(case or (), clause or (), quick or random is not None)
        only_whitening = bool(whitening_cases and others and not (case or clause or quick))
        if only_whitening and (subject or own):
            raise WrongCall("whitening is judged in the backends alone. Choose cases of BatchNorm.")
        cases = [] if only_whitening else chosen_cases(CASES, case, clause, quick)
        if own:
            from multibn_conformance import own_run

            no_meaning = {"--subject": subject, "--spec": spec, "--precision": precision, "--timeout": timeout}
            own_run.alone({**no_meaning, **files, "--self-test": self_test or None})
            chosen = cases if random is None else range(seed, seed + random)
            raise typer.Exit(own_run.run(chosen, backend or (), python, device or (), Console()))
        theirs = anyone.judged(subject, cases, spec, python, timeout, precision, backend or (), device or ())
        if theirs is not None:
            judged, absent, cases = [theirs.candidate], theirs.absent, theirs.cases
        else:
            judged, absent = candidates(backend or (), device or ())
        if not judged:
            raise WrongCall(f"nobody to judge: {'; '.join(f'{each.name}: {each.reason}' for each in absent) or 'no backend'}.")
    except WrongCall as error:
        _wrong_call(str(error))
    console = Console()
    if self_test:
        raise typer.Exit(not own_test.run(judged, random or own_test.SEEDS, seed, console))
    if random is not None:
        judgements, cases = random_tier.run(judged, random, seed, console, spec, theirs and theirs.command)
    else:
        judgements = report.run(judged, cases, console)
        if theirs is not None:
            judgements = theirs.reproducible(judgements)
    if not only_whitening:
        report.show(judgements, judged, absent, console)
    beside = whitening.run(judged, whitening_cases, console)
    judgements, published = [*judgements, *beside], [*cases, *(whitening_cases if beside else ())]
    publish.publish(files, judgements, judged, absent, published, shlex.join(["multibn", *sys.argv[1:]]), spec)
    raise typer.Exit(any(each.status == "fail" for each in judgements))


@app.command()
def bench(
    framework: Annotated[list[str] | None, typer.Option(help="Measure in torch or mxnet. May be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Train densenet121 or resnet18 instead. May be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few turns, to see that it works; no numbers to quote.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the times to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw ResNet-50's stages to this .svg or .png file.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads for each; 2 if there are so many processors.")] = None,
    whitening: Annotated[bool, typer.Option("--whitening", help="Measure whitening beside BatchNorm instead, in torch.")] = False,
) -> None:
    """Measure the CPU layers beside the framework's own and beside copying the same bytes.

    With --model: training steps of a network after swap (in PyTorch with fuse_relu), as it is, and without any BatchNorm.

    Exits with 0, 1 if a framework could not be measured, 2 if the call is wrong.
    """
    from .bench import check, run

    command = shlex.join(["multibn", *sys.argv[1:]])
    try:
        if whitening and (picture or framework or model):
            raise ValueError(
                "--whitening is measured in torch and draws no picture. Leave --framework, --model and --picture out."
            )
        plan = check(["torch"] if whitening else framework or (), threads, json, picture, model or ())
    except ValueError as error:
        _wrong_call(str(error))
    if whitening:
        from . import bench_whitening

        raise typer.Exit(not bench_whitening.run(plan[2], quick, json, command))
    done = run(*plan, quick, json, picture, command, model or ())
    raise typer.Exit(not done)


@app.command()
def identify(
    subject: Annotated[str, typer.Argument(metavar="MODULE:MAKE", help="A BatchNorm, as docs/judge-your-own.md describes it.")],
    python: Annotated[str | None, typer.Option(help="The interpreter that runs it.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a call of it may take; 20.")] = None,
    device: Annotated[str, typer.Option(help="Handed to its make function.")] = "cpu",
) -> None:
    """Find out from the outside which dialect a BatchNorm speaks, and print its BatchNormSpec.

    Exits with 0 if all of the spec was found, 1 if not, 2 if the call is wrong.
    """
    with _needed("identify"):
        from multibn_conformance import identify as black_box
        from multibn_conformance.choice import WrongCall
        from multibn_conformance.outside import started
    try:
        with started(subject, python, timeout, device) as outside:
            found = black_box.identify(lambda num_features: outside.make(num_features, None))
    except WrongCall as error:
        _wrong_call(str(error))
    Console().print(found.table(subject))
    Console().print(found.text(), soft_wrap=True, highlight=False)
    raise typer.Exit(bool(found.unknown))


vectors = typer.Typer(help="The fixed cases as files, for code that Python cannot call.", no_args_is_help=True)
app.add_typer(vectors, name="vectors")
_Vectors = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the vectors.")]


@vectors.command("write")
def write_vectors(
    folder: _Vectors,
    case: Annotated[list[str] | None, typer.Option(help="Write this case, or the cases that match this pattern.")] = None,
    clause: Annotated[list[str] | None, typer.Option(help="Write the cases of this clause.")] = None,
) -> None:
    """Write the fixed cases with their exact values to a new folder; its README.md says how to answer.

    Exits with 0, 2 if the call is wrong.
    """
    with _needed("vectors"):
        from multibn_conformance import vector_run
    _or_wrong_call(lambda: vector_run.write(folder, case or (), clause or (), Console()))


@vectors.command("check")
def check_vectors(
    folder: _Vectors,
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="The folder of the answers.")],
    case: Annotated[list[str] | None, typer.Option(help="Judge this case, or the cases that match this pattern.")] = None,
    precision: Annotated[str, typer.Option(help="What the answers promise: working (their type's) or exact.")] = "working",
) -> None:
    """Judge the answers to vectors.

    Exits with 0 if all conform, 1 if one does not, 2 if the call is wrong.
    """
    with _needed("vectors"):
        from multibn_conformance import vector_run
    conforms = _or_wrong_call(lambda: vector_run.check(folder, answers, case or (), precision, Console()))
    raise typer.Exit(not conforms)


@app.command()
def article(
    out: Annotated[Path, typer.Option(help="The page.")] = Path("article.html"),
    framework: Annotated[list[str] | None, typer.Option(help="Train in torch or mxnet. May be repeated.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few seeds and steps, to see that it works; nothing to judge by.")
    ] = False,
) -> None:
    """Run the article statement by statement, its claims on real digits, and write one page.

    Exits with 0, 1 if a framework's process failed, 2 if the call is wrong.
    """
    with _needed("article"):
        from .article import page, plan, run
    try:
        frameworks = run.check(framework or (), out)
    except ValueError as error:
        _wrong_call(str(error))
    try:
        page.write(out, frameworks, plan.QUICK if quick else plan.FULL, shlex.join(["multibn", *sys.argv[1:]]), Console())
    except ChildProcessError as error:
        typer.echo(f"multibn: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def dialects() -> None:
    """What each framework's own BatchNorm does, with its source."""
    from .dialects import table

    Console().print(table())


@app.command()
def clauses() -> None:
    """The specification, clause by clause."""
    for number, text in {**CLAUSES, **WHITENING_CLAUSES}.items():
        typer.echo(f"{number}  {text}")


@contextmanager
def _needed(command: str) -> Iterator[None]:
    """What a command imports: a wrong call if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = "article" if command == "article" else "conformance"
        _wrong_call(f"multibn {command} needs {package}, which is not installed: pip install 'multibn[{extra}]'")


def _or_wrong_call(function: Callable[[], Any]) -> Any:
    from multibn_conformance.choice import WrongCall

    try:
        return function()
    except WrongCall as error:
        _wrong_call(str(error))


def _wrong_call(message: str) -> NoReturn:
    typer.echo(f"multibn: {message}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """The program."""
    app()
