"""The exact values of the formulas, derived independently: forward by the clauses with 60 digits, backward by differentiating it.

Nothing here comes from ``multibn.reference``, which is itself a subject, and no closed form of a gradient is written down: the
forward records its operations, and each operation knows its own derivative.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
from mpmath.ctx_mp import MPContext

from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import Case
from multibn_conformance.cases.inputs import state

from .bounds import Facts, Update
from .tape import Recorded, differentiate

_digits = MPContext()  # a context of our own: the precision of mpmath's users is untouched
_digits.dps = 60
_numbers = np.frompyfunc(lambda value: _digits.mpf(value), 1, 1)
_nearest = np.frompyfunc(float, 1, 1)


class Term(Recorded):
    """(C, m) numbers of elements or (C, 1) of channels."""

    def average(self) -> Term:
        """The mean of each channel, (C, 1)."""
        m = self.value.shape[1]
        return Term(self.value.sum(axis=1, keepdims=True) / m, (self, lambda g: np.repeat(g / m, m, axis=1)))

    def inverse_root(self) -> Term:
        """1/sqrt of each element; the derivative is -1/2 of its third power."""
        root = np.frompyfunc(lambda value: 1 / _digits.sqrt(value), 1, 1)(self.value)
        return Term(root, (self, lambda g: g * root**3 / -2))


class Exact(NamedTuple):
    """An exact value as the nearest float64 and what is missing from it: about 32 digits."""

    high: Array
    low: Array


class Expected(NamedTuple):
    """What a step gives: each name with its value (None: there is none), and what the bounds depend on."""

    values: dict[str, Exact | None]
    facts: Facts | None
    updates: dict[str, tuple[Update, ...]]


def channel_rows(a: Array) -> Array:
    """(N, C, ...) as (C, m)."""
    return np.moveaxis(a, 1, 0).reshape(a.shape[1], -1 if a.size else 0)


@cache
def expected(case: Case) -> tuple[Expected, ...]:
    """What each step of a case gives, exactly."""
    model = _Model(case.spec)
    model.load(state(case.features, case.dtype, 0, case.spec))
    answers = []
    for step in case.steps:
        if step.do == "load":
            assert step.values is not None
            model.load(state(case.features, step.values.dtype, step.values.seed, case.spec))
        elif step.do in ("train", "infer"):
            assert step.values is not None
            model.forward(step.values.array(), training=step.do == "train")
        elif step.do == "backward":
            assert step.values is not None
            model.backward(step.values.array())
        answers.append(model.answer(step.observe))
    return tuple(answers)


class _Model:
    """BatchNorm by the clauses, with exact moving statistics: they are never rounded, so that the bounds can count roundings."""

    def __init__(self, spec: BatchNormSpec) -> None:
        self.spec = spec

    def load(self, arrays: tuple[Array | None, Array | None, Array, Array]) -> None:
        gamma, beta, mean, var = arrays
        self.kind = mean.dtype
        c = len(mean)
        self.gamma = Term(_exactly(np.ones(c) if gamma is None else gamma)[:, None])
        self.beta = Term(_exactly(np.zeros(c) if beta is None else beta)[:, None])
        self.moving = {"moving_mean": _exactly(mean), "moving_var": _exactly(var)}
        self.updates: dict[str, tuple[Update, ...]] = {"moving_mean": (), "moving_var": ()}
        self.batches = 0
        self.facts: Facts | None = None

    def forward(self, x: Array, training: bool) -> None:
        spec = self.spec
        self.shape, self.dtype = x.shape, x.dtype.name
        self.x = Term(_exactly(channel_rows(x)))
        m = self.x.value.shape[1]
        mean, var = (Term(each[:, None]) for each in self.moving.values())
        batch_mean = batch_var = None
        self.from_batch = training and spec.normalize_with == "batch" and m > 0
        if spec.uses_batch(training) and m > 0:
            batch_mean = self.x.average()
            deviation = self.x - batch_mean
            batch_var = (deviation * deviation).average()  # BN-02
            if self.from_batch:
                mean, var = batch_mean, batch_var
        invstd = (var + Term(_exactly(np.full((1, 1), spec.eps)))).inverse_root()  # BN-03
        self.y = self.gamma * ((self.x - mean) * invstd) + self.beta  # BN-04
        estimate = None
        if batch_mean is not None and batch_var is not None:
            estimate = batch_var.value * m / (m - 1) if spec.moving_variance == "unbiased" else batch_var.value  # BN-06
        self.facts = Facts(
            x=channel_rows(x).astype(np.float64),
            dy=None,
            gamma=_round(self.gamma.value),
            beta=_round(self.beta.value),
            mean=_round(mean.value),
            var=_round(var.value),
            batch_mean=None if batch_mean is None else _round(batch_mean.value),
            batch_var=None if estimate is None else _round(estimate),
            eps=spec.eps,
            from_batch=self.from_batch,
            dtype=self.dtype,
        )
        if training and spec.update_statistics and batch_mean is not None and estimate is not None:
            self._move({"moving_mean": batch_mean.value[:, 0], "moving_var": estimate[:, 0]})

    def _move(self, batch: dict[str, Array]) -> None:
        """BN-05 and BN-11."""
        assert self.facts is not None
        equal = self.spec.momentum is None
        weight = _digits.mpf(self.batches) / (self.batches + 1) if self.spec.momentum is None else _digits.mpf(self.spec.momentum)
        moved = {name: weight * old + (1 - weight) * batch[name] if weight else batch[name] for name, old in self.moving.items()}
        limit = float(np.finfo(self.kind).max)
        made = np.logical_and(*(np.abs(_round(value)) <= limit for value in moved.values()))
        for name, old in self.moving.items():
            new = np.where(made, moved[name], old)
            kept = weight * old if weight else np.zeros_like(old)
            update = Update(float(weight), _round(kept), _round(batch[name]), _round(new), made, equal, self.facts)
            self.moving[name], self.updates[name] = new, (*self.updates[name], update)
        self.batches += 1

    def backward(self, dy: Array) -> None:
        assert self.facts is not None
        self.facts = replace(self.facts, dy=channel_rows(dy).astype(np.float64))
        self.gradients = differentiate(self.y, _exactly(channel_rows(dy)))

    def answer(self, names: tuple[str, ...]) -> Expected:
        values: dict[str, Exact | None] = {}
        for name in names:
            if name == "y":
                values[name] = _split(as_input(self.y.value, self.shape))
            elif name == "dx":
                values[name] = _split(as_input(self.gradients[self.x], self.shape))
            elif name in ("dgamma", "dbeta"):
                there = self.spec.learn_affine and (self.spec.scale if name == "dgamma" else self.spec.center)
                of = self.gamma if name == "dgamma" else self.beta
                values[name] = _split(self.gradients[of][:, 0]) if there else None
            elif name in self.moving:
                values[name] = _split(self.moving[name])
        return Expected(values, self.facts, dict(self.updates))


def _exactly(a: Array) -> Array:
    """Floats as numbers of 60 digits; a float is one of them."""
    return np.asarray(_numbers(a.astype(np.float64)), object)


def _round(a: Array) -> Array:
    return np.asarray(_nearest(a), np.float64)


def _split(a: Array) -> Exact:
    high = _round(a)
    with np.errstate(invalid="ignore"):
        return Exact(high, _round(a - _exactly(high)))


def as_input(a: Array, shape: tuple[int, ...]) -> Array:
    """(C, m) as (N, C, ...)."""
    return np.moveaxis(a.reshape(shape[1], shape[0], *shape[2:]), 0, 1)
