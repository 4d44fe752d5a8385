"""``multibn port``: convert an MXNet checkpoint to PyTorch, with a report."""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from multibn.usage import UsageError, needed

from .errors import PortError


def port(
    symbol: Annotated[Path, typer.Argument(metavar="NAME-symbol.json", help="The graph.")],
    params: Annotated[Path, typer.Argument(metavar="NAME-0000.params", help="The arrays.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT=SIZES", help="Shape of an input, such as data=1,3,112,112. May be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Output path without extension.")] = Path("ported"),
    layers: Annotated[str, typer.Option(help="BatchNorm layers to use: multibn or torch.")] = "multibn",
    check: Annotated[bool, typer.Option("--check", help="Also run the network in MXNet and report every difference.")] = False,
    python: Annotated[str | None, typer.Option(help="Python interpreter with MXNet, for --check [default: this one].")] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Fold each BatchNorm into the layer before it.")] = False,
    into: Annotated[
        str | None,
        typer.Option(metavar="MODULE:MAKE", help="Also load the parameters into this model, matching layers by graph structure."),
    ] = None,
) -> None:
    """Convert an MXNet checkpoint to PyTorch, verify each BatchNorm, and report differences.

    Writes OUT.pt2 (torch.export), OUT.pt (the state_dict), OUT.report.json and OUT.report.html; with --into OUT.into.pt too.

    Exit code: 0 if everything agrees, 1 if something differs, 2 (nothing is written) for an unsupported checkpoint or a usage
    error.
    """
    from .report import summary

    try:
        report, artefacts = run(symbol, params, inputs or [], layers, check, python, fold, into, _command())
        _write(out, artefacts)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}." if error.filename else str(error)) from None
    for line in summary(report):
        typer.echo(line)
    for ending in artefacts:
        typer.echo(f"  {out}{ending}")
    raise typer.Exit(report["verdict"] != "same")


def run(
    symbol: Path,
    params: Path,
    inputs: list[str],
    layers: str = "multibn",
    check: bool = False,
    python: str | None = None,
    fold: bool = False,
    into: str | None = None,
    command: str = "",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Port, and return the report and what to write: ending -> a function that writes it to a path.

    Raises:
        PortError: the checkpoint cannot be ported, or a usage error.
        OSError: a file cannot be read.
    """
    if layers not in ("multibn", "torch"):
        raise PortError(f"--layers must be multibn or torch, got {layers!r}.")
    if python is not None and not check:
        raise PortError("--python is the interpreter that runs MXNet for --check. Give --check too.")
    return _maker()(symbol, params, shapes(inputs), layers, check, python, fold, into, command)  # type: ignore[no-any-return]


def _maker() -> Callable[..., Any]:
    """Load the function that makes the port from the package for PyTorch."""
    (found,) = entry_points(group="multibn.port", name="make")
    with needed("port", "port"):
        return found.load()  # type: ignore[no-any-return]


def shapes(inputs: list[str]) -> dict[str, tuple[int, ...]] | None:
    """Return {"data": (1, 3, 112, 112)} for ["data=1,3,112,112"], or None for an empty list."""
    found: dict[str, tuple[int, ...]] = {}
    for each in inputs:
        name, _, sizes = each.rpartition("=")
        if not name or not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", sizes) or name in found:
            raise PortError(f"expected INPUT=SIZES once per input, such as data=1,3,112,112, got {each!r}.")
        found[name] = tuple(map(int, sizes.split(",")))
    return found or None


def _write(out: Path, artefacts: dict[str, Any]) -> None:
    """Write all files under temporary names first, so that an error leaves no partial result."""
    if not out.parent.is_dir():
        raise PortError(f"the folder {out.parent} does not exist. Make it, or give another -o.")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".multibn-") as folder:
        for i, write in enumerate(artefacts.values()):
            write(Path(folder) / f"{i}")
        for i, ending in enumerate(artefacts):
            (Path(folder) / f"{i}").replace(out.parent / (out.name + ending))


def _command() -> str:
    return shlex.join(["multibn", *sys.argv[1:]])
