"""Description of a layer for the operator, and types of NDArrays."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any

import mxnet as mx
import numpy as np

from multibn.identity import Init
from multibn.layer.inputs import objection
from multibn.layer.types import Array, three_axes
from multibn.spec.batchnorm import BatchNormSpec


@dataclass(frozen=True)
class Description:
    """Description of a layer for the operator, stored as JSON (``attribute``) in graphs and exported files.

    Args:
        spec: what the layer computes.
        implementation: "auto", "kernel", "framework" or "composed"; the operator treats "composed" as "auto".
        axis: the channel axis; may be negative.
        rank: rank of the input; None for any rank >= 2.
        parameters: which of gamma and beta the layer has; the spec says whether the layer uses them (BN-04).
        init: initialization of gamma and beta: see ``multibn.identity``.
        within: whether the input, and so axis and rank, has an additional leading axis of length 1 (``in_graph``).
        peers: id of the processes that share the layer's batch, from ``operator.by_group.register``; 0 for none.
    """

    spec: BatchNormSpec
    implementation: str
    axis: int
    rank: int | None
    parameters: tuple[str, ...]
    init: Init = "standard"
    within: bool = False
    peers: int = 0

    def in_graph(self) -> Description:
        """Return the description for an operator whose input has an additional leading axis."""
        axis, rank = self.axis + (self.axis >= 0), None if self.rank is None else self.rank + 1
        return replace(self, axis=axis, rank=rank, within=True)

    def attribute(self) -> str:
        """Return the description as JSON."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)} | {"spec": self.spec.to_dict()})

    @classmethod
    def parse(cls, text: str) -> Description:
        """Parse the JSON that ``attribute`` returns."""
        values = json.loads(text)
        values["spec"] = BatchNormSpec.from_dict(values["spec"])
        values["parameters"] = tuple(values["parameters"])
        return cls(**values)

    @cached_property
    def _hash(self) -> int:
        return hash(self.attribute())

    def __hash__(self) -> int:
        return self._hash

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states, in the operator's order."""
        return ("running_mean", "running_var", "num_batches_tracked")[: 3 if self.spec.momentum is None else 2]

    def objection(
        self, shape: tuple[int, ...], dtype: str, training: bool, channels: int, parameters: dict[str, Any] | None = None
    ) -> str | None:
        """Check an input of the layer; return the error message, or None. See ``multibn.layer.inputs.objection``."""
        more = self.within
        problem = objection(
            shape[more:], dtype, num_features=channels, ranks=None if self.rank is None else (self.rank - more,),
            channel_axis=self.axis - (more and self.axis >= 0),
            needs_batch=self.spec.uses_batch(training) and not self.peers, parameters=parameters,
        )  # fmt: skip
        return None if problem is None else problem.message

    def by_channel(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape as (N, C, S): the axes before the channel axis, the channels, the axes after the channel axis."""
        return three_axes(shape, self.axis)


def as_numpy(array: Any) -> Array:
    """Return the values of an NDArray; bfloat16 as float32."""
    values: Array = (mx.nd.amp_cast(array, dtype="float32") if type_name(array) == "bfloat16" else array).asnumpy()
    return values


def type_name(array: Any) -> str:
    """Return the type of an NDArray by NumPy's name; MXNet represents bfloat16 as a structured dtype."""
    return _name(array.dtype)


@cache
def _name(kind: Any) -> str:
    dtype = np.dtype(kind)
    return dtype.names[0] if dtype.names else dtype.name
