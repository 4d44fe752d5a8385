"""A BatchNorm of an MXNet checkpoint: what it computes, the attributes in the file, and properties of its stored values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec

from .operators import Call

ARRAYS: Final = ("gamma", "beta", "moving_mean", "moving_var")
"""The operator's inputs after x, in order."""

DEAD: Final = 1e-10
"""A channel with a smaller stored variance was (almost) constant in training, and eps determines its gain."""


@dataclass(frozen=True)
class StoredBatchNorm:
    """One BatchNorm of the graph.

    Args:
        name: of the node.
        module: the name in PyTorch.
        names: those of the four arrays in the file, in the order of ARRAYS.
        arrays: their values, float32.
        rank: of the input.
        axis: the channel axis, as in the file or by default.
        eps, momentum, fix_gamma, use_global_stats: as in the file or by default; momentum is the weight of the old value.
        written: the attributes in the file.
    """

    name: str
    module: str
    names: tuple[str, ...]
    arrays: tuple[Array, Array, Array, Array]
    rank: int
    axis: int
    eps: float
    momentum: float
    fix_gamma: bool
    use_global_stats: bool
    written: frozenset[str]

    @classmethod
    def of(cls, call: Call, module: str, names: tuple[str, ...], arrays: Any, rank: int) -> StoredBatchNorm:
        """The BatchNorm of a call."""
        s = call.settings
        axis, written = s["axis"], frozenset(call.node.attributes)
        return cls(
            call.node.name, module, names, tuple(arrays), rank, axis, s["eps"], s["momentum"], s["fix_gamma"],
            s["use_global_stats"], written,
        )  # fmt: skip

    @property
    def channels(self) -> int:
        """Length of the channel axis."""
        return len(self.arrays[1])

    def problems(self) -> list[str]:
        """Return why the layer cannot be ported; empty if it can."""
        found = []
        if not 2 <= self.rank <= 5:
            found.append(f"its input has rank {self.rank}; PyTorch's layers take 2 to 5")
        elif self.axis not in (1, 1 - self.rank):
            found.append(f"axis={self.axis}; in PyTorch the channels are on axis 1")
        if not self.eps > 0:
            found.append(f"eps={self.eps:g}; it must be > 0 (BN-03), or a constant channel divides by zero")
        if not 0 <= self.momentum <= 1:
            found.append(f"momentum={self.momentum:g}; it must be 0 to 1, the weight of the old value (BN-05)")
        shapes = [array.shape for array in self.arrays]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            of_each = ", ".join(f"{name} {shape}" for name, shape in zip(self.names, shapes, strict=True))
            found.append(f"its arrays must have one value per channel, got {of_each}")
        if (self.arrays[3] < 0).any():
            found.append(f"{self.names[3]} holds a negative variance, {self.arrays[3].min():g}")
        return [f"BatchNorm {self.name!r}: {each}." for each in found]

    @property
    def spec(self) -> BatchNormSpec:
        """The spec of what MXNet's operator computes on a CPU; with momentum 1, nothing is updated."""
        moves = self.momentum < 1
        return BatchNormSpec(
            eps=self.eps,
            momentum=self.momentum if moves else BatchNormSpec.momentum,
            moving_variance="biased",
            scale=not self.fix_gamma,
            normalize_with="moving" if self.use_global_stats else "batch",
            update_statistics=moves and not self.use_global_stats,
        )

    @cached_property
    def gamma(self) -> Array:
        """The effective gamma, float64: 1 if it is fixed."""
        return np.ones(self.channels) if self.fix_gamma else self.arrays[0].astype(np.float64)

    @cached_property
    def gain(self) -> Array:
        """The factor of the input in inference, per channel, float64."""
        gain: Array = self.gamma / np.sqrt(self.arrays[3].astype(np.float64) + self.eps)
        return gain

    @cached_property
    def kappa(self) -> Array:
        """The condition number of normalising, sqrt(1 + mean^2/(var+eps)), per channel (BN-16)."""
        mean, var = (array.astype(np.float64) for array in self.arrays[2:])
        kappa: Array = np.sqrt(1 + mean**2 / (var + self.eps))
        return kappa

    def facts(self) -> Mapping[str, Any]:
        """Return what a report says about the file, as plain values."""
        gamma, _, _, var = self.arrays
        return {
            "name": self.name,
            "module": self.module,
            "arrays": dict(zip(ARRAYS, self.names, strict=True)),
            "axis": self.axis,
            "rank": self.rank,
            "channels": self.channels,
            "eps": self.eps,
            "eps_written": "eps" in self.written,
            "momentum": {"mxnet": self.momentum, "written": "momentum" in self.written},
            "fix_gamma": self.fix_gamma,
            "fix_gamma_written": "fix_gamma" in self.written,
            "stored_gamma_off_one": float(np.abs(gamma.astype(np.float64) - 1).max(initial=0)),
            "use_global_stats": self.use_global_stats,
            "dead_channels": int((var < DEAD).sum()),
            "smallest_variance": float(var.min()),
            "largest_gain": float(np.abs(self.gain).max()),
            "kappa": float(self.kappa.max()),
        }
