"""The random tier: Hypothesis draws cases and shrinks those that fail. A seed stands for one case, the same for every subject.

What is drawn is a ``Case`` like the fixed ones: shapes, layouts, parameters, and values that are hard to be right on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

from multibn.spec.batchnorm import BatchNormSpec

from .case import ALL_GRADIENTS, MOVING, Case, Observed, Step, another, back, infer, train, with_dependence
from .inputs import Kind, Layout, Values

Draw = Callable[[st.SearchStrategy[Any]], Any]

MOST = 60
"""Values of an input, about: the oracle computes each in 60 digits."""

_DATA: dict[str, tuple[float, ...]] = {
    "float16": (0.0, -0.0, 1.0, 65504.0, -65504.0, 6e-8, 6.1e-5),
    "float32": (0.0, -0.0, 1.0, 1e18, -1e18, 1e30, 1e-45, 1.2e-38, 16777216.0),
    "float64": (0.0, -0.0, 1.0, 1e140, -1e140, 5e-324, 2.3e-308, 9007199254740992.0),
}
"""Hostile values of a type, whose squares float64 can hold."""

_COTANGENTS = {
    "float16": (0.0, -0.0, 1.0, 1e3),
    "float32": (0.0, -0.0, 1.0, 1e10, 1e-30),
    "float64": (0.0, -0.0, 1.0, 1e100, 1e-200),
}
"""The same for gradients."""

_LAYOUTS: tuple[Layout, ...] = ("contiguous", "transposed", "channels last", "sliced", "negative")


class _SeedAlone(HypothesisProvider):
    """Draws by the seed alone. Hypothesis itself now and then draws a number that stands in the code of a module that is loaded:
    a seed would be another case where another framework, or a subject, is imported.
    """

    def _maybe_draw_constant(self, *_: Any, **__: Any) -> None:
        """Never."""


AVAILABLE_PROVIDERS["multibn"] = f"{__name__}.{_SeedAlone.__name__}"

ALONE = settings(
    max_examples=2,  # the first is the simplest of all, the same for every seed
    backend="multibn",
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    verbosity=Verbosity.quiet,
    report_multiple_bugs=False,
)
"""Draws by the seed, and by Hypothesis's version, alone."""


class _Drawn:
    """What a case is drawn from."""

    def __init__(self, draw: Draw, fixed: BatchNormSpec | None, types: Sequence[str]) -> None:
        self.draw = draw
        self.dtype = self.one_of(*types)
        self.features = draw(st.integers(1, 5))
        self.fixed = fixed
        self._seeds = 0

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def spec(self, **chosen: Any) -> BatchNormSpec:
        """Parameters: those of a subject that has no choice; else these, and the others drawn."""
        if self.fixed is not None:
            return self.fixed
        drawn = {
            "eps": self.one_of(1e-5, 1e-3, 1e-12, 0.5, *((1e-300,) if self.dtype == "float64" else ())),
            "momentum": self.one_of(0.9, None, 0.0, self.draw(st.integers(0, 99)) / 100),
            "moving_variance": self.one_of("biased", "unbiased"),
            "scale": not self.flag(),
            "center": not self.flag(),
        }
        return BatchNormSpec(**{**drawn, **chosen})

    def shape(self, least: int = 2, most: int = MOST) -> tuple[int, ...]:
        """Of any rank, with at least so many values in a channel, and not many more than so many in all."""
        sizes: list[int] = []
        left = max(least, most // self.features)
        for _ in range(self.draw(st.integers(1, 4))):
            sizes.append(self.draw(st.integers(1, max(1, min(left, 9)))))
            left //= sizes[-1]
        at = self.draw(st.integers(0, len(sizes) - 1))
        while _product(sizes) < least:
            sizes[at] += 1
        return (sizes[0], self.features, *sizes[1:])

    def values(self, shape: tuple[int, ...], layout: Layout = "contiguous", hostile: bool = True) -> Values:
        """Data."""
        mean, std = self.one_of(0.5, 0.0, 3.0, 100.0, 1e4), self.one_of(2.0, 1.0, 1e-3, 30.0)
        kind: Kind = self.one_of("normal", "normal", "constant", "alternating", "outlier") if hostile else "normal"
        if self.dtype == "float16":
            mean, kind = min(mean, 100.0), "normal" if kind == "outlier" else kind
        return Values(shape, self._seed(), self.dtype, mean, std, kind, layout, self._planted(_DATA) if hostile else ())

    def cotangent(self, shape: tuple[int, ...], layout: Layout = "contiguous") -> Values:
        """A gradient."""
        return Values(shape, self._seed(), self.dtype, self.one_of(0.0, 0.5), 1.0, "normal", layout, self._planted(_COTANGENTS))

    def poisoned(self, values: Values) -> Values:
        """The same with a NaN or an infinity somewhere."""
        place = self.draw(st.integers(0, 99)), float(self.one_of("nan", "inf", "-inf"))
        return replace(values, planted=(*values.planted, place))

    def layout(self) -> Layout:
        """Any."""
        found: Layout = self.one_of(*_LAYOUTS)
        return found

    def _planted(self, hostile: dict[str, tuple[float, ...]]) -> tuple[tuple[int, float], ...]:
        places = st.tuples(st.integers(0, 99), st.sampled_from(hostile[self.dtype]))
        return tuple(self.draw(st.lists(places, max_size=3)))

    def _seed(self) -> int:
        self._seeds += 1
        return int(self.draw(st.integers(0, 9999))) * 10 + self._seeds


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _training(d: _Drawn) -> Case:
    spec, steps = d.spec(), []
    for _ in range(d.draw(st.integers(1, 2))):
        shape = d.shape()
        steps += [train(d.values(shape), "y", *MOVING), back(d.cotangent(shape), *ALL_GRADIENTS)]
    return _case(d, "BN-16", spec, *steps)


def _shapes(d: _Drawn) -> Case:
    shape = d.shape(most=400)
    return _case(d, "BN-01", d.spec(), train(d.values(shape, hostile=False), "y"), back(d.cotangent(shape), "dx"))


def _moving(d: _Drawn) -> Case:
    steps = [train(d.values(d.shape(), hostile=False), *MOVING) for _ in range(d.draw(st.integers(2, 4)))]
    return _case(d, "BN-05", d.spec(), *steps)


def _inference(d: _Drawn) -> Case:
    shape = d.shape(least=1)
    steps = infer(d.values(shape), "y", "unchanged"), back(d.cotangent(shape), *ALL_GRADIENTS, "unchanged")
    return _case(d, "BN-07", d.spec(), *steps)


def _switches(d: _Drawn) -> Case:
    spec = d.spec(normalize_with=d.one_of("moving", "batch"), update_statistics=d.flag(), learn_affine=d.flag())
    shape = d.shape()
    kept: tuple[Observed, ...] = MOVING if spec.update_statistics else ("unchanged",)
    step = train(d.values(shape), "y", *kept), back(d.cotangent(shape), *ALL_GRADIENTS, "unchanged")
    return _case(d, "BN-09", spec, *step, train(d.values(d.shape()), "y", *kept))


def _poison(d: _Drawn) -> Case:
    shape = d.shape()
    clean, cotangent = d.values(shape, hostile=False), d.cotangent(shape)
    first = train(d.poisoned(clean), "y", *MOVING), back(cotangent, *ALL_GRADIENTS)
    if d.flag():
        first = train(clean, "y", *MOVING), back(d.poisoned(cotangent), *ALL_GRADIENTS)
    return _case(d, "BN-11", d.spec(), *first, train(d.values(d.shape(), hostile=False), "y", *MOVING))


def _edges(d: _Drawn) -> Case:
    spec = d.spec()
    rank = d.draw(st.integers(1, 3))
    if d.flag() and spec.uses_batch(True):
        return _case(d, "BN-12", spec, Step("refuse", Values((1, d.features, *[1] * rank), 0, d.dtype), ("unchanged",)))
    shape = [d.draw(st.integers(1, 4)), d.features, *(d.draw(st.integers(1, 4)) for _ in range(rank))]
    shape[d.one_of(0, *range(2, len(shape)))] = 0
    empty = Values(tuple(shape), 0, d.dtype)
    steps = train(empty, "y", "unchanged"), back(empty, *ALL_GRADIENTS, "unchanged")
    return _case(d, "BN-12", spec, *steps, train(d.values(d.shape(), hostile=False), *MOVING))


def _state(d: _Drawn) -> Case:
    shape = d.shape()
    steps = [train(d.values(shape, hostile=False), *MOVING), another(d.values(shape, hostile=False), "unchanged")]
    steps += [back(d.cotangent(shape), *ALL_GRADIENTS, "unchanged")]
    spec = d.spec()
    if spec.momentum is not None:  # whose batches are counted from a load
        steps += [Step("reload", None, ("unchanged",)), train(d.values(shape, hostile=False), *MOVING)]
    steps += [
        Step("load", Values((d.features,), d.draw(st.integers(0, 9)), d.dtype), ()),
        infer(d.values(shape), "y", "unchanged"),
    ]
    return _case(d, "BN-13", spec, *steps)


def _layouts(d: _Drawn) -> Case:
    shape = d.shape()
    steps = train(d.values(shape, d.layout(), hostile=False), "y", *MOVING), back(d.cotangent(shape, d.layout()), *ALL_GRADIENTS)
    return _case(d, "BN-14", d.spec(), *steps, infer(d.values(shape, d.layout()), "y"))


def _bits(d: _Drawn) -> Case:
    shape = d.shape(most=400) if d.flag() else (d.draw(st.integers(1, 300)), d.features, d.draw(st.integers(2, 1100)))
    step = train(d.values(shape), "y", *MOVING), back(d.cotangent(shape), *ALL_GRADIENTS)
    return replace(_case(d, "BN-15", d.spec(), *step, infer(d.values(shape), "y")), against="bits")


TYPES = "float32", "float64", "float16"
ORACLE = (_training, _training, _shapes, _moving, _inference, _switches, _poison, _edges, _state, _layouts)
"""Kinds of cases that the oracle judges."""


def _case(d: _Drawn, clause: str, spec: BatchNormSpec, *steps: Step) -> Case:
    verdict: Any = "must raise" if any(step.do == "refuse" for step in steps) else "must"
    told = "Drawn at random.", "is right for usual values only"
    return Case(f"{clause}-random", clause, *told, tuple(_observable(spec, steps)), d.features, spec, d.dtype, verdict)


def _observable(spec: BatchNormSpec, steps: Sequence[Step]) -> Iterator[Step]:
    """The steps; where a result depends on updated moving statistics, without what the bounds cannot cover."""
    for step, depends in with_dependence(steps, spec):
        yield replace(step, observe=tuple(name for name in step.observe if name in _KEPT)) if depends else step


_KEPT = (*MOVING, "unchanged", "dbeta")


@st.composite
def cases(
    draw: Draw,
    spec: BatchNormSpec | None = None,
    types: Sequence[str] = TYPES,
    kinds: Sequence[Callable[[_Drawn], Case]] = (*ORACLE, _bits),
) -> Case:
    """A strategy for cases of these types and kinds, with the given parameters or drawn ones."""
    kind = draw(st.sampled_from(kinds))
    return kind(_Drawn(draw, spec, types))


def drawn(number: int, strategy: st.SearchStrategy[Case] | None = None) -> Case:
    """Draw the case of a seed without judging it; by ``cases()`` unless a strategy is given."""
    seen: list[Case] = []

    @seed(number)
    @settings(ALONE, phases=(Phase.generate,))
    @given(cases() if strategy is None else strategy)
    def draw(case: Case) -> None:
        seen.append(case)

    draw()
    return replace(seen[-1], id=f"{seen[-1].clause}-random-{number}")


def code_of(subject: str, case: Case) -> str:
    """Python code that judges a subject by a case that is not in the catalogue."""
    return (
        "from multibn.spec import BatchNormSpec\n"
        "from multibn_conformance import reproduce\n"
        "from multibn_conformance.cases.case import Case, Step\n"
        "from multibn_conformance.cases.inputs import Values\n"
        f"print(reproduce({subject!r}, {_code(case)}))"
    )


def _code(value: Any) -> str:
    """Python code for a value; for a dataclass, the fields that differ from their defaults."""
    if is_dataclass(value):
        usual = {field.name: field.default for field in fields(value)}
        told = [f"{name}={_code(getattr(value, name))}" for name in usual if getattr(value, name) != usual[name]]
        return f"{type(value).__name__}({', '.join(told)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_code, value))}{',' if len(value) == 1 else ''})"
    return f'float("{value}")' if value != value or value in (float("inf"), float("-inf")) else repr(value)
