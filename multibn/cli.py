"""The command line: ``multibn conform | bench | dialects | clauses``. Nothing is loaded before it is needed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from .spec import CLAUSES

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
) -> None:
    """Judge every BatchNorm that is installed, on every device present, by every clause.

    Exits with 0 if all conform, 1 if one does not, 2 if the call is wrong.
    """
    try:
        from multibn_conformance import report
        from multibn_conformance.choice import WrongCall, chosen_cases
        from multibn_conformance.fixed import CASES
        from multibn_conformance.subjects import candidates
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        _wrong_call(f"multibn conform needs {package}, which is not installed: pip install 'multibn[conformance]'")
    try:
        cases = chosen_cases(CASES, case or (), clause or ())
        judged, absent = candidates(backend or (), device or ())
        if not judged:
            raise WrongCall(f"nobody to judge: {'; '.join(f'{each.name}: {each.reason}' for each in absent) or 'no backend'}.")
    except WrongCall as error:
        _wrong_call(str(error))
    console = Console()
    judgements = report.run(judged, cases, console)
    report.show(judgements, judged, absent, console)
    raise typer.Exit(any(each.status == "fail" for each in judgements))


@app.command()
def bench(
    framework: Annotated[list[str] | None, typer.Option(help="Measure in torch or mxnet. May be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few turns, to see that it works; no numbers to quote.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the times to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw ResNet-50's stages to this .svg or .png file.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads for each; 2 if there are so many processors.")] = None,
) -> None:
    """Measure the CPU layers beside the framework's own and beside copying the same bytes.

    Exits with 0, 1 if a framework could not be measured, 2 if the call is wrong.
    """
    from .bench import check, run

    try:
        plan = check(framework or (), threads, json, picture)
    except ValueError as error:
        _wrong_call(str(error))
    done = run(*plan, quick, json, picture, shlex.join(["multibn", *sys.argv[1:]]))
    raise typer.Exit(not done)


@app.command()
def dialects() -> None:
    """What each framework's own BatchNorm does, with its source."""
    from .dialects import table

    Console().print(table())


@app.command()
def clauses() -> None:
    """The specification, clause by clause."""
    for number, text in CLAUSES.items():
        typer.echo(f"{number}  {text}")


def _wrong_call(message: str) -> NoReturn:
    typer.echo(f"multibn: {message}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """The program."""
    app()
