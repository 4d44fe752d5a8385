"""Keep Inductor from copying what a convolution takes in backward, in a graph with our layers.

To decide whether a graph is laid out channels-last, Inductor 2.13 looks for forward convolutions. A backward graph has none, so
Inductor may copy the gradient and the input of each ``aten.convolution_backward`` to another layout, and PyTorch copies those of
a depthwise convolution again (https://github.com/pytorch/pytorch/issues/189239). Here the operator takes both in the layout that
they have, as it did before https://github.com/pytorch/pytorch/pull/178945.
"""

from __future__ import annotations

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

ATEN = torch.ops.aten.convolution_backward.default

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
    for node in graph.nodes:
        if node.target is ATEN and all(_is_on_cpu(each) for each in node.all_input_nodes):
            node.target = OURS


def _is_on_cpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_cpu


_lowered: Any = fallback_handler(ATEN, add_to_fallback_set=False)  # type: ignore[no-untyped-call]
register_lowering(OURS, type_promotion_kind=None)(_lowered)
add_needs_realized_inputs(OURS)  # type: ignore[no-untyped-call]
add_layout_constraint(OURS, constrain_to_fx_strides)
