"""Every private part of MXNet that the package uses is in ``compat.PARTS``, and a release that lacks one gets a message."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")

import multibn_mxnet
from multibn_mxnet import compat, gate

FOLDER = Path(multibn_mxnet.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(FOLDER.rglob("*.py"))}
PRIVATE_MODULES = ("mxnet.base", "mxnet.gluon.parameter", "mxnet.ndarray.ndarray")
NAMES = {place.replace("()", "").rpartition(".")[2].rpartition(":")[2] for place in compat.PARTS}


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a file of ours defines."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id == "self" else set()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def is_private(node: ast.Attribute, ours: set[str]) -> bool:
    if isinstance(node.value, ast.Name) and node.value.id == "LIB":
        return True
    return node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in ours


def test_every_private_part_is_listed() -> None:
    ours = {name for tree in TREES.values() for name in own_names(tree)}
    used: set[str] = set(gate.FUNCTIONS)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node, ours):
                used.add(node.attr)
            if isinstance(node, ast.ImportFrom) and node.module in PRIVATE_MODULES and path.name != "compat.py":
                assert [alias.name for alias in node.names] == ["MXNetError"], f"{path}: import it from compat"
    used.discard("_LIB")  # of compat itself
    assert used <= NAMES, used - NAMES
    by_name = {"DLContext", "DLDataType", "DLTensor", "DeferredInitializationError", "NDArrayHandle", "check_call"}
    assert used | by_name | {"_differentiable"} >= NAMES, NAMES - used


def test_a_release_without_a_part_says_what_stopped_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat.PARTS, "mxnet.gluon.nn:BatchNorm()._gone", "export blocks")
    message = (
        f"MXNet {mx.__version__} has no mxnet.gluon.nn.BatchNorm()._gone, without which multibn_mxnet cannot export blocks. "
        "Install the release that multibn is tested with: pip install 'mxnet==1.9.1'."
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        compat.part("mxnet.gluon.nn:BatchNorm()._gone")


def test_looking_for_the_parts_takes_no_name_of_a_block() -> None:
    assert multibn_mxnet.GluonBatchNorm(prefix=None).name.startswith("gluonbatchnorm")
