"""What BatchNorm is: the numbered clauses, and the parameters that a layer may choose.

The clauses follow Ioffe & Szegedy, "Batch Normalization" (2015), section 3, and settle what frameworks leave open. Their
numbers are stable; docstrings, conformance cases and failure messages carry them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

LANES: Final = 2048
"""BN-15: a row (the values of one sample and channel) is cut into the fewest equal chunks of at most this many values."""

BLOCK: Final = 64
"""BN-15: this many chunks are added, position by position and in order, before the positions are folded in halves."""

JOINED: Final = 8
"""BN-15: joined samples are at most one in so many of the batch, for lanes that are used once cost more than they save."""

PIVOT: Final = 4
"""BN-15: the mean of so many chunks, the first of a block, is what the deviations of the block are taken from."""

CLAUSES: Final[Mapping[str, str]] = {
    "BN-01": "Input of rank >= 2 with a channel axis (default 1). All other axes are reduced; m values per channel.",
    "BN-02": "Batch statistics: mean = sum(x)/m, var = sum((x-mean)^2)/m, of the values as given, before any rounding.",
    "BN-03": "Normalise: xhat = (x-mean)/sqrt(var+eps). eps is inside the root, finite and > 0, and honoured however small.",
    "BN-04": "y = gamma*xhat + beta. scale=False: there is no gamma. center=False: there is no beta. Neither is overwritten.",
    "BN-05": (
        "Moving statistics: moving = momentum*moving + (1-momentum)*batch, with momentum the weight of the OLD value, "
        "0 <= momentum < 1; None: the equal-weight average of all batches so far, the initial state counting for nothing. "
        "Once per training forward: never in backward, never twice for one forward (activation recomputation included)."
    ),
    "BN-06": "The moving variance takes the biased batch variance, or the unbiased one (times m/(m-1)), as the spec says.",
    "BN-07": "In inference the moving statistics normalise, and nothing changes.",
    "BN-08": "Training gradients flow through mean and var. In inference they do not.",
    "BN-09": (
        "Three switches are independent: normalise with batch or moving statistics (the moving ones as they were before this "
        "forward); update them or not; learn gamma and beta or not."
    ),
    "BN-10": (
        "Types: float16, bfloat16, float32, float64 in, the same type out. Statistics and parameters are float32 for half "
        "inputs. Integers are refused."
    ),
    "BN-11": (
        "A NaN or Inf stays in its channel. A channel whose moving statistics would not be finite, in their type, after an "
        "update (so where the batch statistics are not) leaves both as they were."
    ),
    "BN-12": (
        "m = 0 in training: empty output, zero parameter gradients, no update of any kind. m = 1 in training, where batch "
        "statistics are used: an error that says why and what to do."
    ),
    "BN-13": "State round-trips: names, values, mode; it follows the layer across devices and types.",
    "BN-14": (
        "Memory layout and strides (channels_last, slices, transposes) do not change the meaning: the same values give the "
        "same result within BN-16. Equal bits across memory layouts are not promised."
    ),
    "BN-15": (
        "Reproducible: on CPU the same input gives the same bits in NumPy, PyTorch and MXNet, for every number of threads, in "
        "every run, and on every IEEE-754 machine. The order of summation is therefore part of the specification: samples of "
        f"C*S <= {LANES // 2} values are joined, {LANES}//(C*S) or N//{JOINED} at a time, whichever is less; each row of S "
        f"values lies in ceil(S/{LANES}) chunks of equal length (the last may be shorter); {BLOCK} chunks at a time are added "
        "position by position, the joined samples folded in halves, then the positions, then the sums of these blocks. "
        "Deviations are taken from the mean of the first "
        f"{PIVOT} chunks of their block, and moved to the mean of all when the blocks are put together. float64, no fast-math, "
        "no contraction."
    ),
    "BN-16": (
        "Accurate: |result - exact value of these formulas for the given inputs| <= 0.51 ulp of the output's type (1 ulp for "
        "float64) + 1e-14 * kappa * scale, with kappa = sqrt(1 + mean^2/var) and scale = |gamma| (+ |beta| for float64) for y, "
        "|gamma|*max|dy|/sqrt(var+eps) for dx, the sum of the absolute terms for dgamma and dbeta; for mean/std up to 1e6 and m "
        "up to 1e8. For float64, |gamma| counts max(1, |xhat|) times: a far outlier has float64's own roundings. Moving "
        "statistics: 0.51 ulp per update, and what float64 itself rounds in it."
    ),
}
"""The specification, clause by clause."""

_OTHER_NAMES: Final = {
    "epsilon": "eps",
    "variance_epsilon": "eps",
    "decay": "momentum",
    "decay_rate": "momentum",
    "moving_average_fraction": "momentum",
    "use_scale": "scale",
    "use_bias": "center",
    "use_global_stats": "normalize_with",
    "affine": "scale",
    "fix_gamma": "scale",
}


@dataclass(frozen=True)
class BatchNormSpec:
    """The parameters of one BatchNorm; ``repr`` prints the code that rebuilds it.

    Args:
        eps: added to the variance inside the root (BN-03); finite and > 0, however small. The article uses 1e-12.
        momentum: weight of the OLD moving statistics (BN-05), 0 <= momentum < 1, or None for the equal-weight average of
            all batches. 0.9 in MXNet means this 0.9. PyTorch's 0.1 is the weight of the NEW value, so it is 0.9 here; the
            0.1 of a PyTorch model given here is legal and forgets nine tenths of its state at every step.
        moving_variance: "biased" (sum/m, MXNet on CPU, Keras 3, Flax, ONNX) or "unbiased" (sum/(m-1), PyTorch, cuDNN) (BN-06).
        scale: whether there is a gamma (BN-04).
        center: whether there is a beta (BN-04).
        normalize_with: "batch" or "moving": the statistics that normalise in training (BN-09).
        update_statistics: whether a training forward updates the moving statistics (BN-09).
        learn_affine: whether gamma and beta get gradients (BN-09).

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value that is not allowed.

    >>> BatchNormSpec(momentum=0.99)
    BatchNormSpec(eps=1e-05, momentum=0.99, moving_variance='biased', scale=True, center=True, normalize_with='batch', \
update_statistics=True, learn_affine=True)
    """

    eps: float = 1e-5
    momentum: float | None = 0.9
    moving_variance: Literal["biased", "unbiased"] = "biased"
    scale: bool = True
    center: bool = True
    normalize_with: Literal["batch", "moving"] = "batch"
    update_statistics: bool = True
    learn_affine: bool = True

    def __post_init__(self) -> None:
        eps = _number("eps", self.eps, "a finite number > 0")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(
                f"eps must be a finite number > 0, got {self.eps!r} (BN-03). It is added to the variance inside the root. "
                "Frameworks that accept 0 divide by zero on a constant channel; use a small number, such as the article's 1e-12."
            )
        object.__setattr__(self, "eps", eps)
        if self.momentum is not None:
            momentum = _number("momentum", self.momentum, "a number with 0 <= momentum < 1, or None")
            if not 0 <= momentum < 1:
                raise ValueError(
                    f"momentum must be a number with 0 <= momentum < 1, or None, got {self.momentum!r} (BN-05). It is the weight "
                    "of the OLD value; PyTorch's and TensorFlow's fused operator's number is the weight of the new one, so use "
                    "1 minus it. For statistics that never move, use update_statistics=False."
                )
            object.__setattr__(self, "momentum", momentum)
        _one_of("moving_variance", self.moving_variance, ("biased", "unbiased"), "BN-06")
        _one_of("normalize_with", self.normalize_with, ("batch", "moving"), "BN-09")
        for name in ("scale", "center", "update_statistics", "learn_affine"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}.")

    @classmethod
    def article(cls, average: bool = False) -> BatchNormSpec:
        """The article's: eps 1e-12, momentum 0.9 of the old value, biased variance, gamma 1 and beta 0 to begin with.

        Args:
            average: the article's other way to the statistics of test time, its Algorithm 2: the equal-weight average over all
                batches, of the means and of the unbiased variances (times m/(m-1)).
        """
        return cls(1e-12, None, "unbiased") if average else cls(1e-12, 0.9, "biased")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BatchNormSpec:
        """The spec that ``to_dict`` described. Unknown names raise TypeError with the known ones."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                hint = f" {name!r} is another framework's word; see {_OTHER_NAMES[name]!r}." if name in _OTHER_NAMES else ""
                raise TypeError(f"BatchNormSpec has no parameter {name!r}; it has {', '.join(known)}.{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of numbers, strings and booleans, fit for JSON."""
        return asdict(self)

    def weight_of_old(self, batches: int) -> float:
        """The weight of the old moving statistics at the update that follows ``batches`` training batches (BN-05)."""
        return batches / (batches + 1) if self.momentum is None else self.momentum

    def uses_batch(self, training: bool) -> bool:
        """Whether a forward needs batch statistics, to normalise with or to update with (BN-09, BN-12)."""
        return training and (self.normalize_with == "batch" or self.update_statistics)


def _number(name: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}.")
    return float(value)


def _one_of(name: str, value: object, allowed: tuple[str, ...], clause: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r} ({clause}).")
