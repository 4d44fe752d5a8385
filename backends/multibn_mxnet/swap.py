"""Replace Gluon's BatchNorm blocks in a net by ours, and undo the replacement."""

from __future__ import annotations

import json
import warnings
from typing import Any

from mxnet import gluon

from .block import GluonBatchNorm, GluonBatchNormReLU, GluonNormalization, Normalization, check_implementation

_OURS = {gluon.nn.BatchNorm: GluonBatchNorm, gluon.nn.BatchNormReLU: GluonBatchNormReLU}
_GLUONS = {ours: own for own, ours in _OURS.items()}


def swap(net: Any, implementation: str | None = None) -> list[str]:
    """Replace every BatchNorm and BatchNormReLU of the net by ours, in place; return the names of the replaced blocks.

    Each block stays the same object with the same Parameters, prefix, hooks and hybridization; only its class changes. So
    attributes, shared blocks, Trainers and names in checkpoints that refer to the block continue to work. MXNet traces
    hybridized graphs again. ``unswap`` undoes the swap.

    A UserWarning names the blocks that swap leaves unchanged, and why: subclasses of Gluon's blocks, such as SyncBatchNorm,
    which may compute something else, and SymbolBlocks, whose graphs are fixed.

    Args:
        implementation: set on every BatchNorm, including blocks that were ours before; see ``BatchNorm``. None means "auto" for
            replaced blocks, and keeps the implementation of blocks that were ours before.

    Raises:
        ValueError, TypeError: a block has parameters that the specification does not allow, such as eps 0, or the implementation
            is unknown. The net is unchanged then.

    >>> net = gluon.nn.HybridSequential(prefix="net_")
    >>> with net.name_scope():
    ...     net.add(gluon.nn.Conv2D(8, 3), gluon.nn.BatchNorm(), gluon.nn.Activation("relu"))
    >>> swap(net)
    ['net_batchnorm0']
    """
    if implementation is not None:
        check_implementation(implementation)
    blocks = _blocks(net)
    found = [block for block in blocks if type(block) in _OURS]
    for block in found:
        try:
            GluonNormalization._describe(block)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{block.name}: {error}") from None
    for block in found:
        block.__class__ = _OURS[type(block)]
    for block in blocks:
        if implementation is not None and isinstance(block, Normalization):
            block.implementation = implementation
            block.forget_layer()
    _trace_again(blocks)
    left = [f"{block.name} ({reason})" for block in blocks if (reason := _why_not(block))]
    if left:
        warnings.warn(f"swap leaves these blocks as they are: {'; '.join(left)}.", UserWarning, stacklevel=2)
    return [block.name for block in found]


def unswap(net: Any) -> list[str]:
    """Replace every GluonBatchNorm and GluonBatchNormReLU of the net by MXNet's own, in place; return their names.

    Undoes ``swap``: the blocks and Parameters stay the same objects. Blocks that were created as ours become MXNet's own too,
    and lose the attributes that only ours have (``implementation``, ``init``). ``multibn_mxnet.BatchNorm`` has no counterpart in
    MXNet and stays.

    >>> net = gluon.nn.HybridSequential(prefix="net_")
    >>> with net.name_scope():
    ...     net.add(gluon.nn.BatchNorm())
    >>> swap(net), unswap(net), type(net[0]).__module__
    (['net_batchnorm0'], ['net_batchnorm0'], 'mxnet.gluon.nn.basic_layers')
    """
    blocks = _blocks(net)
    found = [block for block in blocks if type(block) in _GLUONS]
    for block in found:
        block.forget_layer()
        for name in ("implementation", "init"):
            block.__dict__.pop(name, None)
        block.__class__ = _GLUONS[type(block)]
    _trace_again(blocks)
    return [block.name for block in found]


def _blocks(net: Any) -> list[Any]:
    """Return every block of the net once, in order."""
    blocks: list[Any] = []
    net.apply(blocks.append)
    return list({id(block): block for block in blocks}.values())


def _trace_again(blocks: list[Any]) -> None:
    for block in blocks:
        if isinstance(block, gluon.HybridBlock) and not isinstance(block, gluon.SymbolBlock):
            block._clear_cached_op()


def _why_not(block: Any) -> str:
    """Return why a block that contains BatchNorm cannot be swapped, else an empty string."""
    kind = type(block).__name__
    if isinstance(block, gluon.SymbolBlock):
        operators = {"BatchNorm", "_contrib_BatchNormWithReLU", "_contrib_SyncBatchNorm"}
        its = operators.intersection(node["op"] for node in json.loads(block._cached_graph[1].tojson())["nodes"])
        return f"{kind}, a fixed graph with the operator {', '.join(sorted(its))}" if its else ""
    if isinstance(block, tuple(_OURS)) and not isinstance(block, Normalization):
        return f"{kind}, a subclass of gluon.nn.{_base(block).__name__}, may compute something else"
    return ""


def _base(block: Any) -> Any:
    return next(base for base in type(block).__mro__ if base in _OURS)
