"""A case of synchronised statistics: what the ranks are given, step by step. Frozen data, drawn for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from multibn.layer.types import Array
from multibn.spec.batchnorm import BatchNormSpec

Fault = Literal["refuse", "absent", "other eps"]


@dataclass(frozen=True)
class Step:
    """One forward and, in training, its backward.

    Args:
        x, dy: of all ranks together, (N, C, ...).
        split: the samples of each rank, by their places in x.
        training: the mode.
        faults: what ranks do in place of their part; another eps they have in all steps.
    """

    x: Array = field(repr=False)
    dy: Array = field(repr=False)
    split: tuple[tuple[int, ...], ...]
    training: bool = True
    faults: Mapping[int, Fault] = field(default_factory=dict)


@dataclass(frozen=True)
class SyncCase:
    """A case.

    Args:
        id, clause: its name, and the clause that it judges.
        comment, catches: what it does; what a wrong one does, to follow "a BatchNorm that".
        spec: what the layer computes.
        steps: one after the other, on one layer; all of its ranks are in the group unless ``members`` says which.
        members: the ranks of the group.
        timeout: seconds of the group's sums.
    """

    id: str
    clause: str
    comment: str
    catches: str
    spec: BatchNormSpec
    steps: tuple[Step, ...]
    members: tuple[int, ...]
    timeout: float = 120.0

    def groups(self, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ranks of the group, and the others of so many, which do the same among themselves."""
        return self.members, tuple(rank for rank in range(size) if rank not in self.members)

    @property
    def channels(self) -> int:
        """Channels C."""
        return int(self.steps[0].x.shape[1])


Maker = Callable[[int], SyncCase]
"""Makes a case for so many ranks."""

CASES: dict[str, Maker] = {}


def _random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def uneven(n: int, size: int) -> tuple[tuple[int, ...], ...]:
    """The last rank has most, each other one two."""
    cuts = [*range(0, 2 * size, 2), n]
    return tuple(tuple(range(a, b)) for a, b in pairwise(cuts))


def shuffled(n: int, size: int, random: np.random.Generator) -> tuple[tuple[int, ...], ...]:
    """Samples in any order, ranks with any number of them, also none."""
    order, cuts = random.permutation(n), np.sort(random.integers(0, n + 1, size - 1))
    return tuple(tuple(int(i) for i in part) for part in np.split(order, cuts))


def _step(random: np.random.Generator, size: int, shape: tuple[int, ...] = (), **changes: object) -> Step:
    shape = shape or (2 * size + 5, 3, 4)
    x = random.standard_normal(shape) + np.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1))  # ranks differ in their means
    values = {"x": x.astype("f"), "dy": random.standard_normal(shape).astype("f"), "split": uneven(shape[0], size), **changes}
    return Step(**values)  # type: ignore[arg-type]


def _case(clause: str, catches: str) -> Callable[[Callable[[int], tuple[BatchNormSpec, tuple[Step, ...]]]], Maker]:
    """Register a case whose function gives its spec and steps; the name becomes the id, the docstring the comment."""

    def register(function: Callable[[int], tuple[BatchNormSpec, tuple[Step, ...]]]) -> Maker:
        name = function.__name__.strip("_").replace("_", "-")
        comment = (function.__doc__ or "").strip()

        def make(size: int) -> SyncCase:
            spec, steps = function(size)
            late = any("absent" in step.faults.values() for step in steps)
            members = (0, 1) if name == "some-of-the-ranks" else tuple(range(size))
            return SyncCase(name, clause, comment, catches, spec, steps, members, 2.0 if late else 120.0)

        CASES[name] = make
        return make

    return register


_PLAIN = BatchNormSpec()


@_case("SY-01", "weighs ranks alike that have more and fewer samples, or takes those of its own for all")
def _unequal_ranks(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """Ranks with 2 samples and one with many, whose means differ."""
    random = _random(1)
    return BatchNormSpec(moving_variance="unbiased"), (_step(random, size), _step(random, size))


@_case("SY-01", "adds over all processes there are")
def _some_of_the_ranks(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """A group of two ranks, while there are others."""
    return _PLAIN, (_step(_random(2), max(2, size - 2)),)  # samples for the other ranks too


def _splits(size: int, x: Array, dy: Array, seed: int, spec: BatchNormSpec) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    random = _random(seed)
    return spec, tuple(Step(x, dy, shuffled(len(x), size, random)) for _ in range(4))


_LAST = BatchNormSpec(momentum=0.0)
"""The moving statistics are those of the last batch, in full for float64."""


@_case("SY-02", "adds in float64, or in float32, where the order can be seen")
def _any_split(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """The same values, cut and permuted four times: the same bits, and exact statistics."""
    random = _random(3)
    x = random.standard_normal((16, 3, 6)) * np.exp(random.standard_normal((1, 3, 1)) * 4) + 1e4
    return _splits(size, x, random.standard_normal(x.shape), 4, _LAST)


@_case("SY-02", "loses what is small beside what is large")
def _any_split_of_hostile_values(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """Values of all exponents that cancel, in float32."""
    random = _random(5)
    x = np.exp2(random.uniform(-100, 55, (12, 3, 5))) * random.choice([-1, 1], (12, 3, 5))
    x[1::2] = -x[::2] * (1 + 1e-6 * random.standard_normal(x[::2].shape))
    dy = np.exp2(random.uniform(-60, 20, x.shape)) * random.choice([-1, 1], x.shape)
    return _splits(size, x.astype("f"), dy.astype("f"), 6, _LAST)


@_case("SY-03", "leaves an exchange out where a rank has no samples")
def _an_empty_rank(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """The first rank has no sample, then the last."""
    random, n = _random(7), 2 * size + 1
    nothing: tuple[int, ...] = ()
    first = (nothing, *uneven(n, size - 1))
    return _PLAIN, (_step(random, size, (n, 3, 4), split=first), _step(random, size, (n, 3, 4), split=(*first[1:], nothing)))


@_case("SY-04", "refuses a rank's single value, though all have more")
def _one_value_each(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """Each rank has one value per channel: together enough."""
    split = tuple((i,) for i in range(size))
    return _PLAIN, (_step(_random(8), size, (size, 3), split=split),)


@_case("SY-04", "accepts one value per channel in all, or updates without any")
def _one_value_and_none(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """One value on all ranks together, which all refuse; then none, which all accept."""
    nothing: tuple[tuple[int, ...], ...] = ((),) * size
    random = _random(9)
    one = _step(random, size, (1, 3), split=((0,), *nothing[1:]))
    return _PLAIN, (one, _step(random, size, (0, 3), split=nothing), _step(random, size))


@_case("SY-05", "updates twice, in each rank by its own statistics, or by m of its own")
def _one_update(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """Three updates by the unbiased variance, of equal weight."""
    random = _random(10)
    return BatchNormSpec(momentum=None, moving_variance="unbiased"), tuple(_step(random, size) for _ in range(3))


@_case("SY-06", "hands out gradients of gamma and beta that are summed over the ranks already")
def _own_gradients(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """Gradients of gamma and beta of ranks with different samples."""
    return _PLAIN, (_step(_random(11), size), _step(_random(12), size))


@_case("SY-07", "does not notice that ranks compute different things")
def _another_eps(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """One rank's layer has another eps."""
    random = _random(13)
    return _PLAIN, (_step(random, size, faults={1: "other eps"}), _step(random, size, faults={1: "other eps"}))


@_case("SY-08", "lets the others wait when it refuses its input")
def _a_refused_input(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """One rank gets input of too many channels; then all go on."""
    random = _random(14)
    return _PLAIN, (_step(random, size), _step(random, size, faults={1: "refuse"}), _step(random, size))


@_case("SY-09", "waits for ever")
def _an_absent_rank(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """One rank does not come."""
    random = _random(15)
    return _PLAIN, (_step(random, size), _step(random, size, faults={1: "absent"}))


@_case("SY-10", "exchanges in inference")
def _inference(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """A training step, then inference."""
    random = _random(16)
    return _PLAIN, (_step(random, size), _step(random, size, training=False))


@_case("SY-11", "keeps a NaN of one rank from the others")
def _nan_on_one_rank(size: int) -> tuple[BatchNormSpec, tuple[Step, ...]]:
    """The last sample of the last rank has a NaN in channel 1."""
    poisoned = _step(_random(17), size)
    poisoned.x[-1, 1, 0] = np.nan
    return _PLAIN, (poisoned, _step(_random(18), size))
