"""Cases of BN-05 and BN-06."""

from __future__ import annotations

from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import HALF_MOMENTUM, SHAPES, Case, Observed, Step, back, case, train, usual
from multibn_conformance.cases.inputs import Values


def moving() -> list[Case]:
    """Momentum and the estimator."""

    def ten_steps(rank: int, dtype: str, observe: tuple[Observed, ...]) -> tuple[Step, ...]:
        return tuple(train(usual(rank, seed, dtype), *observe) for seed in range(10))

    cases = []
    for dtype in ("float32", "float64"):
        for rank in SHAPES:
            cases.append(
                case(
                    "BN-05",
                    f"ten-steps-rank-{rank}-{dtype}",
                    "The moving mean over ten training steps with momentum 0.9.",
                    "takes momentum for the weight of the new value, or updates twice",
                    *ten_steps(rank, dtype, ("moving_mean",)),
                    spec=BatchNormSpec(momentum=0.9),
                    dtype=dtype,
                    source="the article: momentum=0.9",
                )
            )
    for name, momentum in (("0", 0.0), ("0.1", 0.1), ("0.99", 0.99), ("none", None)):
        cases.append(
            case(
                "BN-05",
                f"momentum-{name}",
                f"Ten training steps with momentum {momentum}.",
                "has its own momentum, or counts the initial state as a batch",
                *ten_steps(3, "float32", ("moving_mean",)),
                spec=BatchNormSpec(momentum=momentum),
            )
        )
    cases += [
        case(
            "BN-05",
            "batches-of-different-size",
            "The weights are momentum's whatever the size of a batch.",
            "weighs batches by their size",
            *tuple(train(Values((n, 3, 4), n), "moving_mean") for n in (2, 9, 3)),
        ),
        case(
            "BN-05",
            "none-of-different-size",
            "momentum None gives batches equal weights whatever their size.",
            "weighs batches by their size",
            *tuple(train(Values((n, 3, 4), n), "moving_mean") for n in (2, 9, 3)),
            spec=BatchNormSpec(momentum=None),
        ),
        case(
            "BN-05",
            "not-in-backward",
            "The moving statistics move in forward, and backward leaves them.",
            "updates in backward",
            *tuple(
                step
                for seed in range(3)
                for step in (train(usual(seed=seed), "moving_mean"), back(usual(seed=seed + 9), "unchanged"))
            ),
            source="MXNet: batch_norm.cc updates in backward",
        ),
        case(
            "BN-05",
            "without-backward",
            "Training forwards that nobody differentiates update as well.",
            "updates in backward",
            train(usual(), "moving_mean"),
            train(usual(seed=1), "moving_mean"),
            source="MXNet: no update without a backward",
        ),
    ]
    for estimate in ("biased", "unbiased"):
        for name, values in {
            "rank-2": usual(2),
            "rank-4-float64": usual(4, dtype="float64"),
            "m-2": Values((2, 3)),
            "m-large": Values((2, 3, 700)),
        }.items():
            cases.append(
                case(
                    "BN-06",
                    f"{estimate}-{name}",
                    f"The moving variance takes the {estimate} variance; the output always the biased.",
                    "takes the other estimator",
                    train(values, "y", "moving_var"),
                    back(_again(values), "dx"),
                    spec=BatchNormSpec(momentum=HALF_MOMENTUM, moving_variance=estimate),
                    dtype=values.dtype,
                )
            )
        cases.append(
            case(
                "BN-06",
                f"{estimate}-ten-steps",
                f"The moving variance over ten training steps, {estimate}.",
                "takes the other estimator",
                *ten_steps(4, "float32", ("moving_var",)),
                spec=BatchNormSpec(momentum=HALF_MOMENTUM, moving_variance=estimate),
            )
        )
    return cases


def _again(values: Values) -> Values:
    return Values(values.shape, values.seed + 100, values.dtype)
