"""Judge answers to vectors: ``multibn vectors check``. A subject replays the answers and is judged like any other."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from multibn.backend import Precision
from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn.usage import UsageError
from multibn_conformance.cases.case import MOVING, Case, Step
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.judging.judge import Judgement, judge_maker, told
from multibn_conformance.subjects.text import plain

from .read import read_array, read_json
from .write import FORMAT, fingerprint, left_out

_RESULTS = {"train": ("y",), "infer": ("y",), "backward": ("dx", "dgamma", "dbeta")}


class ReportedError(Exception):
    """The error that an answer says its step raised."""


def read_index(folder: Path) -> dict[str, Case]:
    """The cases that a folder of vectors holds.

    Raises:
        UsageError: it is none, or other vectors than this version writes.
    """
    path = folder / "index.json"
    try:
        index = read_json(folder, path.name)
        known = {each["id"]: each["fingerprint"] for each in index["cases"]} if index["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = "no such file" if isinstance(error, FileNotFoundError) else plain(str(error))
        raise UsageError(f"{path} is not an index of vectors: {told}. Write them: multibn vectors write {folder}") from error
    if known is None or any(each not in CASES or fingerprint(CASES[each]) != known[each] for each in known):
        version = plain(str(index.get("multibn")), 40)
        raise UsageError(
            f"{folder} holds vectors of another version, multibn {version}. Write them again, to a new folder: "
            "multibn vectors write DIR"
        )
    return {each: CASES[each] for each in known}


def judge_answers(vectors: Path, answers: Path, cases: Sequence[Case], precision: Precision) -> Iterator[Judgement]:
    """A judgement for each case; what is missing or cannot be read is told, all of it.

    Raises:
        UsageError: there is no folder of answers.
    """
    if not answers.is_dir():
        raise UsageError(
            f"{answers} is not a folder. It must hold an answer for each case: {answers / 'BN-05-momentum-0.json'}, ..."
        )
    command = plain(shlex.join(["multibn", "vectors", "check", str(vectors), str(answers), "--precision", precision, "--case"]))
    return (_judged(answers, case, precision, command) for case in cases)


def _judged(answers: Path, case: Case, precision: Precision, command: str) -> Judgement:
    subject, snippet = plain(str(answers)), f"{command} {case.id}"
    if reason := left_out(case, precision):
        return Judgement(subject, case.id, case.clause, "skip", message=reason)
    steps, problems = _read(answers / f"{case.id}.json", case)
    if problems:
        message = "\n".join((f"{case.id}: {plain(problems[0])}", *map(plain, problems[1:]), *told(case)))
        return Judgement(subject, case.id, case.clause, "fail", np.inf, np.inf, message, snippet)
    judgement = judge_maker(Played(case, steps).make, case, subject, precision)
    return replace(judgement, snippet=snippet) if judgement.snippet else judgement


class Played:
    """The subject of a case whose answers are already there: each call takes its step's."""

    def __init__(self, case: Case, answers: list[dict[str, Any]]) -> None:
        self.case, self.answers = case, answers
        self.step, self.made, self.loading = -1, False, False

    def make(self, num_features: int, spec: BatchNormSpec) -> Any:
        """The subject at its start, or in a later step: the same again, or another one that nobody looks at."""
        if not self.made or self.step == len(self.answers) - 1:
            self.step, self.made, self.loading = -1, True, True
            return self
        self.step += 1
        self.loading = True
        return Other() if self.case.steps[self.step].do == "another" else self

    def load(self, *arrays: Array | None) -> None:
        """After ``make`` it belongs to it, else it is a step."""
        self.step += not self.loading
        self.loading = False

    def forward(self, x: Array, training: bool) -> Any:
        """y of the next step."""
        return self._next()["y"]

    def backward(self, dy: Array) -> Any:
        """The gradients of the next step."""
        now = self._next()
        return tuple(now[name] for name in _RESULTS["backward"])

    def moving(self) -> Any:
        """The moving statistics after the step."""
        return tuple(self.answers[self.step][name] for name in MOVING)

    def _next(self) -> dict[str, Any]:
        self.step += 1
        self.loading = False
        if "raised" in (now := self.answers[self.step]):
            raise ReportedError(now["raised"])
        return {"y": None, **now}


class Other:
    """A second subject of a case: what it gives is not observed."""

    def load(self, *arrays: Array | None) -> None:
        """Nothing."""

    def forward(self, x: Array, training: bool) -> None:
        """Nothing."""


def _read(path: Path, case: Case) -> tuple[list[dict[str, Any]], list[str]]:
    """The answers step by step, and everything that is wrong with the file."""
    try:
        data = read_json(path.parent, path.name)
    except FileNotFoundError:
        return [], [f"no answer: no file {path}."]
    except ValueError as error:
        return [], [f"{path} {error}."]
    given = data.get("steps") if isinstance(data, dict) else None
    if not isinstance(given, list) or len(given) != len(case.steps) or not all(isinstance(each, dict) for each in given):
        count = f"a list of {len(given)}" if isinstance(given, list) else type(given).__name__
        return [], [f'{path}: "steps" must be a list of {len(case.steps)} objects, one for each step, got {count}.']
    problems: list[str] = []
    steps = []
    for number, (step, answer) in enumerate(zip(case.steps, given, strict=True), 1):
        where = f"step {number} of {len(case.steps)} ({step.do})"
        steps.append(_answer(step, answer, where, path.parent, problems))
    return steps, problems


def _answer(step: Step, answer: Mapping[str, Any], where: str, folder: Path, problems: list[str]) -> dict[str, Any]:
    """What an answer gives; what it lacks, and what is wrong with its arrays, goes to the problems."""
    raised = "raised" in answer
    found: dict[str, Any] = {"raised": answer["raised"]} if raised else {}
    if raised and not isinstance(answer["raised"], str):
        problems.append(f"{where}, raised: must be the message of the error, got {type(answer['raised']).__name__}.")
    for name in (*(() if raised else _RESULTS.get(step.do, ())), *MOVING):
        if name not in answer:
            missing = f"{where}: no {name}. "
            if name in MOVING:
                problems.append(missing + "Give the moving statistics as they are after every step.")
            elif name in step.observe:
                problems.append(missing + "Give it, null if there is none.")
            found[name] = None
        elif answer[name] is None:
            found[name] = None
        else:
            try:
                found[name] = read_array(answer[name], folder)
            except ValueError as error:
                problems.append(f"{where}, {name}: {error}")
    return found
