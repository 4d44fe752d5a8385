"""The commands ``multibn conform``, ``multibn identify`` and ``multibn vectors``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from multibn.usage import UsageError, needed

from .subjects.ending import ending_on_signals
from .subjects.text import plain


@ending_on_signals()
def conform(
    backend: Annotated[
        list[str] | None, typer.Option(help="Judge this backend; fail if it does not load. May be repeated.")
    ] = None,
    device: Annotated[list[str] | None, typer.Option(help="Judge on this device; fail if it is absent. May be repeated.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Run this case, or the cases that match this pattern.")] = None,
    clause: Annotated[list[str] | None, typer.Option(help="Run the cases of this clause, such as BN-05.")] = None,
    subject: Annotated[
        str | None, typer.Option(metavar="MODULE:MAKE", help="Judge this BatchNorm; see docs/judge-your-own.md.")
    ] = None,
    spec: Annotated[
        str | None, typer.Option(help="Judge the --subject with these parameters only: a dialect's name or JSON.")
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(help="Python interpreter for the --subject, or for backends that are not installed here. May be repeated."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Time limit for a call of the --subject, in seconds (default 20).")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Accuracy to require of the --subject: exact (BN-16), or working, rounding in the input's type (default)."
        ),
    ] = None,
    own: Annotated[
        bool,
        typer.Option(
            "--own",
            help="Judge the frameworks' own BatchNorms instead, also by their dialects; with --ranks PyTorch's own.",
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the report as JUnit XML to this file.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run only a minimal set of cases that catches every known defect.")
    ] = False,
    random: Annotated[int | None, typer.Option(metavar="N", help="Run N random cases instead of the fixed ones.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the first random case.")] = 0,
    ranks: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Judge synchronised statistics (SY) over N processes.")
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Test the suite: it must reject each known wrong BatchNorm.")
    ] = False,
) -> None:
    """Judge every installed backend on every device by the BN and WH clauses; with --ranks, by the SY clauses.

    Exit code: 0 if all cases pass or are skipped, 1 if one fails, 2 for a usage error.
    """
    with needed("conform", "conformance"):
        from .cases.fixed import CASES
        from .cases.select import check_options, chosen_cases
        from .reports import files as publish
        from .reports import terminal
        from .runs import backends, external, synchronised, whitening
        from .subjects.backends import candidates
        from .whitening.select import split

        if self_test or random is not None:
            from .runs import seeds
            from .runs import self_test as own_test
    files = {"--html": html, "--json": json, "--junit": junit}
    if ranks is not None:
        no_use: list[tuple[str, object]] = [("--subject", subject), ("--spec", spec), ("--quick", quick)]
        no_use += [
            ("--device", device),
            ("--random", random),
            ("--backend", own and backend),
            ("--self-test", own and self_test),
            *files.items(),
        ]
        others = [name for name, given in no_use if given]
        if others:
            what = "PyTorch's own SyncBatchNorm" if own else "backends"
            raise UsageError(f"--ranks judges {what} by the SY clauses and cannot be combined with {', '.join(others)}.")
        console = Console()
        if self_test:
            raise typer.Exit(not synchronised.self_test(ranks, console))
        if own:
            judged_over_ranks = synchronised.run_own(ranks, case or (), clause or (), console)
        else:
            judged_over_ranks = synchronised.run(backend or (), ranks, case or (), clause or (), console)
        raise typer.Exit(any(each.status == "fail" for each in judged_over_ranks))
    publish.check_writable(files)
    others = [name for name, given in (("--case", case), ("--clause", clause), ("--quick", quick)) if given]
    check_options(random, others, self_test, subject is not None)
    case, clause, whitening_cases = split(case or (), clause or (), quick or random is not None)
    only_whitening = bool(whitening_cases and others and not (case or clause or quick))
    if only_whitening and (subject or own):
        raise UsageError("--subject and --own judge no whitening layers. Choose cases of BatchNorm.")
    cases = [] if only_whitening else chosen_cases(CASES, case, clause, quick)
    if own:
        from .frameworks import run as frameworks

        no_meaning = {"--subject": subject, "--spec": spec, "--precision": precision, "--timeout": timeout}
        frameworks.alone({**no_meaning, **files, "--self-test": self_test or None})
        chosen = cases if random is None else range(seed, seed + random)
        raise typer.Exit(frameworks.run(chosen, backend or (), external.single(python), device or (), Console()))
    theirs = external.judged(subject, cases, spec, python or (), timeout, precision, backend or (), device or ())
    if theirs is not None:
        judged, absent, cases = [theirs.candidate], theirs.absent, theirs.cases
    else:
        judged, absent = candidates(backend or (), device or (), python or ())
    if not judged:
        raise UsageError(f"no subjects found: {'; '.join(f'{each.name}: {each.reason}' for each in absent) or 'no backend'}.")
    console = Console()
    if self_test:
        raise typer.Exit(not own_test.run(judged, random or own_test.SEEDS, seed, console))
    if random is not None:
        judgements, cases = seeds.run(judged, random, seed, console, spec, theirs and theirs.command)
    else:
        judgements = backends.run(judged, cases, console)
        if theirs is not None:
            judgements = theirs.reproducible(judgements)
    if not only_whitening:
        terminal.show(judgements, judged, absent, console)
    beside = whitening.run(judged, whitening_cases, console)
    judgements, published = [*judgements, *beside], [*cases, *(whitening_cases if beside else ())]
    publish.publish(files, judgements, judged, absent, published, plain(shlex.join(["multibn", *sys.argv[1:]])), spec)
    raise typer.Exit(any(each.status == "fail" for each in judgements))


@ending_on_signals()
def identify(
    subject: Annotated[
        str, typer.Argument(metavar="MODULE:MAKE", help="Module and function that make the subject; see docs/judge-your-own.md.")
    ],
    python: Annotated[str | None, typer.Option(help="Python interpreter for the subject [default: this one].")] = None,
    timeout: Annotated[float | None, typer.Option(help="Time limit for a call, in seconds (default 20).")] = None,
    device: Annotated[str, typer.Option(help="Device to pass to MAKE.")] = "cpu",
) -> None:
    """Determine which dialect a BatchNorm follows by probing it, and print its BatchNormSpec.

    Exit code: 0 if the whole spec was determined, 1 if not, 2 if the call is wrong.
    """
    with needed("identify", "conformance"):
        from .identify import identity as black_box
        from .subjects.outside import started
    with started(subject, python, timeout, device) as outside:
        found = black_box.identify(lambda num_features: outside.make(num_features, None))
    Console().print(found.table(subject))
    Console().print(found.text(), soft_wrap=True, highlight=False)
    raise typer.Exit(bool(found.unknown))


vectors = typer.Typer(
    help="Export the cases to files and check answers, for implementations that Python cannot call.", no_args_is_help=True
)
_Vectors = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the vectors.")]


@vectors.command("write")
def write_vectors(
    folder: _Vectors,
    case: Annotated[list[str] | None, typer.Option(help="Write this case, or the cases that match this pattern.")] = None,
    clause: Annotated[list[str] | None, typer.Option(help="Write the cases of this clause.")] = None,
) -> None:
    """Write the cases and their expected values to a new folder; the README.md there explains the answer format.

    Exit code: 0, or 2 if the call is wrong.
    """
    with needed("vectors", "conformance"):
        from .vectors import run
    run.write(folder, case or (), clause or (), Console())


@vectors.command("check")
def check_vectors(
    folder: _Vectors,
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="Folder with the answers to check.")],
    case: Annotated[list[str] | None, typer.Option(help="Judge this case, or the cases that match this pattern.")] = None,
    precision: Annotated[str, typer.Option(help="The arithmetic that the answers promise: working or exact.")] = "working",
) -> None:
    """Check the answers to test vectors.

    Exit code: 0 if all conform, 1 if one does not, 2 if the call is wrong.
    """
    with needed("vectors", "conformance"):
        from .vectors import run
    raise typer.Exit(not run.judge_folder(folder, answers, case or (), precision, Console()))
