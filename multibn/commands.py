"""The commands ``multibn clauses`` and ``multibn dialects``: print the specification and the frameworks' own dialects."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .dialects import DIALECTS, Dialect
from .spec.clauses import CLAUSES
from .sync.clauses import CLAUSES as SYNCHRONISED_CLAUSES
from .usage import UsageError
from .whitening.spec import CLAUSES as WHITENING_CLAUSES


def clauses(
    number: Annotated[list[str] | None, typer.Argument(metavar="[CLAUSE]...", help="Print these clauses, such as BN-05.")] = None,
) -> None:
    """Print the specification, clause by clause.

    Exits with 0, or with 2 for an unknown clause.
    """
    known = {**CLAUSES, **WHITENING_CLAUSES, **SYNCHRONISED_CLAUSES}
    for each in number or ():
        if each.upper() not in known:
            raise UsageError(f"unknown clause {each!r}; choose from {', '.join(known)}.")
    for each in dict.fromkeys(each.upper() for each in number or known):
        typer.echo(f"{each}  {known[each]}")


def dialects() -> None:
    """Print what each framework's own BatchNorm does, with the source of each statement."""
    Console().print(table())


def table() -> Table:
    """All dialects for a terminal: one row each, with its source."""
    rows = Table(title="What each BatchNorm does by default (momentum: the weight of the old value)", show_lines=True)
    rows.add_column("dialect", style="bold", no_wrap=True)
    rows.add_column("spec", no_wrap=True)
    rows.add_column("what else it does, and how that is known", overflow="fold")
    for dialect in DIALECTS.values():
        rows.add_row(dialect.name, _spec_cell(dialect), escape(_text_cell(dialect)))
    return rows


def _spec_cell(dialect: Dialect) -> str:
    spec = dialect.spec
    lines = [f"eps {spec.eps:g}", f"momentum {spec.momentum}", spec.moving_variance]
    lines += [f"no {name}" for name, present in (("gamma", spec.scale), ("beta", spec.center)) if not present]
    return "\n".join([*lines, f"axis {dialect.channel_axis}", f"update: {dialect.updates_in}"])


def _text_cell(dialect: Dialect) -> str:
    return "\n".join(
        (
            f"{dialect.title}. Its own momentum: {dialect.native_momentum}.",
            *dialect.notes,
            f"{dialect.checked.capitalize()}: {dialect.source}.",
        )
    )
