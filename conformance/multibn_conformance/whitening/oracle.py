"""The exact values of whitening, derived a second time: 80 digits, and differentiated by a tape of matrix operations.

No eigenvalue is differentiated, and no closed form of a gradient is written down. S^(-1/2) comes from the iteration of Denman and
Beavers, which is made of inverses; an eigenvector from inverse iteration. Both converge so fast that their derivatives do too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from mpmath.ctx_mp import MPContext

from multibn.layer.types import Array
from multibn.whitening.spec import WhiteningSpec
from multibn_conformance.oracle.exact import Exact
from multibn_conformance.oracle.tape import Recorded, differentiate

from .case import WhiteningCase, state

_digits = MPContext()
_digits.dps = 80
_numbers = np.frompyfunc(lambda value: _digits.mpf(value), 1, 1)
_nearest = np.frompyfunc(float, 1, 1)


class Node(Recorded):
    """A matrix of numbers of 80 digits."""

    def __matmul__(self, other: Node) -> Node:
        a, b = self.value, other.value
        return Node(a.dot(b), (self, lambda g: g.dot(b.T)), (other, lambda g: a.T.dot(g)))

    @property
    def T(self) -> Node:
        """The transpose."""
        return Node(self.value.T, (self, lambda g: g.T))

    def inverse(self) -> Node:
        """The inverse of a square matrix."""
        n = len(self.value)
        made = np.array((_digits.matrix(self.value.tolist()) ** -1).tolist(), object).reshape(n, n)
        return Node(made, (self, lambda g: -made.T.dot(g).dot(made.T)))

    def inverse_root(self) -> Node:
        """1/sqrt of a number, (1, 1)."""
        root = 1 / _digits.sqrt(self.value[0, 0])
        return Node(np.array([[root]], object), (self, lambda g: g * root**3 / -2))


def constant(a: Array) -> Node:
    """A matrix of floats, which are exact numbers."""
    return Node(np.asarray(_numbers(a.astype(np.float64)), object).reshape(a.shape))


def _stack(rows: list[Node]) -> Node:
    def its(i: int) -> Callable[[Array], Array]:
        return lambda g: g[i : i + 1]

    return Node(np.concatenate([row.value for row in rows]), *((row, its(i)) for i, row in enumerate(rows)))


def whitening_matrix(covariance: Node, spec: WhiteningSpec) -> Node:
    """W of WH-03."""
    d = len(covariance.value)
    one = constant(np.eye(d))
    s = covariance + one * constant(np.array([[spec.eps]]))
    if spec.kind == "pca":
        return _principal(s)
    trace = constant(np.ones((1, d))) @ (s * one) @ constant(np.ones((d, 1)))
    by_trace = trace.inverse_root()
    normalised = s * by_trace * by_trace
    if spec.kind == "newton":
        p = one
        for _ in range(spec.steps):
            p = p * constant(np.array([[1.5]])) - p @ p @ p @ normalised * constant(np.array([[0.5]]))
        return p * by_trace
    half = constant(np.array([[0.5]]))
    y, z, settled = normalised, one, 0
    while settled < 3:  # twice more, for the derivatives
        last = z
        y, z = (y + z.inverse()) * half, (z + y.inverse()) * half
        settled += bool(np.max(np.abs(z.value - last.value)) < _digits.mpf(10) ** -60 * np.max(np.abs(z.value)))
    return z * by_trace


def _principal(s: Node) -> Node:
    """Rows u/sqrt(l): each eigenvector by inverse iteration from float64's, at a fixed distance from float64's eigenvalue."""
    eigenvalues, vectors = np.linalg.eigh(np.asarray(_nearest(s.value), np.float64))
    d, rows = len(eigenvalues), []
    for i in range(d - 1, -1, -1):
        gap = min((abs(eigenvalues[i] - other) for j, other in enumerate(eigenvalues) if j != i), default=1.0)
        away = eigenvalues[i] + 1e-9 * gap
        resolvent = (s - constant(away * np.eye(d))).inverse()
        u = constant(vectors[:, i : i + 1])
        for _ in range(12):
            u = resolvent @ u
            u = u * (u.T @ u).inverse_root()
        sizes = np.abs(u.value[:, 0])
        if u.value[np.argmax(sizes >= max(sizes) / 2), 0] < 0:
            u = u * constant(-np.ones((1, 1)))
        rows.append(u.T * (u.T @ s @ u).inverse_root())
    return _stack(rows)


class Facts(NamedTuple):
    """What the bounds of a group depend on, in float64.

    Args:
        x, dy: (d, m); dy is None before a backward.
        gamma, beta, mean: (d,).
        covariance: that whitened, (d, d).
        from_batch: whether gradients flow through it.
    """

    x: Array
    dy: Array | None
    gamma: Array
    beta: Array
    mean: Array
    covariance: Array
    from_batch: bool


class Update(NamedTuple):
    """One update of a group's moving statistics: the old value's weight, the batch, and mean and covariance after it."""

    weight: float
    facts: Facts
    moving_mean: Array
    moving_covariance: Array


class Expected(NamedTuple):
    """What a step gives: each name with its value (None: there is none), and what the bounds depend on."""

    values: dict[str, Exact | None]
    facts: tuple[Facts, ...]
    updates: tuple[tuple[Update, ...], ...]


@cache
def expected(case: WhiteningCase) -> tuple[Expected, ...]:
    """What each step of a case gives, exactly; nothing where it must be refused."""
    model, answers = _Model(case), []
    for step in case.steps:
        if step.do in ("train", "infer"):
            model.forward(step.data.array(), step.do == "train")
        elif step.do == "backward":
            model.backward(step.data.array())
        answers.append(model.answer(step.observe))
    return tuple(answers)


class _Model:
    """The layer by the clauses. A group with a NaN or Inf has NaN for all its values."""

    def __init__(self, case: WhiteningCase) -> None:
        self.spec, self.groups = case.spec, case.spec.groups
        gamma, beta, mean, covariance = state(case)
        c, d = case.features, case.features // self.groups
        self.gamma, self.beta = (
            [constant((np.full(c, other) if a is None else a)[i * d : (i + 1) * d, None]) for i in range(self.groups)]
            for a, other in ((gamma, 1.0), (beta, 0.0))
        )
        self.mean = [constant(mean[i * d : (i + 1) * d, None]).value for i in range(self.groups)]
        self.covariance = [constant(each).value for each in covariance]
        self.updates: list[tuple[Update, ...]] = [()] * self.groups
        self.facts: tuple[Facts, ...] = ()
        self.batches = 0
        self.x: list[Node] = []
        self.y: list[Node] = []

    def forward(self, x: Array, training: bool) -> None:
        self.shape = x.shape
        values = self._by_group(x)
        m = values.shape[2]
        self.finite = [bool(np.isfinite(each).all()) for each in values]
        training = training and m > 0
        weight = (
            _digits.mpf(self.spec.weight_of_old(0))
            if self.spec.momentum is not None
            else _digits.mpf(self.batches) / (self.batches + 1)
        )
        self.x, self.y, facts = [], [], list[Facts]()
        for i, each in enumerate(values):
            x_node = constant(np.where(np.isfinite(each), each, 0.0))
            mean, covariance = Node(self.mean[i]), Node(self.covariance[i])
            if training:
                portion = Node(np.array([[_digits.mpf(1) / m]], object))
                mean = x_node @ constant(np.ones((m, 1))) * portion
                centred = x_node - mean
                covariance = centred @ centred.T * portion
                if self.finite[i]:
                    self.mean[i] = weight * self.mean[i] + (1 - weight) * mean.value
                    self.covariance[i] = weight * self.covariance[i] + (1 - weight) * covariance.value
            y = whitening_matrix(covariance, self.spec) @ (x_node - mean) * self.gamma[i] + self.beta[i] if m else x_node
            self.x.append(x_node)
            self.y.append(y)
            gamma, beta, its_mean = (_round(part.value)[:, 0] for part in (self.gamma[i], self.beta[i], mean))
            facts.append(Facts(_round(x_node.value), None, gamma, beta, its_mean, _round(covariance.value), training))
        self.facts = tuple(facts)
        if training:
            for i, (f, fine) in enumerate(zip(facts, self.finite, strict=True)):
                made = Update(float(weight), f, _round(self.mean[i])[:, 0], _round(self.covariance[i]))
                self.updates[i] = (*self.updates[i], made) if fine else self.updates[i]
            self.batches += 1

    def backward(self, dy: Array) -> None:
        slopes = self._by_group(dy)
        self.facts = tuple(f._replace(dy=each.astype(np.float64)) for f, each in zip(self.facts, slopes, strict=True))
        parts = zip(self.y, self.x, self.gamma, self.beta, slopes, strict=True)
        if dy.size:
            self.gradients = [differentiate(y, constant(each).value) for y, _, _, _, each in parts]
        else:  # object arrays have no product over nothing
            self.gradients = [{of: of.value * 0 for of in (x, gamma, beta)} for _, x, gamma, beta, _ in parts]

    def answer(self, names: tuple[str, ...]) -> Expected:
        spec, values = self.spec, dict[str, Exact | None]()
        for name in names:
            if name == "y":
                values[name] = self._as_input([y.value for y in self.y])
            elif name == "dx":
                values[name] = self._as_input([its[x] for its, x in zip(self.gradients, self.x, strict=True)])
            elif name in ("dgamma", "dbeta"):
                of, there = (self.gamma, spec.scale) if name == "dgamma" else (self.beta, spec.center)
                parts = [its[each] for its, each in zip(self.gradients, of, strict=True)]
                if name == "dgamma":
                    parts = self._spoilt(parts)
                values[name] = _split(np.concatenate(parts)[:, 0]) if there else None
            elif name == "moving_mean":
                values[name] = _split(np.concatenate(self.mean)[:, 0])
            elif name == "moving_covariance":
                values[name] = _split(np.stack(self.covariance))
        return Expected(values, self.facts, tuple(self.updates))

    def _by_group(self, a: Array) -> Array:
        """(N, C, ...) as (groups, d, m)."""
        c = a.shape[1]
        return np.moveaxis(a, 1, 0).reshape(self.groups, c // self.groups, a.size // c)

    def _as_input(self, parts: list[Array]) -> Exact:
        """(d, m) of each group as (N, C, ...)."""
        rows = np.concatenate(self._spoilt(parts))
        return _split(np.moveaxis(rows.reshape(self.shape[1], self.shape[0], *self.shape[2:]), 0, 1))

    def _spoilt(self, parts: list[Array]) -> list[Array]:
        return [part if fine else part * _digits.mpf("nan") for part, fine in zip(parts, self.finite, strict=True)]


def _round(a: Array) -> Array:
    return np.asarray(_nearest(a), np.float64)


def _split(a: Array) -> Exact:
    high = _round(a)
    return Exact(high, _round(a - np.asarray(_numbers(high), object)))
