"""What all layers share: the input they take, the messages when they refuse it, their text, and how a backend presents itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .spec import BatchNormSpec

if TYPE_CHECKING:
    from .whitening import WhiteningSpec

Array = NDArray[Any]

PARAMETER_TYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
"""Type of the input -> type of gamma, beta and the moving statistics (BN-10)."""


class Objection(NamedTuple):
    """Why an input is refused; a backend raises its framework's usual class for the kind, with the message."""

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
) -> Objection | None:
    """What is wrong with an input, or None.

    Args:
        shape, dtype: of the input; dtype by NumPy's name (or "bfloat16").
        num_features: channels the layer was built for.
        ranks: ranks that the layer takes; None for any >= 2 (BN-01).
        channel_axis: may be negative.
        needs_batch: whether this forward uses batch statistics (``BatchNormSpec.uses_batch``).
        parameters: name -> (shape, dtype) of gamma, beta and the moving statistics.
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
                f"{name} must be {PARAMETER_TYPE[dtype]} for {dtype} input, got {its_dtype} (BN-10). "
                "Cast the layer or the input so that they match.",
            )
    if needs_batch and values_per_channel(shape, channel_axis) == 1:
        return Objection(
            "one value",
            f"Expected more than 1 value per channel when training, got input of shape {shape} (BN-12). One value is its own "
            "mean, so its variance is 0 and the output would be beta whatever the input. Use a larger batch, or inference.",
        )
    return None


def values_per_channel(shape: Sequence[int], channel_axis: int = 1) -> int:
    """m of the clauses: how many values one channel has."""
    axis = channel_axis % len(shape)
    return int(np.prod([n for i, n in enumerate(shape) if i != axis], dtype=np.int64))


class PoisonedBatch(RuntimeWarning):
    """A batch holds NaN or Inf: the moving statistics of the channels concerned do not take it in (BN-11)."""


def poisoned(layer: str, channels: Sequence[int]) -> str:
    """The text of that warning.

    Args:
        layer: its name and kind.
        channels: whose statistics are not finite.
    """
    some = ", ".join(map(str, channels[:5])) + (", ..." if len(channels) > 5 else "")
    return (
        f"{layer}: the batch statistics of {len(channels)} channel{'s'[: len(channels) > 1]} are not finite ({some}), since the "
        "input holds NaN or Inf there. The output is NaN there; the moving statistics stay as they were (BN-11). Look for the "
        "cause in what comes before this layer. It is said once for each layer."
    )


def poisoned_channels(x: Array, channel_axis: int = 1) -> list[int]:
    """The channels of a batch whose mean or variance is not finite."""
    values = np.moveaxis(x, channel_axis, 0).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        poisoned = ~np.isfinite(values.var(axis=tuple(range(1, x.ndim))))
    return [int(channel) for channel in np.flatnonzero(poisoned)]


def spec_text(spec: BatchNormSpec) -> str:
    """The spec's parameters that differ from the defaults, for the text of a layer: ``eps=1e-12, scale=False``."""
    default = BatchNormSpec()
    return ", ".join(
        f"{field.name}={getattr(spec, field.name)!r}"
        for field in fields(spec)
        if field.name in ("eps", "momentum") or getattr(spec, field.name) != getattr(default, field.name)
    )


class Subject(Protocol):
    """Anything that claims to be a BatchNorm, as the conformance suite sees it. Arrays are NumPy, the channel axis is 1."""

    def load(self, gamma: Array | None, beta: Array | None, moving_mean: Array | None, moving_var: Array | None) -> None:
        """Set the state: 1-D arrays of length num_features, None where it has none. No batches seen yet."""

    def forward(self, x: Array, training: bool) -> Array:
        """y for x."""

    def backward(self, dy: Array) -> tuple[Array, Array | None, Array | None]:
        """(dx, dgamma, dbeta) of the last forward; None where it has none."""

    def moving(self) -> tuple[Array, Array]:
        """(moving_mean, moving_var) as they are now."""


Precision = Literal["exact", "working"]
"""How an implementation computes: within BN-16, or in the arithmetic of the input's type, whose bound is wider."""


@dataclass(frozen=True)
class Backend:
    """A home of BatchNorm, found by the conformance suite through the entry point group ``multibn.backends``.

    Args:
        name: as given to ``--backend``.
        versions: name -> version of the libraries that compute.
        implementations: name -> its precision. The first is the default one.
        devices: the devices that are present, such as ``("cpu",)``.
        make: ``make(num_features, spec, device, implementation)`` returns a Subject; spec None means its own defaults.
        whitening: the same for its whitening layer, whose Subject has a moving covariance in place of the variance; or None.
        no_whitening: names of implementations that its whitening layer does not have.
    """

    name: str
    versions: Mapping[str, str]
    implementations: Mapping[str, Precision]
    devices: Callable[[], Sequence[str]]
    make: Callable[[int, BatchNormSpec | None, str, str], Subject]
    whitening: Callable[[int, WhiteningSpec, str, str], Subject] | None = None
    no_whitening: Collection[str] = ()
