"""Inductor passes over the joint graph of forward and backward, before Inductor partitions it.

One fuses a ReLU that is the only consumer of a layer's output into multibn's operators: one pass over the data instead of two,
without a mask. The other replaces an inference in float32 or float64 by elementary operators with the same bits, which Inductor
fuses with the surrounding operators.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch._inductor import config, ir, lowering
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten
FORWARD, BACKWARD = torch.ops.multibn.forward.default, torch.ops.multibn.backward.default
_RECTIFY = 12
"""Index of FORWARD's argument ``rectify``."""

counts = {"relu": 0, "inference": 0}
"""Number of operators that each pass has changed in this process, for tests."""


class Fusion(CustomGraphPass):
    """The passes as an Inductor ``CustomGraphPass``, whose uuid is part of Inductor's cache key."""

    def __call__(self, graph: fx.Graph) -> None:
        """Apply the passes to the graph in place."""
        for node in list(graph.nodes):
            if node.target is FORWARD and node.args[1] is None and not _spell_out(graph, node):
                while _fuse_relu(graph, node):
                    pass
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """Return the hash of this file."""
        return get_hash_for_files((__file__,))


def install() -> None:
    """Append the passes to the user's own, once per process."""
    given = config.joint_custom_post_pass
    passes = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    if not any(isinstance(each, Fusion) for each in passes):
        config.joint_custom_post_pass = [*passes, Fusion()] if passes else Fusion()


def _fuse_relu(graph: fx.Graph, forward: fx.Node) -> bool:
    """Fuse a ReLU that is the only consumer of y: set ``rectify``, and remove the ReLU and the mask of its gradient."""
    outputs = _outputs(forward)
    y, statistics = outputs.get(0), outputs.get(1)
    relu = next(iter(y.users)) if y is not None and len(y.users) == 1 else None
    if y is None or relu is None or relu.target is not aten.relu.default:
        return False
    backwards = [] if statistics is None else [user for user in statistics.users if user.op != "output"]
    if any(user.target is not BACKWARD for user in backwards):
        return False
    gradients = [_masked(user.args[0], relu) for user in backwards]
    if any(gradient is None for gradient in gradients):
        return False
    forward.args = (*forward.args[:_RECTIFY], True)
    relu.replace_all_uses_with(y)
    graph.erase_node(relu)
    for user, gradient in zip(backwards, gradients, strict=True):
        _, x, mask, gamma, _, saved, through, _ = user.args
        user.args = (gradient, x, mask, gamma, forward.args[3], saved, through, True)
    counts["relu"] += 1
    return True


def _spell_out(graph: fx.Graph, forward: fx.Node) -> bool:
    """Replace an inference by elementary operators: the operations of the kernel's loop, in the same order, in float64.

    If the graph will be frozen, replace a layer after a convolution by a multiplication and an addition in the type of x, which
    Inductor folds into the convolution's weights.
    """
    arguments: Any = forward.args
    x, _, gamma, beta, mean, var, _, eps, _, _, use_batch, update, rectify = arguments
    outputs = _outputs(forward)
    y, value = outputs.get(0), x.meta["val"]
    if use_batch or update or y is None or any(outputs[i].users for i in outputs if i) or mean is None or beta is None:
        return False  # Inductor would remove the addition of a beta of 0, which changes the sign of zeros
    if value.dtype not in (torch.float32, torch.float64) or not value.is_cpu:
        return False  # Inductor rounds float64 to half precision via float32, which rounds twice

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        with value.fake_mode:
            node.meta["val"] = target(*(each.meta["val"] if isinstance(each, fx.Node) else each for each in args))
        return node

    def number(value: float) -> fx.Node:
        node = graph.call_function(aten.full.default, ([], value), {"dtype": torch.float64, "device": x.meta["val"].device})
        with x.meta["val"].fake_mode:
            node.meta["val"] = aten.full.default(*node.args, **node.kwargs)
        return node

    def double(t: Any) -> fx.Node:
        return call(torch.ops.prims.convert_element_type.default, t, torch.float64)

    def along(t: Any) -> fx.Node:
        for _ in range(value.dim() - 2):
            t = call(aten.unsqueeze.default, t, -1)
        return t  # type: ignore[no-any-return]

    with graph.inserting_before(forward):
        mean, var, beta = double(mean), double(var), double(beta)
        invstd = call(aten.reciprocal.default, call(aten.sqrt.default, call(aten.add.Tensor, var, eps)))
        finite = call(aten.lt.Scalar, call(aten.abs.default, var), math.inf)
        invstd = call(aten.where.self, finite, invstd, number(math.nan))
        scale = invstd if gamma is None else call(aten.mul.Tensor, double(gamma), invstd)
        if config.freezing and not rectify and _is(x, aten.convolution.default) and len(x.users) == 1:
            shift = call(aten.sub.Tensor, beta, call(aten.mul.Tensor, mean, scale))
            narrow = [along(call(torch.ops.prims.convert_element_type.default, t, value.dtype)) for t in (scale, shift)]
            new = call(aten.add.Tensor, call(aten.mul.Tensor, x, narrow[0]), narrow[1])
        else:
            new = call(aten.mul.Tensor, call(aten.sub.Tensor, double(x), along(mean)), along(scale))
            new = call(aten.add.Tensor, new, along(beta))
            if rectify:
                new = call(aten.where.self, call(aten.lt.Scalar, new, 0), number(0.0), new)
            new = call(torch.ops.prims.convert_element_type.default, new, value.dtype)
    y.replace_all_uses_with(new)
    counts["inference"] += 1
    return True


def _masked(dy: Any, relu: fx.Node) -> fx.Node | None:
    """Return the gradient g if dy is g masked by relu > 0, else None."""
    if _is(dy, aten.threshold_backward.default) and _through(dy.args[1]) is relu and dy.args[2] == 0:
        return dy.args[0]  # type: ignore[no-any-return]
    if _is(dy, aten.where.self):
        le, zero, gradient = dy.args
        if _is(le, aten.le.Scalar) and _through(le.args[0]) is relu and le.args[1] == 0 and _is_zero(zero):
            return gradient  # type: ignore[no-any-return]
    return None


def _outputs(node: fx.Node) -> dict[Any, fx.Node]:
    return {user.args[1]: user for user in node.users if _is(user, operator.getitem)}


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _is_zero(node: Any) -> bool:
    return (_is(node, aten.full.default) and node.args[1] == 0) or (_is(node, aten.scalar_tensor.default) and node.args[0] == 0)


def _through(node: Any) -> Any:
    while _is(node, aten.detach.default) or _is(node, aten.alias.default):
        node = node.args[0]
    return node


def _lower_backward(dy: Any, x: Any, *others: Any) -> Any:
    """Require dy in the layout of x from the operator that produces it; else the kernel would copy dy to that layout."""
    x.realize()
    if not isinstance(x.get_layout(), ir.FlexibleLayout):
        dy = ir.ExternKernel.require_exact_strides(ir.ExternKernel.realize_input(dy), x.get_stride())
    return lowering.fallback_handler(BACKWARD, add_to_fallback_set=False)(dy, x, *others)  # type: ignore[no-untyped-call]


lowering.register_lowering(BACKWARD, type_promotion_kind=None)(_lower_backward)
