"""Checks of a layer's input, with the messages that all layers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .types import PARAMETER_TYPE, Array, values_per_channel


class Objection(NamedTuple):
    """Why an input is refused; each backend raises the exception class that its framework uses for the kind."""

    kind: Literal["rank", "channels", "input type", "parameter type", "one value"]
    message: str


def objection(
    shape: Sequence[int],
    dtype: str,
    *,
    num_features: int,
    ranks: Sequence[int] | None = None,
    channel_axis: int = 1,
    needs_batch: bool = False,
    parameters: Mapping[str, tuple[Sequence[int], str]] | None = None,
    cast: str = "Cast the layer or the input so that they match.",
) -> Objection | None:
    """Check an input; return what is wrong with it, or None.

    Args:
        shape, dtype: of the input; dtype is NumPy's name, or "bfloat16".
        num_features: number of channels of the layer.
        ranks: ranks that the layer accepts; None for any >= 2 (BN-01).
        channel_axis: may be negative.
        needs_batch: whether this forward uses batch statistics (``BatchNormSpec.uses_batch``).
        parameters: name -> (shape, dtype) of gamma, beta and the moving statistics.
        cast: what to do about parameters of the wrong type, for the message.
    """
    shape = tuple(shape)
    rank = len(shape)
    if rank < 2 or (ranks is not None and rank not in ranks):
        wanted = "of rank >= 2" if ranks is None else "of rank " + " or ".join(map(str, ranks))
        return Objection(
            "rank",
            f"expected input {wanted}, got rank {rank}, shape {shape} (BN-01). The axes are batch, channel, then space; "
            "reshape the input, or use the layer made for its rank.",
        )
    if not -rank <= channel_axis < rank:
        return Objection(
            "rank",
            f"channel_axis must be from {-rank} to {rank - 1} for input of shape {shape}, got {channel_axis} (BN-01). "
            "Give the axis that counts the features.",
        )
    channels = shape[channel_axis]
    if channels != num_features:
        return Objection(
            "channels",
            f"expected {num_features} channels on axis {channel_axis}, got {channels} in input of shape {shape} (BN-01). "
            f"Build the layer with {channels} features, or move the channel axis of the input.",
        )
    if dtype not in PARAMETER_TYPE:
        return Objection(
            "input type",
            f"expected input of type {', '.join(PARAMETER_TYPE)}, got {dtype} (BN-10). Convert the input to float32 first.",
        )
    for name, (its_shape, its_dtype) in (parameters or {}).items():
        if tuple(its_shape) != (num_features,):
            return Objection(
                "channels",
                f"{name} must have shape ({num_features},), one value per channel, got {tuple(its_shape)} (BN-01). "
                "Give one value for each index of the channel axis.",
            )
        if its_dtype != PARAMETER_TYPE[dtype]:
            return Objection(
                "parameter type",
                f"{name} must be {PARAMETER_TYPE[dtype]} for {dtype} input, got {its_dtype} (BN-10). {cast}",
            )
    if needs_batch and values_per_channel(shape, channel_axis) == 1:
        return Objection(
            "one value",
            f"Expected more than 1 value per channel when training, got input of shape {shape} (BN-12). One value is its own "
            "mean, so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference.",
        )
    return None


def plain(name: str, array: Any) -> Array:
    """A NumPy array in the machine's byte order and of no subclass: the array itself, or a view or copy of one that is otherwise.

    Raises:
        TypeError: it is no NumPy array, or a masked one.
    """
    if type(array) is not np.ndarray:
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name} must be a NumPy array without a mask, got {type(array).__name__}. Convert it with numpy.asarray first."
            )
        array = array.view(np.ndarray)
    its: Array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return its


def check_writable(**arrays: Array) -> None:
    """Raise ValueError if one of the arrays, which a layer updates in place, is read-only, or two of them share memory."""
    names = list(arrays)
    for i, name in enumerate(names):
        if not arrays[name].flags.writeable:
            raise ValueError(f"{name} is updated in place, but is read-only. Give the layer an array that it may write to.")
        for other in names[i + 1 :]:
            if np.may_share_memory(arrays[name], arrays[other]):
                raise ValueError(f"{name} and {other} are updated in place, but share memory. Give each an array of its own.")
