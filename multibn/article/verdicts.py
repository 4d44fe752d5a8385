"""Judge each claim by the runs: paired differences over the seeds, with 95 % confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .plan import Plan, Run

LEARNS: Final = 0.9
"""Test accuracy from which on a net counts as having learned."""

FEWEST: Final = 5
"""Seeds that a claim needs to be judged."""

NOT_JUDGED: Final = "not judged: a quick run has too few seeds"

Results = Mapping[Run, Mapping[str, Any]]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and its 95 % confidence interval by Student's t."""

    mean: float
    low: float
    high: float


def interval(values: Any) -> Interval:
    """Return the interval of one value per seed; the value itself if all are equal or there is only one."""
    from scipy import stats

    mean, error = float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else 0.0
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error if error > 0 else 0.0
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim by one framework's runs.

    Args:
        degree: "shows", where the interval of the difference is on the claim's side; "shows in part", where it is so in some of
            several comparisons; else "does not show".
        text: a sentence, numbers in it.
        rows: name of what varied, then without and with BatchNorm, as texts.
    """

    degree: str
    text: str
    rows: tuple[tuple[str, str, str], ...]


def degree(*shows: bool) -> str:
    """Return the degree of one comparison or several."""
    return "shows" if all(shows) else "shows in part" if any(shows) else "does not show"


def percent(value: Interval) -> str:
    """91.2 % [90.1, 92.3]."""
    return f"{100 * value.mean:.1f} % [{100 * max(value.low, 0):.1f}, {100 * min(value.high, 1):.1f}]"


def points(value: Interval) -> str:
    """The same of a difference: +1.2 points [0.3, 2.1]."""
    return f"{100 * value.mean:+.1f} points [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def accuracies(results: Results, plan: Plan, study: Any, values: Sequence[Any], norm: bool, which: str = "test") -> Any:
    """(seeds, values) of accuracies."""
    return np.array([[results[study(norm, seed, value)][which] for value in values] for seed in range(plan.seeds)])


def _rows(without: Any, with_norm: Any, names: Sequence[str]) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (name, percent(interval(a)), percent(interval(b))) for name, a, b in zip(names, without.T, with_norm.T, strict=True)
    )


def rates(results: Results, plan: Plan) -> Verdict:
    """The largest learning rate that works."""
    found = [accuracies(results, plan, plan.rate, plan.rates, norm) for norm in (False, True)]
    largest = [_largest(each, plan.rates) for each in found]
    factor = interval(np.log(largest[1] / largest[0]))
    middle, low, high = (float(np.exp(each)) for each in (factor.mean, factor.low, factor.high))
    shows = low > 1 + 1e-9
    text = (
        f"the largest rate at which it learns is {middle:.3g} times as large with BatchNorm [{low:.3g}, {high:.3g}] "
        f"(geometric means: {_geometric(largest[0])} without, {_geometric(largest[1])} with)"
        + (", alike for every seed" if low == high else "")
    )
    return Verdict(degree(shows), text, _rows(found[0], found[1], [f"rate {rate:g}" for rate in plan.rates]))


def _largest(accuracy: Any, values: Sequence[float]) -> Any:
    """For each seed the largest value at which it learns; half the least where there is none."""
    return np.array(
        [max((v for v, a in zip(values, row, strict=True) if a >= LEARNS), default=values[0] / 2) for row in accuracy]
    )


def _geometric(values: Any) -> str:
    return f"{float(np.exp(np.log(values).mean())):.2g}"


def starts(results: Results, plan: Plan) -> Verdict:
    """Accuracy over all initial scales."""
    found = [accuracies(results, plan, plan.start, plan.scales, norm) for norm in (False, True)]
    gain = interval(found[1].mean(axis=1) - found[0].mean(axis=1))
    able = [[f"{s:g}" for s, a in zip(plan.scales, each.mean(axis=0), strict=True) if a >= LEARNS] for each in found]
    text = (
        f"averaged over initial weights {plan.scales[0]:g} to {plan.scales[-1]:g} times as large as usual, BatchNorm knows "
        f"{points(gain)} more of the test digits; it learns at {_listed(able[1])}, without it at {_listed(able[0])}"
    )
    return Verdict(degree(gain.low > 0), text, _rows(found[0], found[1], [f"{scale:g} x usual" for scale in plan.scales]))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{name}x" for name in names) or "none of them"


def saturating(results: Results, plan: Plan) -> Verdict:
    """Sigmoid and tanh, five layers deep."""
    found = [accuracies(results, plan, plan.saturating, plan.activations, norm) for norm in (False, True)]
    names = [name if scale == 1 else f"{name}, weights {scale:g}x" for name, scale in plan.activations]
    gains = [interval(b - a) for a, b in zip(found[0].T, found[1].T, strict=True)]
    text = "; ".join(
        f"{name}: {points(gain)}{'' if gain.low > 0 else ', which does not show it'}"
        for name, gain in zip(names, gains, strict=True)
    )
    return Verdict(
        degree(*(gain.low > 0 for gain in gains)),
        f"test digits known more with BatchNorm: {text}",
        _rows(found[0], found[1], names),
    )


def regularising(results: Results, plan: Plan) -> Verdict:
    """A hundred training digits, all learned."""
    found = [accuracies(results, plan, plan.few, plan.batches, norm) for norm in (False, True)]
    gain = interval(found[1][:, 0] - found[0][:, 0])
    noise = interval(found[1][:, 0] - found[1][:, -1])
    fitted = accuracies(results, plan, plan.few, plan.batches, True, "train").mean()
    text = (
        f"trained on 100 digits, of which it knows {100 * fitted:.0f} % in the end, BatchNorm in batches of {plan.batches[0]} "
        f"makes a difference of {points(gain)} to no BatchNorm; its small batches, whose statistics are noisy, make one of "
        f"{points(noise)} to batches of {plan.batches[-1]}, which are all the digits"
    )
    if gain.low <= 0 < noise.low:
        text += ": the noise does regularise, but not beyond leaving BatchNorm out"
    return Verdict(degree(gain.low > 0), text, _rows(found[0], found[1], [f"batches of {batch}" for batch in plan.batches]))


def shifts(results: Results, plan: Plan) -> Verdict:
    """How far the distributions wander, in a sigmoid net that learns either way."""
    study = plan.activations[1]
    ways = [
        np.array([results[plan.saturating(norm, seed, study)]["shift"] for seed in range(plan.seeds)]) for norm in (False, True)
    ]
    factor = interval(np.log(ways[0] / ways[1]))
    middle, low, high = (float(np.exp(each)) for each in (factor.mean, factor.low, factor.high))
    text = (
        f"without BatchNorm the median of what reaches an activation wanders {middle:.2g} times as far [{low:.2g}, {high:.2g}], "
        "measured in spreads"
    )
    row = tuple(f"{i.mean:.2f} [{i.low:.2f}, {i.high:.2f}]" for i in map(interval, ways))
    return Verdict(degree(low > 1), text, (("way of the median, in spreads", row[0], row[1]),))


CLAIMS: Final[Mapping[str, Callable[[Results, Plan], Verdict]]] = {
    "rates": rates,
    "starts": starts,
    "saturating": saturating,
    "regularising": regularising,
    "shift": shifts,
}
"""Each claim, by the name of its section."""


def together(verdicts: Mapping[str, Verdict]) -> str:
    """Where a claim shows, of the frameworks' names."""
    found: dict[str, list[str]] = {}
    for name, verdict in verdicts.items():
        found.setdefault(verdict.degree, []).append(name)
    return ", ".join(f"{how} in {' and '.join(names)}" for how, names in found.items())
