"""Cases of BN-16."""

from __future__ import annotations

from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import ALL_GRADIENTS, HALF_MOMENTUM, MOVING, Case, Observed, back, case, train
from multibn_conformance.cases.inputs import Kind, Values


def accuracy() -> list[Case]:
    """Values that are hard to be exact on."""
    cases = []
    article = BatchNormSpec(eps=1e-12, momentum=HALF_MOMENTUM)

    def accurate(
        name: str,
        comment: str,
        catches: str,
        x: Values,
        spec: BatchNormSpec = article,
        gradients: tuple[Observed, ...] = ALL_GRADIENTS,
    ) -> Case:
        steps = (train(x, "y", *MOVING), back(Values(x.shape, 31, x.dtype), *gradients))
        return case("BN-16", name, comment, catches, *steps, features=x.shape[1], spec=spec, dtype=x.dtype)

    kinds: dict[Kind, str] = {
        "constant": "divides 0 by 0, or takes its own rounding for a variance",
        "alternating": "trusts a sum that cancels",
        "outlier": "lets one value swallow the others",
    }
    for dtype in ("float32", "float64"):
        for kappa in ("1", "1e2", "1e4", "1e6"):
            mean = float(kappa) if kappa != "1" else 0.0
            cases.append(
                accurate(
                    f"kappa-{kappa}-{dtype}",
                    f"mean/std about {kappa}.",
                    "loses digits where the values lie far from 0",
                    Values((16, 3, 8, 8), 7, dtype, mean, 1.0),
                )
            )
        for kind, catches in kinds.items():
            cases.append(
                accurate(
                    f"{kind}-{dtype}",
                    f"A channel that is {kind}." if kind != "outlier" else "One value of a channel is 1e6 times as large.",
                    catches,
                    Values((8, 3, 5, 5), 8, dtype, 0.3, 3.0, kind=kind),
                    # every term of dgamma is exactly 0 in a constant channel: its bound would be 0
                    gradients=("dx", "dbeta") if kind == "constant" else ALL_GRADIENTS,
                )
            )
    cases += [
        accurate(
            "denormals",
            "Values below the smallest normal number, whose variance is far below eps.",
            "flushes them to zero",
            Values((8, 3, 5, 5), 9, "float32", 0.0, 1e-39),
        ),
        accurate(
            "near-overflow",
            "Values whose squares float32 cannot hold.",
            "squares in float32",
            Values((8, 3, 5, 5), 10, "float32", 0.0, 1e37),
        ),
        accurate(
            "tiny-eps-float64",
            "eps 1e-300 beside a variance of 1e-40.",
            "rounds eps to float32",
            Values((8, 3, 5, 5), 11, "float64", 0.0, 1e-20),
            BatchNormSpec(eps=1e-300, momentum=HALF_MOMENTUM),
        ),
        accurate("long", "8192 values per channel.", "lets errors grow with m", Values((128, 1, 8, 8), 12, "float32", 3.0, 1.0)),
    ]
    for layer, shape in ((0, (16, 4, 8, 8)), (1, (16, 8, 4, 4))):
        cases.append(
            case(
                "BN-16",
                f"digits-layer-{layer}",
                f"Real data: what BatchNorm layer {layer} of a network sees in ten steps of training on handwritten digits.",
                "is right for random numbers only",
                *tuple(
                    step
                    for seed in range(10)
                    for step in (
                        train(Values(shape, seed, mean=float(layer), kind="digits-x"), "y", *MOVING),
                        back(Values(shape, seed, mean=float(layer), kind="digits-dy"), *ALL_GRADIENTS),
                    )
                ),
                features=shape[1],
                spec=BatchNormSpec(),
                source="scikit-learn's load_digits",
            )
        )
    return cases
