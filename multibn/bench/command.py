"""The command ``multibn bench``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from multibn.interpreters import elsewhere
from multibn.usage import UsageError


def bench(
    framework: Annotated[list[str] | None, typer.Option(help="Measure in torch, mxnet or jax. May be repeated.")] = None,
    python: Annotated[list[str] | None, typer.Option(help="An interpreter for frameworks that this one lacks.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Train densenet121 or resnet18 instead. May be repeated.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Train networks under torch.compile: all, or those of --model.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure networks with and without recompute(): memory and time.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smoke test with few repetitions; do not quote the times.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the times to this file.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Plot the results for ResNet-50's stages to this .svg or .png file.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads per framework [default: 2, or 1 on a single processor].")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Measure synchronised statistics over N processes instead, in torch.")
    ] = None,
    whitening: Annotated[bool, typer.Option("--whitening", help="Compare whitening with BatchNorm, in torch.")] = False,
) -> None:
    """Compare the CPU layers with the framework's own and with a copy of the same bytes.

    With --model: training steps of a network after swap (in PyTorch with fuse_relu), as it is, and without any BatchNorm. With
    --compiled: under torch.compile, after a plain swap and as it is. With --memory: after swap, with and without recompute().

    Exits with 0, 1 if a framework could not be measured, 2 if the call is wrong.
    """
    from . import ranks as of_ranks
    from . import run
    from . import whitening as of_whitening
    from .inputs import COMPILED, MEMORY, MODELS

    command = shlex.join(["multibn", *sys.argv[1:]])
    if ranks is not None:
        if whitening or picture or framework or model or threads:
            raise UsageError("--ranks is measured in torch, by processes of one thread, and goes with --quick and --json only.")
        raise typer.Exit(not of_ranks.run(ranks, quick, json, command))
    if whitening and (picture or framework or model):
        raise UsageError("--whitening is measured in torch and draws no picture. Leave --framework, --model and --picture out.")
    if whitening + compiled + memory > 1:
        raise UsageError("--whitening, --compiled and --memory measure different things: leave all but one of them out.")
    if (compiled or memory) and (picture or framework not in (None, [], ["torch"])):
        raise UsageError(
            "--compiled and --memory are measured in torch and draw no picture. Leave --framework and --picture out."
        )
    known = COMPILED if compiled else MEMORY if memory else MODELS
    in_torch = whitening or compiled or memory
    others = {} if in_torch else elsewhere(framework or run.modules(), python or ())
    plan = run.what_to_measure(["torch"] if in_torch else framework or (), threads, json, picture, model or (), others, known)
    if whitening:
        raise typer.Exit(not of_whitening.run(plan[2], quick, json, command))
    if compiled or memory:
        inputs = {"torch": [known[name] for name in model or known]}
        raise typer.Exit(not run.run(*plan, quick, json, picture, command, (), inputs))
    raise typer.Exit(not run.run(*plan, quick, json, picture, command, model or (), others=others))
