"""A synchronised layer as a function of PyTorch tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from multibn.layer.types import Array
from multibn.sync import passes
from multibn.sync.passes import Peers, Statistics, SyncSettings
from multibn_torch.forward.eager import looked_through, output_like, recomputed

from . import operators


class Update(NamedTuple):
    """The state that a forward updates."""

    mean: Tensor
    var: Tensor
    batches: Tensor


class Job(NamedTuple):
    """What a forward is told besides its tensors."""

    peers: Peers
    how: SyncSettings
    moving: tuple[Tensor, Tensor] | None
    """What normalises where the batch's statistics do not."""
    update: Update | None
    poisoned: list[int]
    """Gets the channels whose moving statistics were left as they were (BN-11)."""


def synchronised(x: Tensor, gamma: Tensor | None, beta: Tensor | None, job: Job) -> Tensor:
    """y; the moving statistics are updated in place, once (SY-05)."""
    needs = torch.is_grad_enabled() and x.requires_grad
    y: Tensor = _Synchronised.apply(x, gamma, beta, job, needs)  # type: ignore[no-untyped-call]
    return y


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, job: Job, needs: bool) -> Tensor:
        again = recomputed()
        which = "forward of a recomputation" if again else "forward"
        moving = None if job.moving is None else tuple(t.numpy(force=True) for t in job.moving)
        if x.is_cpu:
            x = _dense(x)
            batch = passes.describe(_by_channel(x), job.peers, job.how, needs, which, torch.get_num_threads(), moving)  # type: ignore[arg-type]
            y = output_like(x)
            passes.normalise(_by_channel(x), _by_channel(y), _numpy(gamma), _numpy(beta), batch.saved, torch.get_num_threads())
        else:
            batch = operators.describe(x, job.peers, job.how, needs, which, moving)  # type: ignore[arg-type]
            y = operators.normalise(x, gamma, beta, batch.saved)
        if job.update is not None and not again and batch.m:
            _move(batch, job.update, job.poisoned)
        ctx.save_for_backward(x, gamma)
        ctx.kept = batch, job.peers, beta is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma = ctx.saved_tensors
        batch, peers, has_beta = ctx.kept
        if looked_through(dy):
            raise RuntimeError(
                "SyncBatchNorm has no second derivative, and vmap cannot map over its backward: each rank would need those of "
                "all others. For gradient penalties use BatchNorm2d, with statistics of each rank's own samples."
            )
        needs = ctx.needs_input_grad[0]
        threads = torch.get_num_threads()
        dx: Tensor | None = None
        if x.is_cpu:
            dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
            found = passes.gradients(_by_channel(x), _by_channel(dy), _numpy(gamma), batch, peers, needs, threads)
            if found.means is not None:
                dx = output_like(x)
                passes.propagate(_by_channel(x), _by_channel(dy), _by_channel(dx), found.means, batch, threads)
        else:
            found = operators.gradients(x, dy, gamma, batch, peers, needs)
            if found.means is not None:
                dx = operators.propagate(x, dy, found.means, batch)
        dgamma, dbeta = (torch.from_numpy(a).to(x.device) for a in (found.dgamma, found.dbeta))
        return dx, None if gamma is None else dgamma, dbeta if has_beta else None, None, None


def _move(batch: Statistics, update: Update, poisoned: list[int]) -> None:
    mean, var = (t.numpy(force=True) for t in update[:2])
    left = passes.move(batch, mean, var)
    poisoned += [c for c in left if not np.isfinite(batch.variance[c])]  # else a moving statistic is too large for its type
    for t, new in zip(update, (mean, var), strict=False):
        if not t.is_cpu:
            t.copy_(torch.from_numpy(new))
    update.batches.add_(1)


def _dense(x: Tensor) -> Tensor:
    """x itself where its memory is NC... or channels-last, else a copy in NC... order."""
    x = x.detach().resolve_neg()
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _by_channel(x: Tensor) -> Array:
    """The memory of a dense tensor as (N, C, S), halves as their bits; S is 1 for channels-last memory."""
    n, c = x.shape[:2]
    size = x.numel()
    x = x.detach()
    shape = (n, c, size and size // (n * c)) if x.is_contiguous() else (size // c, c, 1)
    flat = x.as_strided((size,), (1,))
    if x.dtype in _BITS:
        return flat.view(torch.int16).numpy().view(_BITS[x.dtype]).reshape(shape)
    return flat.numpy().reshape(shape)


_BITS = {torch.float16: np.int16, torch.bfloat16: np.uint16}


def _numpy(t: Tensor | None) -> Array | None:
    return None if t is None else t.detach().numpy()
