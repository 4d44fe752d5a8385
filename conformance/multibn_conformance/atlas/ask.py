"""Ask the questions of a file of ``habits``: ``python ask.py habits/torch_nn.py answers.json``. Needs nothing of this project."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any


def answers(path: str) -> list[dict[str, str]]:
    """[{"id", "question", "answer"}], in the order of the file."""
    name = f"habits.{Path(path).stem}"  # of a package, so that it finds what lies beside it
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == name and f.__name__[0] != "_"]
    found.sort(key=lambda f: f.__code__.co_firstlineno)
    return [{"id": f.__name__, "question": (f.__doc__ or "").strip(), "answer": _answer(f)} for f in found]


def _answer(question: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            answer = question()
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Stack trace" not in line]
            said = next((line for line in lines if "Check failed" in line or "Error" in line), lines[0] if lines else "")
            told = re.sub(r"^\{\{.*?\}\} ", "", said)  # TensorFlow's name of the node
            return f"raises {type(error).__name__}: {told}"[:160]
    return "yes" if answer is True else "no" if answer is False else f"{answer:.3g}" if isinstance(answer, float) else str(answer)


if __name__ == "__main__":
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answers(sys.argv[1]), file, indent=1)
