"""The command ``multibn``: finds its commands through the entry point group ``multibn.commands``, and reports wrong calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer

from . import __version__
from .usage import UsageError

GROUP = "multibn.commands"
"""An entry of this group is a function with Typer's annotations, or a ``typer.Typer`` with commands of its own."""


def load(points: list[EntryPoint]) -> typer.Typer:
    """Build the command line of these entry points, sorted by name.

    A command imports what it needs when it runs, so that ``multibn --help`` loads no framework.
    """
    program = typer.Typer(
        help="One BatchNorm that means the same everywhere.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    program.callback()(_options)
    for point in sorted(points, key=lambda point: point.name):
        command = point.load()
        if isinstance(command, typer.Typer):
            for each in command.registered_commands:
                assert each.callback is not None
                each.callback = _reporting(each.callback)
            program.add_typer(command, name=point.name)
        else:
            program.command(point.name)(_reporting(command))
    return program


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"multibn {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One BatchNorm that means the same everywhere."""


def _reporting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command: print the message of a ``UsageError`` and exit with 2."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except UsageError as error:
            typer.echo(f"multibn: {error}", err=True)
            raise typer.Exit(2) from None

    return run


app = load(list(entry_points(group=GROUP)))


def main() -> None:
    """Run the program."""
    app()


if __name__ == "__main__":
    main()
