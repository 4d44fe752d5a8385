"""An Inductor pass on the joint graph of forward and backward, run before Inductor partitions the graph.

In float32 and float64 it writes multibn's operators as sums over the batch, which the kernel computes, and elementary operators
with the same bits, which Inductor fuses with their neighbours: a ReLU or another activation, a residual, pooling. In half types,
to which Inductor would round twice, it fuses a ReLU that is the only consumer of a layer's output into multibn's operators.
``convolutions`` keeps Inductor from copying what the convolutions in such a graph take in backward, and ``pooling`` computes the
gradients of its max-poolings.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config, ir, lowering
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.virtualized import V

from . import convolutions, pooling, reductions
from .elementary import Writer, can_be_elementary, is_call

aten = torch.ops.aten
FORWARD, BACKWARD = torch.ops.multibn.forward.default, torch.ops.multibn.backward.default
_RECTIFY = 12
"""Index of FORWARD's argument ``rectify``."""

STATISTICS, SUMS = torch.ops.multibn.statistics.default, torch.ops.multibn.sums.default

_FILES = ("inductor.py", "convolutions.py", "elementary.py", "pooling.py", "reductions.py")
"""The files on which a compiled program depends."""

counts = {"relu": 0, "training": 0, "inference": 0, "pooling": 0}
"""Number of changes in this process, for tests: layers with a fused ReLU, layers as elementary operators, max-poolings."""


class Fusion(CustomGraphPass):
    """The pass as an Inductor ``CustomGraphPass``, whose uuid is part of Inductor's cache key.

    Args:
        first: the user's own pass, which runs before; None if there is none.
    """

    def __init__(self, first: Any = None) -> None:
        self._first = first

    def __call__(self, graph: fx.Graph) -> None:
        """Apply the passes to the graph in place."""
        if self._first is not None:
            self._first(graph)
        layers = [node for node in graph.nodes if node.target is FORWARD]
        for node in layers:
            if node.args[1] is None and not _write_out(graph, node):
                while _fuse_relu(graph, node):
                    pass
        if layers:
            convolutions.replace(graph)
            counts["pooling"] += pooling.replace(graph)
            graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """Return what identifies the user's pass, and the hash of the files that say what this one does.

        None, with which Inductor caches nothing, if nothing identifies the user's.
        """
        mine = get_hash_for_files(tuple(str(Path(__file__).with_name(name)) for name in _FILES))
        if self._first is None:
            return mine
        theirs = self._first.uuid() if isinstance(self._first, CustomGraphPass) else None
        return None if theirs is None else (theirs, mine)


def install() -> None:
    """Let the pass run after the user's own; do so once per process."""
    given = config.joint_custom_post_pass
    if isinstance(given, (list, tuple)):
        if not any(isinstance(each, Fusion) for each in given):
            config.joint_custom_post_pass = [*given, Fusion()]
    elif not isinstance(given, Fusion):
        config.joint_custom_post_pass = Fusion(given)


def _fuse_relu(graph: fx.Graph, forward: fx.Node) -> bool:
    """Fuse a ReLU that is the only consumer of y: set ``rectify``, and remove the ReLU and the mask of its gradient."""
    outputs = _outputs(forward)
    y, statistics = outputs.get(0), outputs.get(1)
    relu = next(iter(y.users)) if y is not None and len(y.users) == 1 else None
    if y is None or relu is None or relu.target is not aten.relu.default:
        return False
    backwards = _backwards(statistics)
    if backwards is None:
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


def _write_out(graph: fx.Graph, forward: fx.Node) -> bool:
    """Replace a forward and its backwards by sums over the batch and elementary operators."""
    arguments: Any = forward.args
    backward: Any
    x, _, gamma, beta, mean, var, batches, eps, weight_of_old, unbiased, use_batch, update, rectify = arguments
    outputs = _outputs(forward)
    y, backwards = outputs.get(0), _backwards(outputs.get(1))
    if y is None or backwards is None or rectify or not can_be_elementary(x, beta):
        return False
    if update and not use_batch:  # backward would read the moving statistics anew, after the update
        return False
    frozen = config.freezing and not (use_batch or backwards)
    foldable = frozen and is_call(x, aten.convolution.default) and len(x.users) == 1
    with graph.inserting_before(forward):
        write = Writer(graph, x)
        if use_batch:
            statistics = write.statistics(eps, unbiased)
            if update:
                for i, new in enumerate(write.moved(statistics, mean, var, batches, weight_of_old)):
                    _replace(outputs.get(2 + i), new)
        normalised_by = (write.row(statistics, 0), write.row(statistics, 1)) if use_batch else write.constants(mean, var, eps)
        scale = write.scale(gamma, normalised_by[1])
        new = write.folded(normalised_by[0], scale, beta) if foldable else write.y(normalised_by[0], scale, beta)
        _replace(y, new)
        if backwards and not use_batch:
            statistics = write.stacked(*normalised_by)
    for backward in backwards:
        its, dy = _outputs(backward), backward.args[0]
        relu = next((user for user in new.users if is_call(user, aten.relu.default)), None)
        unmasked = None if relu is None or len(dy.users) > 1 else _masked(dy, relu)
        with graph.inserting_before(backward):
            sums = write.sums(dy if unmasked is None else unmasked, gamma, beta, statistics, unmasked is not None)
            _replace(its.get(0), write.dx(dy, normalised_by[0], scale, sums, bool(use_batch)))
            for i, new in enumerate(write.gradients(sums, backward.meta["val"][1].dtype)):
                _replace(its.get(1 + i), new)
    counts["training" if use_batch else "inference"] += 1
    return True


def _replace(node: fx.Node | None, new: fx.Node) -> None:
    if node is not None:
        node.replace_all_uses_with(new)


def _backwards(statistics: fx.Node | None) -> list[fx.Node] | None:
    """Return the backwards that use a forward's statistics; None if anything else uses them."""
    users = [] if statistics is None else [user for user in statistics.users if user.op != "output"]
    return users if all(user.target is BACKWARD for user in users) else None


def _masked(dy: Any, relu: fx.Node) -> fx.Node | None:
    """Return the gradient g if dy is g masked by relu > 0, else None."""
    if is_call(dy, aten.threshold_backward.default) and _through(dy.args[1]) is relu and dy.args[2] == 0:
        return dy.args[0]  # type: ignore[no-any-return]
    if is_call(dy, aten.where.self):
        le, zero, gradient = dy.args
        if is_call(le, aten.le.Scalar) and _through(le.args[0]) is relu and le.args[1] == 0 and _is_zero(zero):
            return gradient  # type: ignore[no-any-return]
    return None


def _outputs(node: fx.Node) -> dict[Any, fx.Node]:
    return {user.args[1]: user for user in node.users if is_call(user, operator.getitem)}


def _is_zero(node: Any) -> bool:
    return (is_call(node, aten.full.default) and node.args[1] == 0) or (
        is_call(node, aten.scalar_tensor.default) and node.args[0] == 0
    )


def _through(node: Any) -> Any:
    while is_call(node, aten.detach.default) or is_call(node, aten.alias.default):
        node = node.args[0]
    return node


def _lower_backward(dy: Any, x: Any, *others: Any) -> Any:
    return _fallback(BACKWARD, _laid_out_as(x, dy), x, *others)


def _lower_statistics(x: Any, eps: float, unbiased: bool) -> Any:
    if V.graph.cpp_wrapper:  # a C++ program, which cannot call a Python function
        return _fallback(STATISTICS, x, eps, unbiased)
    return ir.TensorBox.create(_Filled("fill_statistics", x, [x], eps=eps, unbiased=unbiased))


def _lower_sums(dy: Any, x: Any, gamma: Any, beta: Any, statistics: Any, rectify: bool) -> Any:
    dy = _laid_out_as(x, dy)
    if V.graph.cpp_wrapper:
        return _fallback(SUMS, dy, x, gamma, beta, statistics, rectify)
    given = [each for each in (dy, x, statistics, gamma, beta if rectify else None) if each is not None]
    return ir.TensorBox.create(_Filled("fill_sums", x, given, scaled=gamma is not None, rectify=rectify))


for _target, _lower in ((BACKWARD, _lower_backward), (STATISTICS, _lower_statistics), (SUMS, _lower_sums)):
    lowering.register_lowering(_target, type_promotion_kind=None)(_lower)


def _laid_out_as(x: Any, dy: Any) -> Any:
    """Make the operator that produces dy lay it out as x; else the kernel would copy dy to that layout."""
    x.realize()
    if isinstance(x.get_layout(), ir.FlexibleLayout):
        return dy
    return ir.ExternKernel.require_exact_strides(ir.ExternKernel.realize_input(dy), x.get_stride())


def _fallback(target: Any, *arguments: Any) -> Any:
    return lowering.fallback_handler(target, add_to_fallback_set=False)(*arguments)  # type: ignore[no-untyped-call]


class _Filled(ir.ExternKernelOut):
    """A tensor that the program allocates and a function of ``reductions`` fills."""

    def __init__(self, function: str, x: Any, given: list[Any], **options: Any) -> None:
        layout = ir.FixedLayout(x.get_device(), torch.float64, [reductions.ROWS, x.get_size()[1]])
        given = [ir.ExternKernel.realize_input(each) for each in given]
        super().__init__(layout, given, kwargs=options, python_kernel_name=f"multibn_reductions.{function}")

    def codegen(self, wrapper: Any) -> None:
        """Write the call, and the import that it needs, since a stored program may be run without being compiled again."""
        wrapper.add_import_once(f"import {reductions.__name__} as multibn_reductions")
        super().codegen(wrapper)


def _store(x: Any) -> Any:
    x.realize()
    return x


lowering.register_lowering(torch.ops.multibn.stored.default, type_promotion_kind=None)(_store)
