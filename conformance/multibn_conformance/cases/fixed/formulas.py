"""Cases of BN-02 to BN-04."""

from __future__ import annotations

from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import HALF_MOMENTUM, MOVING, Case, back, case, infer, train, usual


def formulas() -> list[Case]:
    """Statistics, eps, gamma and beta."""
    half = BatchNormSpec(momentum=HALF_MOMENTUM)
    cases = [
        case(
            "BN-02",
            f"far-from-zero-{dtype}",
            "Values at 1000 with a spread of 1: the deviations come from the mean, not from 0.",
            "computes E[x^2]-E[x]^2, which cancels",
            train(usual(dtype=dtype, mean=1000.0, std=1.0), "y", "moving_var"),
            spec=half,
            dtype=dtype,
            source="keras: its jax and tensorflow backends did so",
        )
        for dtype in ("float32", "float64")
    ]
    cases += [
        case(
            "BN-02",
            "half-input",
            "float16 values at 60 with a spread of 1 in float32 statistics.",
            "sums in the input's half precision",
            train(usual(dtype="float16", mean=60.0, std=1.0), "y", *MOVING),
            spec=half,
            dtype="float16",
        ),
        case(
            "BN-02",
            "statistics",
            "The batch's mean and biased variance, as the moving statistics show them.",
            "divides by another number than m",
            train(usual(), *MOVING),
            train(usual(seed=1), *MOVING),
            spec=half,
        ),
    ]
    for name, eps, std in (("1e-5", 1e-05, 2.0), ("1e-12", 1e-12, 1e-06), ("1e-3", 0.001, 0.05), ("half", 0.5, 1.0)):
        spec = BatchNormSpec(eps=eps)
        cases.append(
            case(
                "BN-03",
                f"eps-{name}",
                f"eps {eps} where the spread is {std}, in training and its gradient.",
                "puts eps outside the root, clamps it to 1e-5, or has its own",
                train(usual(std=std, mean=0.0), "y"),
                back(usual(seed=1), "dx"),
                infer(usual(2, seed=2)),
                spec=spec,
                source="the article: eps 1e-12" if eps == 1e-12 else "the clause",
            )
        )
    cases.append(
        case(
            "BN-03",
            "eps-1e-8-float16",
            "eps 1e-08 for float16 values with a spread of 1e-4.",
            "rounds eps to the input's half precision, where it is 0",
            train(usual(dtype="float16", std=1e-4, mean=0.0), "y"),
            spec=BatchNormSpec(eps=1e-8),
            dtype="float16",
        )
    )
    cases.append(
        case(
            "BN-03",
            "eps-in-inference",
            "A large eps with the moving variance.",
            "takes another eps in inference, or puts it outside the root",
            infer(usual(), "y"),
            spec=BatchNormSpec(eps=0.5),
        )
    )
    for scale in (True, False):
        for center in (True, False):
            cases.append(
                case(
                    "BN-04",
                    f"{('scale' if scale else 'no-scale')}-{('center' if center else 'no-center')}",
                    f"Output and gradients with scale={scale}, center={center}; twice, and in inference.",
                    "ignores gamma, adds a beta that is not there, overwrites either, or makes a gradient for what it has not",
                    infer(usual(seed=3), "y"),
                    train(usual(), "y"),
                    back(usual(seed=1), "dgamma", "dbeta"),
                    train(usual(seed=2), "y"),
                    spec=BatchNormSpec(scale=scale, center=center),
                    source="MXNet: fix_gamma writes 1 into gamma; center=False still adds beta",
                )
            )
    return cases
