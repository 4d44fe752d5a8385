"""Only ``compat`` uses private parts of PyTorch, and its error for a missing part says what stops working."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import multibn_torch
from multibn_torch import compat

FILES = sorted(Path(multibn_torch.__file__).parent.rglob("*.py"))
MODULE = {"_parameters", "_buffers", "_apply", "_load_from_state_dict", "_version", "_replace"}
"""Names that subclasses of ``nn.Module`` may use or override, and names that PyTorch and Python document."""


def private(path: Path) -> set[str]:
    """Return the private names that a file accesses: attributes of any object, and imports from torch."""
    tree = ast.parse(path.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "torch" in str(node.module).split(".")
        for alias in node.names
    }  # fmt: skip
    return {name for name in used if name.startswith("_") and not name.startswith("__")}


def defined() -> set[str]:
    """Return the names that the package itself defines."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


CHECKED = [path for path in FILES if path != Path(compat.__file__)]


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: path.stem)
def test_only_compat_uses_private_parts(path: Path) -> None:
    allowed = MODULE | defined()
    assert private(path) - allowed == set()


def test_each_part_is_there_and_used() -> None:
    for name, part in compat.PARTS.items():
        assert compat.lookup(name) is not None
        assert part.use
        assert sum(name in path.read_text() for path in FILES) >= 1


def test_a_release_that_lacks_a_part_says_what_stops_working(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: Any = {"gone": compat.Part("_C._gone", "everything"), "spared": compat.Part("_C._gone", "comfort", required=False)}
    monkeypatch.setattr(compat, "PARTS", gone)
    with pytest.raises(ImportError) as caught:
        compat.lookup("gone")
    assert str(caught.value) == (
        f"multibn_torch needs torch._C._gone, which PyTorch {torch.__version__} lacks; without it, this stops working: "
        "everything. Install a release of PyTorch that has it (2.4 to 2.13 do), or a newer multibn."
    )
    assert compat.lookup("spared") is None


def test_a_compiled_program_is_not_taken_for_an_exported_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In PyTorch 2.11, this function is True in every program that torch.compile compiles."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not compat.exporting()
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    assert compat.exporting()
