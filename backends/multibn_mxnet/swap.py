"""Put our blocks in place of Gluon's in a net, and back."""

from __future__ import annotations

import json
import warnings
from typing import Any

from mxnet import gluon

from .block import GluonBatchNorm, GluonBatchNormReLU, GluonNormalization, Normalization, check_implementation

_OURS = {gluon.nn.BatchNorm: GluonBatchNorm, gluon.nn.BatchNormReLU: GluonBatchNormReLU}
_GLUONS = {ours: own for own, ours in _OURS.items()}


def swap(net: Any, implementation: str | None = None) -> list[str]:
    """Replace every BatchNorm and BatchNormReLU of the net by ours, in place, and return the names of those replaced.

    Each block stays the same object with the same Parameters, prefix, hooks and hybridization; only its class changes. So
    whatever refers to it (an attribute, a shared block, a Trainer, a name in a checkpoint) continues to work. Traced graphs are
    traced again. ``unswap`` undoes all of it.

    A UserWarning names the blocks that stay as they are, with the reason: subclasses of Gluon's blocks, such as SyncBatchNorm,
    which may compute something else, and SymbolBlocks, whose graphs are fixed.

    Args:
        implementation: of every BatchNorm, including those that were ours before: see ``BatchNorm``. None means "auto", and
            leaves those that were ours alone.

    Raises:
        ValueError: a block has parameters that the specification does not allow, such as eps 0, or the implementation is unknown;
            nothing is swapped then.

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

    Undoes ``swap``: the blocks and Parameters stay the same objects. Blocks that were built as ours become MXNet's own too,
    without what only ours have (``implementation``, ``init``). ``multibn_mxnet.BatchNorm`` has no counterpart in MXNet and stays.

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
    """Every block of the net once, in order."""
    blocks: list[Any] = []
    net.apply(blocks.append)
    return list({id(block): block for block in blocks}.values())


def _trace_again(blocks: list[Any]) -> None:
    for block in blocks:
        if isinstance(block, gluon.HybridBlock) and not isinstance(block, gluon.SymbolBlock):
            block._clear_cached_op()


def _why_not(block: Any) -> str:
    """Why a block that has BatchNorm in it cannot be swapped, or nothing."""
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
