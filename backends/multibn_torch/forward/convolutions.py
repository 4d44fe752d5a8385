"""Keep Inductor from copying what a convolution takes in backward, in a graph with our layers.

To decide whether a graph is laid out channels-last, Inductor 2.13 looks for forward convolutions. A backward graph has none, so
Inductor may copy the gradient and the input of each ``aten.convolution_backward`` to another layout, and PyTorch copies those of
a depthwise convolution again (https://github.com/pytorch/pytorch/issues/189239). Here the operator takes both in the layout that
they have, as it did before https://github.com/pytorch/pytorch/pull/178945, except for large weights.

Inductor hands a weight to backward channels-last, so the operator copies its gradient to that layout, and autograd back to the
parameter's. Where the weight is at least as large as x and as dy, the operator takes contiguous tensors: copying them costs less.
"""

from __future__ import annotations

from functools import partial
from operator import getitem, is_not
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.lowering import (
    add_layout_constraint,
    add_needs_realized_inputs,
    constrain_to_fx_strides,
    fallback_handler,
    register_lowering,
)
from torch._subclasses.fake_tensor import FakeTensor

from .elementary import call, evaluate

aten = torch.ops.aten
ATEN = aten.convolution_backward.default

SCHEMA = (
    "(Tensor grad_output, Tensor input, Tensor weight, SymInt[]? bias_sizes, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)
"""The schema of ``aten::convolution_backward``."""

torch.library.define("multibn::convolution_backward", SCHEMA)
torch.library.impl("multibn::convolution_backward", "CompositeImplicitAutograd")(ATEN)

OURS = torch.ops.multibn.convolution_backward.default
"""The same operator under a name for which Inductor has no lowering of its own."""


def replace(graph: fx.Graph) -> None:
    """Replace the backward of each convolution whose inputs are known to be on the CPU.

    A node that a user's pass inserted may have no value from which to know; Inductor computes it later.
    """
    for node in list(graph.nodes):
        if node.target is ATEN and all(_is_on_cpu(each) for each in node.all_input_nodes):
            node.target = OURS
            if _is_large(node):
                _take_contiguous(graph, node)


def _is_large(node: Any) -> bool:
    """Return whether the node computes the gradient of a contiguous weight that is at least as large as x and as dy.

    In float32, in 2-D, ungrouped, of sizes known while compiling: that is what was measured. Not if x overlaps itself or is part
    of something larger, since dx cannot have its layout; nor in forward, where ``torch.func`` may compute gradients.
    """
    if node.meta.get("partitioner_tag") != "is_backward" or node.kwargs:
        return False
    if any(user.target is not getitem for user in node.users):  # written by a user's pass, as keyword arguments are
        return False
    *tensors, _, _, _, _, transposed, _, groups, (_, is_wanted, _) = node.args
    dy, x, weight = values = [each.meta["val"] for each in tensors]
    if not all(isinstance(each, FakeTensor) and all(isinstance(size, int) for size in each.shape) for each in values):
        return False
    is_measured = weight.dim() == 4 and weight.dtype == torch.float32 and groups == 1 and not transposed
    # a 1x1 weight has both layouts, and PyTorch does not copy its gradient
    is_contiguous = weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)
    is_large = weight.numel() >= max(dy.numel(), x.numel())
    is_dense = x.stride() == torch.empty_like(x).stride()
    return bool(is_wanted and is_measured and is_contiguous and is_large and is_dense)


def _take_contiguous(graph: fx.Graph, node: fx.Node) -> None:
    """Let the operator take contiguous tensors, and lay dx out as x."""
    x: Any = node.args[1]
    mode = x.meta["val"].fake_mode
    with graph.inserting_before(node):
        cloned = (call(graph, mode, aten.clone.default, each, memory_format=torch.contiguous_format) for each in node.args[:3])
        node.args = (*cloned, *node.args[3:])
    for each in node.all_input_nodes:
        each.meta["partitioner_tag"] = "must_be_in_backward"  # not made in forward and stored
    evaluate(node, mode)
    for user in list(node.users):
        evaluate(user, mode)
        if user.args[1] == 0:
            with graph.inserting_after(user):
                dx = call(graph, mode, aten.copy.default, x, user)
            user.replace_all_uses_with(dx, partial(is_not, dx))


def _is_on_cpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_cpu


_lowered: Any = fallback_handler(ATEN, add_to_fallback_set=False)  # type: ignore[no-untyped-call]
register_lowering(OURS, type_promotion_kind=None)(_lowered)
add_needs_realized_inputs(OURS)  # type: ignore[no-untyped-call]
add_layout_constraint(OURS, constrain_to_fx_strides)
