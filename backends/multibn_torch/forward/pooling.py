"""Compute the gradient of a max-pooling as a sum over windows, in a graph with our layers.

Inductor 2.13 scatters (https://github.com/pytorch/pytorch/issues/195123): it adds each value of dy to a tensor of zeros at the
index of the maximum, one by one, in (N, C, H, W) order, to which it copies channels-last tensors. Here each value of dx is the
sum of dy over the windows of which it is the maximum: the same additions in the same order, as an elementary operation, which
Inductor vectorises along the channels.
"""

from __future__ import annotations

import math
from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import config, ir, lowering
from torch._inductor.virtualized import ops
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils._sympy.functions import FloorDiv

from .elementary import call, is_call

aten, prims = torch.ops.aten, torch.ops.prims

INDICES = "_low_memory_max_pool_offsets_to_indices"
"""Name of Inductor's operator that turns places in windows into indices of an image; not every PyTorch has it."""

torch.library.define(
    "multibn::max_pool2d_backward",
    "(Tensor dy, Tensor places, SymInt[2] kernel, SymInt[2] size, SymInt[2] stride, SymInt[2] padding) -> Tensor",
)

OURS = torch.ops.multibn.max_pool2d_backward.default
"""dx, (N, C, *size), of dy and of the place of each maximum in its window, counted row by row. Only Inductor computes it."""


@torch.library.register_fake("multibn::max_pool2d_backward")  # type: ignore[untyped-decorator]
def _(dy: Tensor, places: Tensor, kernel: Any, size: Any, stride: Any, padding: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:2], *size))


def replace(graph: fx.Graph) -> int:
    """Replace the gradients of max-poolings in float32 and float64 on the CPU; return how many there were."""
    if getattr(config, "fallback_by_default", False):  # Inductor calls operators instead of compiling them
        return 0
    found = 0
    for scatter in list(graph.nodes):
        given = _given_to_pooling(scatter) if scatter.target is aten.scatter_add.default else None
        if given is not None:
            with graph.inserting_before(scatter):
                dx = call(graph, scatter.meta["val"].fake_mode, OURS, *given)
            for user in list(scatter.users):
                user.replace_all_uses_with(dx)
            found += 1
    return found


def _given_to_pooling(scatter: Any) -> Any:
    """Return what ``OURS`` takes to compute ``zeros(N*C, H*W).scatter_add(1, indices, dy).view(N, C, H, W)``.

    None unless all users are such views, and the indices those of a max-pooling.
    """
    if len(scatter.args) != 4:  # written by a user's pass
        return None
    zeros, axis, *flat = scatter.args
    indices, dy = (_before_flattening(each) for each in flat)
    is_zero = is_call(zeros, aten.full.default) and zeros.args[1:] == (0,)
    if not is_zero or axis != 1 or str(indices.target) != f"prims.{INDICES}.default":
        return None
    places, kernel, size, stride, padding, dilation = indices.args
    if not all(isinstance(each, int) for each in (*kernel, *stride, *padding)) or dilation != [1, 1]:
        return None
    if not all(isinstance(each.meta.get("val"), Tensor) for each in (scatter, *flat, dy, places, *scatter.users)):
        return None
    value = dy.meta["val"]
    height, width = fx.map_arg(size, lambda each: each.meta["val"])
    n, c, *windows = value.shape
    shapes = [(places, value.shape), (scatter, (n * c, height * width)), *((each, (n * c, math.prod(windows))) for each in flat)]
    shapes += [(user, (n, c, height, width)) for user in scatter.users]
    if not value.is_cpu or value.dtype not in (torch.float32, torch.float64):
        return None
    if not all(is_call(user, aten.view.default) for user in scatter.users):
        return None
    return (dy, places, kernel, size, stride, padding) if all(_has(each, shape) for each, shape in shapes) else None


def _has(node: Any, shape: Any) -> bool:
    return statically_known_true(sym_eq(tuple(node.meta["val"].shape), tuple(shape)))


def _before_flattening(node: Any) -> Any:
    """Return what was copied to (N, C, H, W) order, if it was, and flattened to (N*C, H*W)."""
    return _input_of(_input_of(node, aten.view.default), aten.clone.default)


def _input_of(node: Any, target: Any) -> Any:
    return node.args[0] if is_call(node, target) else node


def _lower(dy: Any, places: Any, kernel: Any, size: Any, stride: Any, padding: Any) -> Any:
    places.realize()
    if places.get_stride()[1] != 1:  # along the rows of an image, there is nothing that Inductor could vectorise
        return _scatter(dy, places, kernel, size, stride, padding)
    dy = ir.ExternKernel.require_channels_last(ir.ExternKernel.realize_input(dy))
    dtype, shape, read_dy, read_place = dy.get_dtype(), dy.get_size(), dy.make_loader(), places.make_loader()
    most = [-(-k // s) for k, s in zip(kernel, stride, strict=True)]  # windows over one value, along each axis
    steps_back = list(product(*(reversed(range(n)) for n in most)))

    def dx(index: Any) -> Any:
        return reduce(ops.add, (of_window(index, steps) for steps in steps_back), ops.constant(0.0, dtype))

    def of_window(index: Any, steps: Any) -> Any:
        """Return what one of the windows over a value adds to it: the last one, or one that is some steps before."""
        window, place, is_over = list(index[:2]), 0, []
        for i, back, k, s, p, n in zip(index[2:], steps, kernel, stride, padding, shape[2:], strict=True):
            at = FloorDiv(i + p, s) - back
            inside = i + p - at * s
            window.append(at)
            place = place * k + inside
            is_over += [_holds(ops.ge, at, 0), _holds(ops.lt, at, n), _holds(ops.lt, inside, k)]

        def of_maximum() -> Any:
            is_maximum = ops.eq(ops.to_dtype(read_place(window), torch.int32), ops.index_expr(place, torch.int32))
            return ops.where(is_maximum, read_dy(window), ops.constant(0.0, dtype))

        return ops.masked(reduce(ops.and_, is_over), of_maximum, 0.0)

    return ir.Pointwise.create(device=dy.get_device(), dtype=dtype, inner_fn=dx, ranges=[*shape[:2], *size])


def _holds(relation: Any, a: Any, b: Any) -> Any:
    return relation(*(ops.index_expr(each, torch.int32) for each in (a, b)))


def _scatter(dy: Any, places: Any, kernel: Any, size: Any, stride: Any, padding: Any) -> Any:
    """Return dx as Inductor computes it."""
    lower, (n, c, *windows) = lowering.lowerings, dy.get_size()
    indices = lower[getattr(prims, INDICES).default](places, kernel, size, stride, padding, [1, 1])
    indices, dy = (lower[aten.view](each, [n * c, windows[0] * windows[1]]) for each in (indices, dy))
    zeros = lower[aten.full]([n * c, size[0] * size[1]], 0, dtype=dy.get_dtype(), device=dy.get_device())
    return lower[aten.view](lower[aten.scatter_add](zeros, 1, indices, dy), [n, c, *size])


lowering.register_lowering(OURS, type_promotion_kind=None)(_lower)
