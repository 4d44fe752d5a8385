"""Make the atlas: who does what.

``python -m multibn_conformance.atlas.make [FRAMEWORK...]`` installs each framework into an environment of its own, runs it there,
and writes ``docs/atlas.json`` and ``docs/atlas.md``; nothing in these files is written by hand.

With names, only these run again; the others stay as they were. Each says when it was run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from multibn.usage import UsageError
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.frameworks.dialect import DialectJudgement, judge_all
from multibn_conformance.frameworks.own import FOLDER, Own
from multibn_conformance.frameworks.registry import ALL
from multibn_conformance.frameworks.run import Judged, differences, running
from multibn_conformance.identify.identity import identify
from multibn_conformance.usage import chosen

from . import page

FORMAT = "multibn-atlas-2"

MISSING = {
    "CUDA and cuDNN (torch.nn, gluon.nn, TensorFlow, Paddle)": "the machine that made the atlas has no GPU; "
    "where there is one, multibn conform --own --device cuda:0 judges what runs on it.",
    "Caffe": "no package of it is published; its dialect is described from its source in multibn dialects.",
    "SyncBatchNorm over several processes": "one process is judged at a time.",
}
"""What the atlas has not, and why."""


def environment(name: str, folder: Path) -> Path:
    """The interpreter of an environment, made and filled with its pinned packages if that has not been done."""
    place, pins = folder / name, FOLDER.parent / "environments" / f"{name}.txt"
    python, done = place / "bin" / "python", place / "done"
    wanted = sha256(pins.read_bytes()).hexdigest()
    if not done.exists() or done.read_text() != wanted:
        print(f"installing {name} into {place}", flush=True)
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", pins], check=True)
        done.write_text(wanted)
    return python


def measured(own: Own, python: Path) -> dict[str, Any]:
    """All that is found out of one BatchNorm, in an environment that has it.

    Raises:
        UsageError: it has not.
    """
    with running(own, str(python)) as process:
        found = identify(lambda num_features: process.make(num_features, None))
        cases = judge_all(own, list(CASES.values()), process.make)
        versions = process.versions
    return {
        "name": own.name,
        "made": datetime.now(timezone.utc).date().isoformat(),
        "packages": _versions(python, own.packages),
        "python": versions["Python"],
        "numpy": versions["NumPy"],
        "dialect": own.dialect,
        "average": own.average,
        "findings": {
            key: {"finding": each.finding, "how": each.how, "value": _plain(each.value)} for key, each in found.findings.items()
        },
        "spec": found.spec,
        "nearest": None if found.nearest is None else {"names": found.nearest.names, "differs": found.nearest.differs},
        "same": Counter(each.clause for each in cases if each.here == "same"),
        "keeping": Counter(each.keeping for each in cases),
        "cases": [_told(each) for each in cases if each.here != "same" or each.keeping != "keeps"],
        "differences": [
            {"why": why, "clauses": clauses, "cases": count}
            for why, clauses, count in differences(Judged(own, "cpu", versions, cases))
        ],
        "habits": _habits(own, python),
    }


def _told(compared: DialectJudgement) -> dict[str, Any]:
    """One that is not the same: of its message the line that says what came."""
    return {**vars(compared), "message": compared.message.split("\n")[0][:160]}


def _habits(own: Own, python: Path) -> list[dict[str, str]]:
    """Questions and answers; none where another BatchNorm of the same file has been asked."""
    file = own.subject.partition(":")[0]
    _, _, backend = own.name.partition("/")
    first = next(each for each in ALL if each.subject.startswith(f"{file}:"))
    if own != first and file != "keras3":
        return []
    settings = {"TF_CPP_MIN_LOG_LEVEL": "3", **({"KERAS_BACKEND": backend} if file == "keras3" else {})}
    answers: list[dict[str, str]] = []
    for path in sorted((Path(__file__).parent / "habits").glob(f"{file}*.py")):
        with TemporaryDirectory() as folder:
            out = Path(folder) / "answers.json"
            command = [python, Path(__file__).with_name("ask.py"), path, out]
            subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True)
            answers += json.loads(out.read_text())
    return answers


def _versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    code = "import sys, json; from importlib.metadata import version; print(json.dumps({p: version(p) for p in sys.argv[1:]}))"
    told = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(told.stdout)
    return versions


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    return repr(value) if (isinstance(value, float) and value in (float("inf"), float("-inf"))) or value != value else value


def make(names: Sequence[str], folder: Path, docs: Path) -> list[str]:
    """Run these frameworks (all if none is named) and write both files; the errors of those that could not be run.

    Raises:
        UsageError: an unknown name.
    """
    wanted = chosen("framework", names, [own.name for own in ALL])
    path = docs / "atlas.json"
    before = json.loads(path.read_text())["frameworks"] if path.exists() else []
    frameworks = {each["name"]: each for each in before}
    errors = []
    for own in (each for each in ALL if each.name in wanted):
        print(own.name, flush=True)
        try:
            frameworks[own.name] = measured(own, environment(own.environment, folder))
        except (UsageError, subprocess.CalledProcessError) as error:
            frameworks.pop(own.name, None)
            errors.append(f"{own.name}: {error}")
        _write(frameworks, errors, docs)  # at once: the rest may take an hour
    return errors


def _write(frameworks: dict[str, dict[str, Any]], errors: Sequence[str], docs: Path) -> None:
    atlas = {
        "format": FORMAT,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, no GPU used",
        "frameworks": [frameworks[own.name] for own in ALL if own.name in frameworks],
        "missing": {**MISSING, **dict(each.split(": ", 1) for each in errors)},
    }
    docs.mkdir(exist_ok=True)
    (docs / "atlas.json").write_text(json.dumps(atlas, indent=1, allow_nan=False) + "\n")
    (docs / "atlas.md").write_text(page.page(atlas))


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0, 1 if a framework could not be run, 2 if the call is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m multibn_conformance.atlas.make", description="Write docs/atlas.md from runs."
    )
    parser.add_argument("names", nargs="*", metavar="FRAMEWORK", help="run only this one again")
    parser.add_argument("--environments", type=Path, default=Path(".atlas"), help="folder of the environments")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the files")
    chosen_ones = parser.parse_args(arguments)
    try:
        errors = make(chosen_ones.names, chosen_ones.environments, chosen_ones.docs)
    except UsageError as error:
        parser.error(str(error))
    for each in errors:
        print(f"could not be run: {each}", file=sys.stderr)
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
