"""Cases of BN-10 to BN-12."""

from __future__ import annotations

from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import ALL_GRADIENTS, HALF_MOMENTUM, MOVING, Case, Step, back, case, infer, train, usual
from multibn_conformance.cases.inputs import Values


def types() -> list[Case]:
    """What is taken, what comes out, what is refused."""
    cases = []
    for dtype in ("float16", "float32", "float64"):
        cases.append(
            case(
                "BN-10",
                dtype,
                f"{dtype} in, {dtype} out, in training, backward and inference; parameters and statistics of their own type.",
                "promotes the output, or rounds statistics to the input's type",
                infer(usual(seed=2, dtype=dtype), "y"),
                train(usual(dtype=dtype), "y", *MOVING),
                back(usual(seed=1, dtype=dtype), *ALL_GRADIENTS),
                spec=BatchNormSpec(momentum=HALF_MOMENTUM),
                dtype=dtype,
            )
        )
    for dtype in ("int32", "int64", "uint8", "bool"):
        cases.append(
            case(
                "BN-10",
                f"refuses-{dtype}",
                f"{dtype} input is an error, and the state stays.",
                "normalises and truncates, or returns another type",
                Step("refuse", usual(mean=5.0, dtype=dtype), ("unchanged",)),
                verdict="must raise",
            )
        )
    cases.append(
        case(
            "BN-10",
            "refuses-other-parameters",
            "float64 input for a float32 state is an error.",
            "computes in whichever type it likes",
            Step("refuse", usual(dtype="float64"), ("unchanged",)),
            verdict="must raise",
        )
    )
    return cases


def edges() -> list[Case]:
    """NaN, infinity, empty batches and single values."""
    cases = []
    for kind in ("nan", "inf"):
        poisoned = usual(kind=kind)
        cases += [
            case(
                "BN-11",
                f"{kind}-in-training",
                f"One {kind} in channel 1: other channels are untouched, its moving statistics stay, and recover.",
                "poisons its moving statistics for good, or other channels",
                train(poisoned, "y", *MOVING),
                back(usual(seed=1), *ALL_GRADIENTS),
                train(usual(seed=2), "y", *MOVING),
                spec=BatchNormSpec(momentum=HALF_MOMENTUM),
                source="PyTorch, MXNet, Keras: running statistics turn NaN",
            ),
            case(
                "BN-11",
                f"{kind}-in-inference",
                f"One {kind} in inference stays where it is.",
                "spreads it",
                infer(poisoned, "y", "unchanged"),
            ),
        ]
    cases += [
        case(
            "BN-11",
            "nan-in-dy",
            "One NaN in the gradient stays in its channel.",
            "spreads it",
            train(usual()),
            back(usual(seed=1, kind="nan"), *ALL_GRADIENTS),
        ),
        case(
            "BN-11",
            "too-large-for-the-statistics",
            "A variance that float32 cannot hold leaves the moving statistics as they were.",
            "stores infinity",
            train(usual(mean=0.0, std=1e25), "unchanged"),
        ),
    ]
    for shape in ((0, 3), (0, 3, 4, 5), (2, 3, 0, 5)):
        name = "x".join(map(str, shape))
        cases.append(
            case(
                "BN-12",
                f"empty-{name}",
                f"An empty batch of shape {shape}: empty output, zero parameter gradients, no update.",
                "fails, makes NaN of the statistics, or counts it",
                train(Values(shape), "y", "unchanged"),
                back(Values(shape), *ALL_GRADIENTS, "unchanged"),
                source="MXNet: statistics turn NaN",
            )
        )
    cases.append(
        case(
            "BN-12",
            "empty-is-no-batch",
            "momentum None: an empty batch does not count.",
            "counts it",
            train(Values((0, 3))),
            train(usual(2), "moving_mean"),
            train(Values((0, 3))),
            train(usual(2, 1), "moving_mean"),
            spec=BatchNormSpec(momentum=None),
            source="PyTorch: num_batches_tracked grows",
        )
    )
    for name, shape, spec in (
        ("rank-2", (1, 3), BatchNormSpec()),
        ("rank-4", (1, 3, 1, 1), BatchNormSpec()),
        ("unbiased", (1, 3), BatchNormSpec(moving_variance="unbiased")),
        ("to-update", (1, 3), BatchNormSpec(normalize_with="moving")),
        ("to-normalise", (1, 3), BatchNormSpec(update_statistics=False)),
    ):
        cases.append(
            case(
                "BN-12",
                f"refuses-one-value-{name}",
                "One value per channel in training, where batch statistics are used, is an error, and the state stays.",
                "trains silently on a variance of 0, or divides by 0",
                Step("refuse", Values(shape), ("unchanged",)),
                spec=spec,
                verdict="must raise",
                source="MXNet trains silently",
            )
        )
    cases.append(
        case(
            "BN-12",
            "two-values",
            "Two values per channel are enough.",
            "refuses them",
            train(Values((2, 3)), "y"),
            back(Values((2, 3), 1), *ALL_GRADIENTS),
        )
    )
    return cases
