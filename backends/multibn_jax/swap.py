"""Put our layers in place of Flax's in a model."""

from __future__ import annotations

from flax import nnx

from .layer import BatchNorm, check_layer


def swap(model: nnx.Module) -> list[str]:
    """Make every ``flax.nnx.BatchNorm`` of the model ours, in place, and return the paths of those that were not.

    Each layer stays the same object, with the same state at the same paths; only its class changes. So optimizers, checkpoints
    and shared layers go on working. Subclasses may compute something else and are left alone, as are layers with ``axis_name``.

    Raises:
        ValueError: a layer has parameters that the specification forbids, such as epsilon 0; nothing is swapped then.

    >>> model = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    >>> swap(model)
    ['layers/1']
    """
    found = {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if type(node) is nnx.BatchNorm and node.axis_name is None
    }
    for path, layer in found.items():
        try:
            check_layer(layer)
        except ValueError as error:
            raise ValueError(f"{path or 'the model'}: {error}") from None
    for layer in found.values():
        layer.__class__ = BatchNorm
    return list(found)
