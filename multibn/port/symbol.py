"""Read the graph of an MXNet network, ``NAME-symbol.json``, in all formats since 2015.

A node has an operator, a name, inputs (node, output) and attributes, all strings: "attrs" since MXNet 1.0, "attr" before, "param"
at first. For an absent attribute, the operator's default holds. Nodes of operator "null" are the inputs and stored arrays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import PortError

_TRAINING: Final = {"lr_mult", "wd_mult", "ctx_group", "force_mirroring", "mirror_stage"}
"""Attributes of old files for MXNet's optimizer and memory planner; newer files have them as __lr_mult__."""


@dataclass(frozen=True)
class Node:
    """One operator's call, or, with operator "null", an input or a stored array.

    Args:
        op, name: as in the file.
        attributes: those of the operator itself, as text.
        inputs: (node, output) of each.
        hidden: attributes such as ``__shape__``, without the underscores.
    """

    op: str
    name: str
    attributes: Mapping[str, str]
    inputs: tuple[tuple[int, int], ...]
    hidden: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.op} {self.name!r}"


@dataclass(frozen=True)
class Symbol:
    """A graph: nodes in topological order, and the outputs (node, output).

    ``version`` is that of the MXNet that wrote the file, such as 10901, or None in files before 0.9.
    """

    nodes: tuple[Node, ...]
    heads: tuple[tuple[int, int], ...]
    version: int | None


def read_symbol(text: str, name: str = "the symbol") -> Symbol:
    """Parse the text of a ``-symbol.json`` file; ``name`` is for messages.

    Raises:
        PortError: the text is not a graph.
    """
    if text.startswith("version https://git-lfs"):
        raise PortError(f"{name} is a Git LFS pointer, not the graph itself. Run `git lfs pull` in its repository.")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PortError(f"{name} is not JSON: {error}. Give the -symbol.json file of the network.") from None
    try:
        nodes = tuple(_node(each, i) for i, each in enumerate(_list(content, "nodes")))
        heads = tuple(_reference(each, len(nodes)) for each in _list(content, "heads"))
        if not heads:
            raise ValueError("it has no outputs")
        version = content.get("attrs", {}).get("mxnet_version", [None, None])[1]
        return Symbol(nodes, heads, version if isinstance(version, int) else None)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise PortError(f"{name} is no graph of MXNet: {error}. Give the -symbol.json file of the network.") from None


def _list(content: Any, key: str) -> list[Any]:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"it has no list of {key}")
    return content[key]  # type: ignore[no-any-return]


def _node(each: Any, index: int) -> Node:
    if not isinstance(each, dict) or not all(isinstance(each.get(key), str) for key in ("op", "name")):
        raise ValueError(f"node {index} has no operator or no name")
    attributes: dict[str, str] = {}
    for key in ("param", "attr", "attrs"):
        attributes.update(each.get(key) or {})
    if not all(isinstance(value, str) for value in attributes.values()):
        raise ValueError(f"an attribute of node {index} is not text")
    inputs = tuple(_reference(reference, index) for reference in _list(each, "inputs"))
    hidden = {key[2:-2]: value for key, value in attributes.items() if key.startswith("__") and key.endswith("__")}
    visible = {key: value for key, value in attributes.items() if not _is_hidden(key)} if each["op"] != "null" else {}
    return Node(each["op"], each["name"], visible, inputs, hidden)


def _is_hidden(key: str) -> bool:
    return (key.startswith("__") and key.endswith("__")) or key in _TRAINING or key.endswith(("_lr_mult", "_wd_mult"))


def _reference(each: Any, below: int) -> tuple[int, int]:
    """Return node and output; older files omit the version of the variable, and the heads of the oldest have three numbers
    too.
    """
    if not isinstance(each, list) or not 2 <= len(each) <= 3 or any(type(number) is not int for number in each):
        raise ValueError(f"{each!r} is no reference to a node")
    node, output = each[:2]
    if not 0 <= node < below or output < 0:
        raise ValueError(f"{each!r} refers to a node that does not come before")
    return node, output
