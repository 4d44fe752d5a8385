"""Write a layer into a graph as sums over the batch and elementary operators: the kernel's formulas, in its order, in float64.

Compiled without contraction, as Inductor compiles, they give the kernel's bits (BN-15).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

aten, prims = torch.ops.aten, torch.ops.prims

torch.library.define("multibn::stored", "(Tensor x) -> Tensor")


@torch.library.impl("multibn::stored", "CompositeExplicitAutograd")
def stored(x: Tensor) -> Tensor:
    """Return a copy of x. Inductor stores x here instead, so that it is not computed again for each of its readers."""
    return x.clone()


@torch.library.register_fake("multibn::stored")  # type: ignore[untyped-decorator]
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def can_be_elementary(x: fx.Node, beta: fx.Node | None) -> bool:
    """Return whether elementary operators give the kernel's bits.

    Not in half types, to which Inductor rounds float64 via float32, so twice; nor without beta, since Inductor would remove the
    addition of 0, which changes the sign of zeros; nor without values.
    """
    value = x.meta["val"]
    return value.is_cpu and value.dtype in (torch.float32, torch.float64) and beta is not None and 0 not in value.shape


def is_call(node: Any, target: Any) -> bool:
    """Return whether a node, or what stands in place of one, calls an operator."""
    return isinstance(node, fx.Node) and node.target is target


def call(graph: fx.Graph, mode: Any, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Append a call to the graph, with its value in a fake mode."""
    node = graph.call_function(target, args, kwargs)
    evaluate(node, mode)
    return node


def evaluate(node: fx.Node, mode: Any) -> None:
    """Set a node's value to what it gives for those of its inputs."""
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
    with mode:
        node.meta["val"] = target(*args, **kwargs)


class Writer:
    """Append nodes to a graph, where its ``inserting_before`` says.

    Args:
        graph: the first node is appended to it at once: x in float64, since Inductor's partitioner would store what is computed
            from x after the statistics, for backward, rather than compute it again.
        x: the layer's input, (N, C, ...).
    """

    def __init__(self, graph: fx.Graph, x: fx.Node) -> None:
        self._graph, self._x, self._value = graph, x, x.meta["val"]
        self._wide = self._double(x)

    def statistics(self, eps: float, unbiased: bool) -> fx.Node:
        """The rows of ``multibn::statistics``."""
        return self._call(torch.ops.multibn.statistics.default, self._x, eps, unbiased)

    def sums(self, dy: Any, gamma: Any, beta: Any, statistics: Any, rectify: bool) -> fx.Node:
        """The rows of ``multibn::sums``."""
        return self._call(torch.ops.multibn.sums.default, dy, self._x, gamma, beta if rectify else None, statistics, rectify)

    def gradients(self, sums: Any, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
        """Dgamma and dbeta."""
        return self._convert(self.row(sums, 3, False), dtype), self._convert(self.row(sums, 4, False), dtype)

    def moved(
        self, statistics: Any, mean: Any, var: Any, batches: Any, weight_of_old: float | None
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The new moving statistics and counter (BN-05, BN-06, BN-11)."""
        old: Any = weight_of_old
        if old is None:
            count = self._double(batches)
            old = self._call(aten.div.Tensor, count, self._call(aten.add.Tensor, count, 1))
        news = []
        for i, kept in enumerate((mean, var)):
            new = self.row(statistics, 2 + i, False)
            if weight_of_old is None:
                rest = self._call(aten.sub.Tensor, self._number(1.0), old)
                moved = self._call(aten.add.Tensor, self._mul(old, self._double(kept)), self._mul(rest, new))
                new = self._call(aten.where.self, self._call(aten.eq.Scalar, old, 0), new, moved)
            elif old != 0:
                new = self._call(
                    aten.add.Tensor,
                    self._call(aten.mul.Tensor, self._double(kept), old),
                    self._call(aten.mul.Tensor, new, 1 - old),
                )
            news.append(self._convert(new, kept.meta["val"].dtype))
        taken = self._call(aten.gt.Scalar, self.row(statistics, 4, False), 0)
        for new in news:
            taken = self._call(aten.logical_and.default, taken, self._finite(new))
        mean, var = (self._call(aten.where.self, taken, new, kept) for new, kept in zip(news, (mean, var), strict=True))
        happens = self._call(aten.select.int, self.row(statistics, 4, False), 0, 0)
        return mean, var, self._call(aten.add.Tensor, batches, self._convert(happens, batches.meta["val"].dtype))

    def constants(self, mean: Any, var: Any, eps: float) -> tuple[fx.Node, fx.Node]:
        """The mean and 1/sqrt(var+eps) of moving statistics, to broadcast with x; NaN where var is not finite."""
        var = self._double(var)
        invstd = self._call(aten.reciprocal.default, self._call(aten.sqrt.default, self._call(aten.add.Tensor, var, eps)))
        # NaN where var is not finite; without "where", which freezing does not fold
        invstd = self._call(aten.add.Tensor, invstd, self._call(aten.sub.Tensor, var, var))
        return self._along(self._double(mean)), self._along(invstd)

    def stacked(self, mean: Any, invstd: Any) -> fx.Node:
        """The statistics as (2, C)."""
        return self._call(aten.cat.default, [self._call(aten.view.default, each, [1, -1]) for each in (mean, invstd)])

    def scale(self, gamma: Any, invstd: Any) -> fx.Node:
        """Gamma/sqrt(var+eps), to broadcast with x. It is stored, since Inductor would else compute it for each value of x."""
        scale = invstd if gamma is None else self._mul(self._along(self._double(gamma)), invstd)
        return self._call(torch.ops.multibn.stored.default, scale)

    def y(self, mean: Any, scale: Any, beta: Any) -> fx.Node:
        """The output."""
        y = self._mul(self._call(aten.sub.Tensor, self._wide, mean), scale)
        return self._convert(self._call(aten.add.Tensor, y, self._along(self._double(beta))), self._value.dtype)

    def folded(self, mean: Any, scale: Any, beta: Any) -> fx.Node:
        """The output as a product and a sum in x's type, which Inductor folds into a convolution's weights as it freezes them."""
        shift = self._call(aten.sub.Tensor, self._along(self._double(beta)), self._mul(mean, scale))
        scale, shift = (self._convert(each, self._value.dtype) for each in (scale, shift))
        return self._call(aten.add.Tensor, self._mul(self._x, scale), shift)

    def dx(self, dy: Any, mean: Any, scale: Any, sums: Any, through: bool) -> fx.Node:
        """The gradient of x (BN-08). Unless batch statistics normalised (``through``), it needs no sums, so that Inductor leaves
        them out for a layer that learns nothing.
        """
        dx = self._double(dy)
        if through:
            scale = self.row(sums, 2)
            deviation = self._mul(self._call(aten.sub.Tensor, self._wide, mean), self.row(sums, 1))
            dx = self._call(aten.sub.Tensor, self._call(aten.sub.Tensor, dx, self.row(sums, 0)), deviation)
        return self._convert(self._mul(dx, scale), self._value.dtype)

    def row(self, rows: Any, i: int, along: bool = True) -> fx.Node:
        """A row of (rows, C), as it is or to broadcast with x."""
        row = self._call(aten.select.int, rows, 0, i)
        return self._along(row) if along else row

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(self._graph, self._value.fake_mode, target, *args, **kwargs)

    def _number(self, value: float) -> fx.Node:
        return self._call(aten.full.default, [], value, dtype=torch.float64, device=self._value.device)

    def _mul(self, a: Any, b: Any) -> fx.Node:
        return self._call(aten.mul.Tensor, a, b)

    def _finite(self, t: Any) -> fx.Node:
        return self._call(aten.lt.Scalar, self._call(aten.abs.default, t), math.inf)

    def _convert(self, t: Any, dtype: torch.dtype) -> fx.Node:
        return self._call(prims.convert_element_type.default, t, dtype)

    def _double(self, t: Any) -> fx.Node:
        return self._convert(t, torch.float64)

    def _along(self, t: Any) -> fx.Node:
        for _ in range(self._value.dim() - 2):
            t = self._call(aten.unsqueeze.default, t, -1)
        return t  # type: ignore[no-any-return]
