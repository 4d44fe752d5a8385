"""Convolutions' backward in a graph with our layers: it takes the gradient and the input in the layout that they have.

Inductor 2.13 copies both. By a graph's convolutions it decides whether to lay it out channels-last, finds none in a backward
graph, and lowers ``aten.convolution_backward`` for the other case (https://github.com/pytorch/pytorch/issues/189239); around a
depthwise convolution, PyTorch then copies them once more. Up to 2.12, Inductor did as this module does.
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
"""That of ``aten::convolution_backward``."""

torch.library.define("multibn::convolution_backward", SCHEMA)
torch.library.impl("multibn::convolution_backward", "CompositeImplicitAutograd")(ATEN)

OURS = torch.ops.multibn.convolution_backward.default
"""The same operator, by a name that Inductor has no lowering for."""


def replace(graph: fx.Graph) -> None:
    """Replace the backward of each convolution on the CPU, but for those to which a user's pass gives what has no value yet."""
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
