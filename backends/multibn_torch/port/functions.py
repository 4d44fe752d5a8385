"""MXNet's operators that PyTorch lacks, as functions that a ported graph calls.

Sizes come from the input, so that a ported graph accepts other shapes than at import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def reshape(x: Tensor, shape: Sequence[int], reverse: bool = False) -> Tensor:
    """MXNet's reshape: 0 keeps a size, -1 infers it, -2 keeps all remaining sizes, -3 merges two, -4 splits one in two."""
    sizes, codes = list(x.shape), list(shape)
    if reverse:
        sizes, codes = sizes[::-1], codes[::-1]
    out: list[int] = []
    at = i = 0
    while i < len(codes):
        code, i = codes[i], i + 1
        if code == -2:
            out += sizes[at:]
            at = len(sizes)
        elif code == -3:
            out.append(sizes[at] * sizes[at + 1])
            at += 2
        elif code == -4:
            first, second = codes[i : i + 2]
            i += 2
            first = sizes[at] // second if first == -1 else first
            out += [first, sizes[at] // first if second == -1 else second]
            at += 1
        else:
            out.append(sizes[at] if code == 0 else code)
            at += 1
    return x.reshape(out[::-1] if reverse else out)


def pool(
    x: Tensor, kind: str, kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int], full: bool, count_pad: bool
) -> Tensor:
    """Pool by either of MXNet's conventions: "valid" rounds the number of windows down, "full" up.

    Raises:
        RuntimeError: a window of "full" lies entirely in the padding; PyTorch omits it, MXNet does not.
    """
    if full:
        for size, k, s, p in zip(x.shape[2:], kernel, stride, pad, strict=True):
            if math.ceil((size + 2 * p - k) / s) * s >= size + p:
                raise RuntimeError(
                    f"pooling_convention='full' has a window in the padding alone for input of shape {tuple(x.shape)}, which "
                    "PyTorch leaves out. Change the size of the input."
                )
    dims = len(kernel)
    if kind == "max":
        of: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
        return of(x, kernel, stride, pad, ceil_mode=full)  # type: ignore[no-any-return]
    if kind == "avg":
        of = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
        return of(x, kernel, stride, pad, ceil_mode=full, count_include_pad=count_pad)  # type: ignore[no-any-return]
    if dims == 1:  # only the others have divisor_override
        return pool(x.unsqueeze(-1), kind, (*kernel, 1), (*stride, 1), (*pad, 0), full, count_pad).squeeze(-1)
    of = (F.avg_pool2d, F.avg_pool3d)[dims - 2]
    return of(x, kernel, stride, pad, ceil_mode=full, divisor_override=1)  # type: ignore[no-any-return]


def crop_like(x: Tensor, like: Tensor, offset: Sequence[int], center: bool) -> Tensor:
    """Crop x, (N, C, H, W), to the height and width of another."""
    height, width = like.shape[2:]
    top, left = ((x.shape[2] - height) // 2, (x.shape[3] - width) // 2) if center else offset
    if top < 0 or left < 0 or top + height > x.shape[2] or left + width > x.shape[3]:
        raise RuntimeError(f"the crop of {tuple(x.shape[2:])} at {(top, left)} to {(height, width)} leaves the input")
    return x[:, :, top : top + height, left : left + width]


def l2_normalize(x: Tensor, eps: float, mode: str) -> Tensor:
    """Return x / sqrt(sum(x^2) + eps), summed over all axes but the batch, over the channels, or over space."""
    dims = {"instance": range(1, x.dim()), "channel": (1,), "spatial": range(2, x.dim())}[mode]
    return x / torch.sqrt((x * x).sum(tuple(dims), keepdim=True) + eps)


def reduce(x: Tensor, kind: str, axis: Sequence[int] | None, keepdims: bool, exclude: bool) -> Tensor:
    """Return mean, sum, max or min over axes (all if empty), or with ``exclude`` over all others."""
    dims = tuple(a % x.dim() for a in axis) if axis else () if exclude else tuple(range(x.dim()))
    if exclude:
        dims = tuple(d for d in range(x.dim()) if d not in dims)
    of: Any = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}[kind]
    return of(x, dims, keepdim=keepdims)  # type: ignore[no-any-return]


def take(x: Tensor, begin: Sequence[int | None], end: Sequence[int | None], step: Sequence[int | None]) -> Tensor:
    """Return x[begin:end:step] of the first axes."""
    steps = [*step, *[None] * (len(begin) - len(step))]
    return x[tuple(slice(*each) for each in zip(begin, end, steps, strict=True))]


def take_axis(x: Tensor, axis: int, begin: int, end: int | None) -> Tensor:
    """Return x[begin:end] of one axis."""
    return x[(slice(None),) * (axis % x.dim()) + (slice(begin, end),)]


def split(x: Tensor, count: int, axis: int, squeeze: bool) -> tuple[Tensor, ...]:
    """Split into equal parts along an axis; with ``squeeze``, parts of length 1 lose that axis."""
    size = x.shape[axis]
    if size % count or (squeeze and size != count):
        raise RuntimeError(
            f"axis {axis} of {tuple(x.shape)} cannot be split into {count} {'single' if squeeze else 'equal'} parts"
        )
    parts = torch.split(x, size // count, axis)
    return tuple(part.squeeze(axis) for part in parts) if squeeze else parts
