"""The command ``multibn article``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from multibn.interpreters import elsewhere
from multibn.usage import needed


def article(
    out: Annotated[Path, typer.Option(help="The page.")] = Path("article.html"),
    framework: Annotated[list[str] | None, typer.Option(help="Train in torch, mxnet or jax. May be repeated.")] = None,
    python: Annotated[list[str] | None, typer.Option(help="An interpreter for frameworks that this one lacks.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smoke test with few seeds and steps; the results are not meaningful.")
    ] = False,
) -> None:
    """Execute each statement of the article, test its claims on scikit-learn's digits, and write an HTML report.

    Exits with 0, 1 if a framework's process failed, 2 if the call is wrong.
    """
    with needed("article", "article"):
        from . import page, plan, run
    others = elsewhere(framework or run.modules(), python or ())
    frameworks = run.frameworks_to_run(framework or (), out, others)
    try:
        command = shlex.join(["multibn", *sys.argv[1:]])
        page.write(out, frameworks, plan.QUICK if quick else plan.FULL, command, Console(), others)
    except ChildProcessError as error:
        typer.echo(f"multibn: {error}", err=True)
        raise typer.Exit(1) from None
