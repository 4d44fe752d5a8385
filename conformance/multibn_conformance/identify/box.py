"""A BatchNorm as a black box: create it, load a state, and call it with chosen input. Answers are checked before use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, NamedTuple

import numpy as np

from multibn.backend import Subject
from multibn.layer.types import PARAMETER_TYPE, Array
from multibn_conformance.subjects.outside import Broken
from multibn_conformance.subjects.text import plain

Make = Callable[[int], Subject]
"""``make(num_features)`` gives a new subject with its own defaults."""

FEATURES = 3
RANKS = (4, 2, 3, 5)
LOADED_MEAN, LOADED_VAR = 5.0, 900.0
"""Moving statistics to load, far from those of any batch and from any common eps."""


class Undetermined(Exception):
    """A property cannot be determined; the message is the reason, in text that is safe to show."""

    def __init__(self, reason: str) -> None:
        super().__init__(plain(reason))


class Refused(Undetermined):
    """The subject raised an error."""


class Finding(NamedTuple):
    """One property: its name, the finding as text, how it was measured, and the finding as a value (None: undetermined)."""

    name: str
    finding: str
    how: str = ""
    value: Any = None


class Gradients(NamedTuple):
    """The results of backward, as float64."""

    dx: Array
    dgamma: Array | None
    dbeta: Array | None


class LoadedSubject:
    """A subject with a loaded state; its answers are converted to float64 copies.

    Raises:
        Refused: any of its methods raised an error.
        Undetermined: an answer is not an array, or has the wrong shape.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def forward(self, x: Array, training: bool) -> Array:
        """Return y for x."""
        return _checked("forward", self.raw_forward(x, training), x.shape)

    def raw_forward(self, x: Array, training: bool) -> Any:
        """Return what forward returns, unchecked."""
        self._shape = x.shape
        return _called("forward", self._subject.forward, x.copy(), training)

    def backward(self, dy: Array) -> Gradients:
        """Return the gradients of the last forward."""
        made = _called("backward", self._subject.backward, dy.copy())
        if not isinstance(made, tuple) or len(made) != 3:
            raise Undetermined(f"backward returned {type(made).__name__}, not a tuple (dx, dgamma, dbeta)")
        dx = _checked("backward", made[0], dy.shape)
        return Gradients(dx, *(a if a is None else _checked("backward", a, (dy.shape[1],)) for a in made[1:]))

    def moving(self) -> tuple[Array, Array]:
        """Return moving mean and variance."""
        mean, var = self.raw_moving()
        return _checked("moving", mean, mean.shape), _checked("moving", var, var.shape)

    def raw_moving(self) -> tuple[Array, Array]:
        """Return moving mean and variance in their own type."""
        made = _called("moving", self._subject.moving)
        if not isinstance(made, tuple) or len(made) != 2 or not all(isinstance(a, np.ndarray) for a in made):
            raise Undetermined("moving did not return a tuple of two arrays (moving_mean, moving_var)")
        return made[0].copy(), made[1].copy()


class Box:
    """Make subjects, and input of a type and rank that they accept: float64 if possible, else float32.

    Raises:
        Undetermined: no training forward gives an output, of any of these types and ranks.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        reasons = []
        for dtype in ("float64", "float32"):
            for rank in RANKS:
                self.dtype, self.rank = dtype, rank
                try:
                    self._try()
                    return
                except Undetermined as reason:
                    reasons.append(str(reason))
        raise Undetermined(f"no training forward gives an output: {reasons[-1]}")

    def others(self) -> Iterator[Box]:
        """Return a box for float32 input of rank 4 or 2, if the subject accepts it."""
        for rank in (4, 2):
            other = copy(self)
            other.dtype, other.rank = "float32", rank
            try:
                other._try()
            except Undetermined:
                continue
            yield other

    def _try(self) -> None:
        x = self.values(8, 0.0, 1.0)
        y = self.fresh().raw_forward(x, True)
        _checked("forward", y, x.shape)
        if self.dtype == "float64" and (y.dtype != "float64" or np.array_equal(y, y.astype(np.float32))):
            raise Undetermined("float64 is computed in a smaller type")

    def new(self) -> LoadedSubject:
        """Make a new subject and load nothing."""
        return LoadedSubject(_called("make", self._make, FEATURES))

    def fresh(
        self,
        mean: float = LOADED_MEAN,
        var: float = LOADED_VAR,
        gamma: Array | None = None,
        beta: Array | None = None,
        dtype: str | None = None,
    ) -> LoadedSubject:
        """Make a subject with this state; gamma defaults to 1 and beta to 0."""
        kind = PARAMETER_TYPE.get(dtype or self.dtype, "float32")
        given = np.ones(FEATURES) if gamma is None else gamma, np.zeros(FEATURES) if beta is None else beta
        statistics = [np.full(FEATURES, value, kind) for value in (mean, var)]
        subject = _called("make", self._make, FEATURES)
        try:
            _called("load", subject.load, *(a.astype(kind) for a in given), *statistics)
        except Refused:
            _called("load", subject.load, None, None, *statistics)
        return LoadedSubject(subject)

    def shape(self, m: int) -> tuple[int, ...]:
        """Return an input shape with m values per channel, distributed over batch and space if m is a multiple of 4."""
        space = {2: (), 3: (2,), 4: (2, 2), 5: (2, 2, 1)}[self.rank]
        over = int(np.prod(space))
        return (m // over, FEATURES, *space) if m % 4 == 0 else (m, FEATURES, *[1] * len(space))

    def values(self, m: int, mean: float, std: float, seed: int = 0) -> Array:
        """Return normally distributed values with about this mean and standard deviation."""
        noise = np.random.default_rng([1502, seed]).standard_normal(self.shape(m))
        return np.asarray(mean + std * noise, self.dtype)

    def alternating(self, m: int, size: float, mean: float = 0.0) -> Array:
        """Return alternating values mean + size and mean - size: for even m, each channel has this mean and the biased variance
        size^2.
        """
        sign = np.where(np.arange(m) % 2, -1.0, 1.0)
        shape = self.shape(m)
        rows = np.broadcast_to(sign, (FEATURES, m)).reshape(FEATURES, shape[0], *shape[2:])
        return np.asarray(mean + size * np.moveaxis(rows, 0, 1), self.dtype)


def statistics(x: Array) -> tuple[Array, Array]:
    """Return mean and biased variance of each channel, in float64."""
    values = x.astype(np.float64)
    return values.mean(axis=axes(x)), values.var(axis=axes(x))


def axes(x: Array) -> tuple[int, ...]:
    """Return all axes except the channel axis."""
    return tuple(axis for axis in range(x.ndim) if axis != 1)


def channels(a: Array | float, like: Array) -> Array:
    """Reshape one value per channel to broadcast with an input."""
    return np.asarray(a).reshape(1, -1, *[1] * (like.ndim - 2))


def near(a: Array, b: Array, tolerance: float) -> bool:
    """Return whether two arrays differ by at most ``tolerance`` times the largest absolute value of both."""
    size = max(np.max(np.abs(a), initial=0), np.max(np.abs(b), initial=0))
    return bool(np.all(np.isfinite(a)) and np.max(np.abs(a - b), initial=0) <= tolerance * size)


def short(value: float, uncertainty: float) -> float:
    """Return the shortest decimal within a relative uncertainty of a measured value."""
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next((each for each in candidates if abs(each - value) <= uncertainty * abs(value)), value)


def _called(method: str, function: Callable[..., Any], *arguments: object) -> Any:
    try:
        with np.errstate(all="ignore"):
            return function(*arguments)
    except Broken as error:
        raise Undetermined(str(error).rstrip(".")) from error
    except Exception as error:
        raise Refused(f"{method} raised {type(error).__name__}: {error}") from error


def _checked(method: str, a: Any, shape: tuple[int, ...]) -> Array:
    if not isinstance(a, np.ndarray) or a.dtype.kind != "f":
        raise Undetermined(
            f"{method} returned {a.dtype if isinstance(a, np.ndarray) else type(a).__name__}, not an array of floats"
        )
    if a.shape != shape:
        raise Undetermined(f"{method} returned shape {a.shape}, not {shape}")
    return a.astype(np.float64)
