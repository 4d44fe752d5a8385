"""``BatchNormSpec``: the parameters that a layer may choose, each checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from .parameters import one_of, real_number

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
        eps = real_number("eps", self.eps, "a finite number > 0")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(
                f"eps must be a finite number > 0, got {self.eps!r} (BN-03). It is added to the variance inside the root. "
                "Frameworks that accept 0 divide by zero on a constant channel; use a small number, such as the article's 1e-12."
            )
        object.__setattr__(self, "eps", eps)
        if self.momentum is not None:
            momentum = real_number("momentum", self.momentum, "a number with 0 <= momentum < 1, or None")
            if not 0 <= momentum < 1:
                raise ValueError(
                    f"momentum must be a number with 0 <= momentum < 1, or None, got {self.momentum!r} (BN-05). It is the weight "
                    "of the OLD value; PyTorch's and TensorFlow's fused operator's number is the weight of the new one, so use "
                    "1 minus it. For statistics that never move, use update_statistics=False."
                )
            object.__setattr__(self, "momentum", momentum)
        one_of("moving_variance", self.moving_variance, ("biased", "unbiased"), "BN-06")
        one_of("normalize_with", self.normalize_with, ("batch", "moving"), "BN-09")
        for name in ("scale", "center", "update_statistics", "learn_affine"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}.")

    @classmethod
    def article(cls, average: bool = False) -> BatchNormSpec:
        """Return the article's: eps 1e-12, momentum 0.9 of the old value, biased variance; gamma begins as 1 and beta as 0.

        Args:
            average: estimate the statistics of test time as the article's Algorithm 2: the equal-weight average over all batches
                of the means and of the unbiased variances (times m/(m-1)).
        """
        return cls(1e-12, None, "unbiased") if average else cls(1e-12, 0.9, "biased")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BatchNormSpec:
        """Return the spec that ``to_dict`` described; an unknown name raises TypeError, which lists the known ones."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                hint = f" {name!r} is another framework's word; see {_OTHER_NAMES[name]!r}." if name in _OTHER_NAMES else ""
                raise TypeError(f"BatchNormSpec has no parameter {name!r}; it has {', '.join(known)}.{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict of numbers, strings and booleans, fit for JSON."""
        return asdict(self)

    def weight_of_old(self, batches: int) -> float:
        """Return the weight of the old moving statistics in the update after ``batches`` training batches (BN-05)."""
        return batches / (batches + 1) if self.momentum is None else self.momentum

    def uses_batch(self, training: bool) -> bool:
        """Whether a forward needs batch statistics, to normalise or to update (BN-09, BN-12)."""
        return training and (self.normalize_with == "batch" or self.update_statistics)


def spec_text(spec: BatchNormSpec) -> str:
    """Return the parameters that differ from the defaults, for the repr of a layer: ``eps=1e-12, scale=False``."""
    default = BatchNormSpec()
    return ", ".join(
        f"{field.name}={getattr(spec, field.name)!r}"
        for field in fields(spec)
        if field.name in ("eps", "momentum") or getattr(spec, field.name) != getattr(default, field.name)
    )
