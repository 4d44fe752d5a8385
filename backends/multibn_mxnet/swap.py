"""Put our blocks in place of Gluon's in a net."""

from __future__ import annotations

from typing import Any

from mxnet import gluon

from .block import GluonBatchNorm, GluonBatchNormReLU, GluonNormalization, Normalization, check_implementation

_OURS = {gluon.nn.BatchNorm: GluonBatchNorm, gluon.nn.BatchNormReLU: GluonBatchNormReLU}


def swap(net: Any, implementation: str | None = None) -> list[str]:
    """Make every BatchNorm and BatchNormReLU of the net ours, in place, and return the names of those that were not.

    Each block stays the same object with the very same Parameters, prefix, hooks and hybridization; only its class changes, so
    whatever refers to it (an attribute, a shared block, a Trainer, a name in a checkpoint) goes on working. Subclasses of Gluon's
    blocks, such as SyncBatchNorm, may compute something else and are left alone. Graphs that were traced are traced again.

    Args:
        implementation: of every BatchNorm, those that were ours before included: see ``BatchNorm``. None is "auto", and leaves
            those that were ours alone.

    Raises:
        ValueError: a block has parameters that the specification does not allow, such as eps 0, or there is no such
            implementation; nothing is swapped then.

    >>> net = gluon.nn.HybridSequential(prefix="net_")
    >>> with net.name_scope():
    ...     net.add(gluon.nn.Conv2D(8, 3), gluon.nn.BatchNorm(), gluon.nn.Activation("relu"))
    >>> swap(net)
    ['net_batchnorm0']
    """
    if implementation is not None:
        check_implementation(implementation)
    blocks: list[Any] = []
    net.apply(blocks.append)
    found = {id(block): block for block in blocks if type(block) in _OURS}
    for block in found.values():
        try:
            GluonNormalization._describe(block)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{block.name}: {error}") from None
    for block in found.values():
        block.__class__ = _OURS[type(block)]
    for block in blocks:
        if implementation is not None and isinstance(block, Normalization):
            block.implementation = implementation
            block.forget_layer()
    for block in blocks:
        if isinstance(block, gluon.HybridBlock) and not isinstance(block, gluon.SymbolBlock):
            block._clear_cached_op()
    return [block.name for block in found.values()]
