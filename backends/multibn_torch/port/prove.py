"""Run every ported BatchNorm and compare it with the results that follow from its stored bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from multibn.layer.types import Array
from multibn.port.batchnorm import ARRAYS, StoredBatchNorm
from multibn.port.proof import LINE, Batch, batch, errors_in_bounds, line
from multibn.spec.batchnorm import BatchNormSpec

STATES = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Proof:
    """The results of the proof of one ported BatchNorm.

    Args:
        bits: name of the array -> whether the layer has the same bits; for a fixed gamma, whether it has ones that are not
            learned.
        deviation: largest deviation in inference over all channels, as a fraction of the line's terms.
        training: result -> its error against MXNet's operator, divided by its bound; at most 1 if correct.
        reasons: differences in training, one sentence each.
    """

    bits: Mapping[str, bool]
    deviation: float
    training: Mapping[str, float]
    reasons: tuple[str, ...]

    @property
    def same_in_inference(self) -> bool:
        """Whether inference is the same for every input, up to float32 rounding."""
        return all(self.bits.values()) and self.deviation <= LINE

    @property
    def same_in_training(self) -> bool:
        """Whether y, gradients and moving statistics are the same for one batch."""
        return not self.reasons


def prove(bn: StoredBatchNorm, layer: Any) -> Proof:
    """Compare a ported layer with its stored bits: the arrays, inference, and one training step."""
    own = type(layer).__module__.startswith("torch.nn")
    training, reasons = _training(bn, layer, own)
    return Proof(_bits(bn, layer), _deviation(bn, layer), training, reasons)


def _bits(bn: StoredBatchNorm, layer: Any) -> dict[str, bool]:
    held = [np.asarray(getattr(layer, name).detach()) for name in STATES]
    same = {name: _same(a, b) for name, a, b in zip(ARRAYS, held, bn.arrays, strict=True)}
    if bn.fix_gamma:
        same["gamma"] = _same(held[0], np.ones(bn.channels, np.float32)) and not layer.weight.requires_grad
    return same


def _same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


def _deviation(bn: StoredBatchNorm, layer: Any) -> float:
    its = line(bn)
    double = copy.deepcopy(layer).double().eval()
    with torch.no_grad():
        y = double(torch.from_numpy(its.x).reshape(2, bn.channels, *[1] * (bn.rank - 2)))
    return float(its.deviation(y.reshape(2, -1).numpy()).max())


def _training(bn: StoredBatchNorm, layer: nn.Module, own: bool) -> tuple[dict[str, float], tuple[str, ...]]:
    its = batch(bn)
    got = step(layer, its, torch.float64 if own else torch.float32)
    found = errors_in_bounds(bn, bn.spec, its, got, double=own)
    if max(found.values()) <= 1:
        return found, ()
    if own and not bn.use_global_stats and _is(bn, replace(bn.spec, moving_variance="unbiased"), its, got):
        return found, (
            "torch.nn.BatchNorm keeps the unbiased variance: m/(m-1) of MXNet's on a CPU, for m values per channel. "
            "multibn's layers keep MXNet's.",
        )
    if own and bn.use_global_stats:
        batch_spec = replace(bn.spec, normalize_with="batch", update_statistics=bn.momentum < 1, moving_variance="unbiased")
        if _is(bn, batch_spec, its, got):
            return found, (
                "torch.nn.BatchNorm has no use_global_stats: train() normalises with the batch and moves the statistics. Keep it "
                "in eval(), or take multibn's layers.",
            )
    wrong = [name for name, value in found.items() if value > 1]
    return found, (f"{', '.join(wrong)}: not what the file's BatchNorm gives, and no known difference.",)


def _is(bn: StoredBatchNorm, spec: BatchNormSpec, its: Batch, got: Mapping[str, Array]) -> bool:
    return max(errors_in_bounds(bn, spec, its, got, double=True).values()) <= 1


def step(layer: nn.Module, its: Batch, dtype: torch.dtype) -> dict[str, Array]:
    """Run one training step of a copy of the layer; return y, gradients and moving statistics, without dgamma if gamma is not
    learned.
    """
    own: Any = copy.deepcopy(layer).to(dtype).train()
    for parameter in own.parameters():
        parameter.grad = None
    x = torch.from_numpy(its.x).to(dtype).requires_grad_()
    with torch.enable_grad():
        y = own(x)
        y.backward(torch.from_numpy(its.dy).to(dtype))
    found = {"y": y, "dx": x.grad, "dgamma": own.weight.grad, "dbeta": own.bias.grad}
    found |= {"moving_mean": own.running_mean, "moving_var": own.running_var}
    return {name: value.detach().numpy() for name, value in found.items() if value is not None}
