"""A synchronised layer by PyTorch's operators, on any device, with the bits of the CPU kernel: int64 sums have no order (SY-02).

float32 and the half types take levels, as in ``multibn.sync.sums``, each channel its own and as many as its values need. float64
is added value by value, as integers. Only the limbs leave the device, for the message; all values stay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from multibn.layer.types import Array
from multibn.sync import passes
from multibn.sync.limbs import NARROW, WIDE, carry
from multibn.sync.passes import Gradients, Peers, Statistics, SyncSettings
from multibn.sync.sums import Sums, no_sums

_MASK = 0xFFFFFFFF
_LEVEL = 51
"""Bits of a level at most, as float64 has them."""


def describe(
    x: Tensor, peers: Peers, how: SyncSettings, needs: bool, which: str = "forward", moving: tuple[Array, Array] | None = None
) -> Statistics:
    """``passes.describe`` of a tensor."""
    return passes.describe_by(_summing(x, x), x.shape[1], _kind(x), _count(x), peers, how, needs, which, moving)


def normalise(x: Tensor, gamma: Tensor | None, beta: Tensor | None, saved: Array) -> Tensor:
    """``passes.normalise`` of a tensor: y."""
    mean, invstd = (_along(torch.from_numpy(a).to(x.device), x) for a in saved)
    scale = invstd if gamma is None else _along(gamma.double(), x) * invstd
    y = (x.double() - mean) * scale
    y = y + (0.0 if beta is None else _along(beta.double(), x))
    return _rounded(y, x.dtype)


def gradients(x: Tensor, dy: Tensor, gamma: Tensor | None, batch: Statistics, peers: Peers, needs: bool) -> Gradients:
    """``passes.gradients`` of tensors."""
    weight = None if gamma is None else gamma.detach().cpu().numpy()
    return passes.gradients_by(_summing(x, dy), x.shape[1], _kind(x), _count(x), weight, batch, peers, needs)


def propagate(x: Tensor, dy: Tensor, means: Array, batch: Statistics) -> Tensor:
    """``passes.propagate`` of tensors: dx."""
    offset, slope, scale = (_along(torch.from_numpy(a).to(x.device), x) for a in means)
    if not batch.how.use_batch:
        return _rounded(dy.double() * scale, x.dtype)
    mean = _along(torch.from_numpy(batch.saved[0]).to(x.device), x)
    return _rounded(((dy.double() - offset) - (x.double() - mean) * slope) * scale, x.dtype)


def _kind(x: Tensor) -> str:
    return "float64" if x.dtype == torch.float64 else "float32"


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _along(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *(1,) * (x.dim() - 2))


def _summing(x: Tensor, d: Tensor) -> Callable[[], Sums]:
    """The sums of d and of d*x, when asked for."""

    def sums() -> Sums:
        channels = x.shape[1]
        if x.numel() == 0:
            nothing = no_sums(_kind(x), channels)
            return Sums(nothing.values[0], nothing.products[0], nothing.bad[0])
        with torch.no_grad():
            by_channel = [t.detach().movedim(1, 0).reshape(channels, -1).double() for t in (x, d)]
            finite = by_channel[0].isfinite() & by_channel[1].isfinite()
            wide, values = (torch.where(finite, t, 0.0) for t in by_channel)
            bad = (~finite).sum(1)
            made = _one_by_one(wide, values) if x.dtype == torch.float64 else _by_levels(wide, values)
            its = Sums(made[0].cpu().numpy(), made[1].cpu().numpy(), bad.cpu().numpy())
        carry(its.values)
        carry(its.products)
        return its

    return sums


def _by_levels(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(C, limbs) sums of d and of d*x, both (C, m) float64 that hold float32 values."""
    (top_x, low_x), (top_d, low_d) = _exponents(x), _exponents(d)
    return (
        _limbs(d, top_d, int((top_d - low_d).max()), NARROW.values, NARROW.values_lowest),
        _limbs(d * x, top_x + top_d, int((top_x + top_d - low_x - low_d).max()), NARROW.products, NARROW.products_lowest),
    )


def _exponents(v: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) each: E with |v| < 2^E, and the exponent of the lowest bit that a value has."""
    size = v.abs()
    largest, smallest = size.amax(1), torch.where(size == 0, torch.inf, size).amin(1)
    top = torch.frexp(largest).exponent.long()
    low = torch.where(smallest.isinf(), top, torch.frexp(smallest).exponent.long() - 24).clamp(min=-149)
    return top, torch.minimum(low, top)


def _limbs(values: Tensor, top: Tensor, bits: int, count: int, lowest: int) -> Tensor:
    """The sums of values below 2^top, whose lowest bit lies at most ``bits`` below."""
    out = torch.zeros(values.shape[0], count, dtype=torch.int64, device=values.device)
    level = min(_LEVEL, 62 - values.shape[1].bit_length())
    while bits >= 0:
        unit = top - level
        magic = torch.ldexp(torch.full_like(unit, 1.5, dtype=torch.float64), unit + 52)[:, None]
        moved = values + magic
        whole = (moved.view(torch.int64) - magic.view(torch.int64)).sum(1)
        values = values - (moved - magic)
        _deposit(out, torch.arange(len(out), device=out.device), unit - lowest, whole)
        top, bits = unit - 1, bits - level - 1
    return out


def _deposit(out: Tensor, channels: Tensor, place: Tensor, values: Tensor) -> None:
    """Add int64 values, shifted to a bit of the limbs of their channels."""
    i, shift = place >> 5, place & 31
    low, high = (values & _MASK) << shift, (values >> 32) << shift
    at = channels * out.shape[1] + i
    flat = out.view(-1)
    for k, part in enumerate((low & _MASK, ((low >> 32) & 0x7FFFFFFF) + (high & _MASK), high >> 32)):
        flat.scatter_add_(0, at + k, part)


def _one_by_one(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(C, limbs) sums of d and of d*x, both (C, m) finite float64."""
    channels = torch.arange(len(x), device=x.device)[:, None].expand_as(x).reshape(-1)
    (a, e), (b, f) = (_taken_apart(t.reshape(-1)) for t in (d, x))
    values = torch.zeros(len(x), WIDE.values, dtype=torch.int64, device=x.device)
    products = torch.zeros(len(x), WIDE.products, dtype=torch.int64, device=x.device)
    _deposit(values, channels, e - WIDE.values_lowest, a)
    place = e + f - WIDE.products_lowest
    a1, a0, b1, b0 = a >> 26, a & 0x3FFFFFF, b >> 26, b & 0x3FFFFFF
    for shift, product in ((0, a0 * b0), (26, a0 * b1 + a1 * b0), (52, a1 * b1)):
        _deposit(products, channels, place + shift, product)
    return values, products


def _taken_apart(v: Tensor) -> tuple[Tensor, Tensor]:
    """Mantissa and exponent, int64, with v = mantissa * 2^exponent."""
    bits = v.view(torch.int64)
    exponent, mantissa = (bits >> 52) & 0x7FF, bits & ((1 << 52) - 1)
    mantissa = torch.where(exponent > 0, mantissa | (1 << 52), mantissa)
    return torch.where(bits < 0, -mantissa, mantissa), exponent.clamp(min=1) - 1075


def _rounded(v: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 rounded once. PyTorch goes to the half types by way of float32, which therefore is rounded to odd first."""
    if dtype in (torch.float32, torch.float64):
        return v.to(dtype)
    near = v.float()
    odd = torch.nextafter(near, torch.where(v > near, torch.inf, -torch.inf).float())
    inexact = (near.double() != v) & ~v.isnan() & near.isfinite() & ((near.view(torch.int32) & 1) == 0)
    return torch.where(inexact, odd, near).to(dtype)
