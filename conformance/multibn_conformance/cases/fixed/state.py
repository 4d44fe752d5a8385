"""Cases of BN-13 to BN-15."""

from __future__ import annotations

from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import (
    ALL_GRADIENTS,
    HALF_MOMENTUM,
    MOVING,
    SHAPES,
    Case,
    Observed,
    Step,
    another,
    back,
    case,
    infer,
    train,
    usual,
)
from multibn_conformance.cases.inputs import Values


def state() -> list[Case]:
    """Cases about loading state and reading it back."""
    return [
        case(
            "BN-13",
            "as-loaded",
            "The moving statistics read back as they were loaded, bit for bit.",
            "loads nothing, swaps the two, or stores 1/sqrt(var+eps)",
            Step("reload", None, ("unchanged",)),
            infer(usual(), "y", "unchanged"),
        ),
        case(
            "BN-13",
            "as-loaded-float64",
            "The same in float64.",
            "keeps its state in float32",
            Step("reload", None, ("unchanged",)),
            infer(usual(dtype="float64"), "y", "unchanged"),
            dtype="float64",
        ),
        case(
            "BN-13",
            "in-the-middle",
            "Saved after two training steps, loaded elsewhere, trained on.",
            "keeps state that it neither shows nor loads",
            train(usual()),
            train(usual(seed=1)),
            Step("reload", None, ("unchanged",)),
            train(usual(seed=2), *MOVING),
            spec=BatchNormSpec(momentum=HALF_MOMENTUM),
        ),
        case(
            "BN-13",
            "another-type",
            "A float32 state into a subject that held float64, and back.",
            "stays with the type that it began with",
            train(usual(dtype="float64")),
            Step("load", Values((3,), 1)),
            infer(usual(), "y", "unchanged"),
            Step("load", Values((3,), 2, "float64")),
            infer(usual(dtype="float64"), "y", "unchanged"),
            dtype="float64",
        ),
        case(
            "BN-13",
            "two-layers",
            "A second layer trains between the first one's forward and backward, and before its inference.",
            "shares between layers what belongs to one",
            train(usual()),
            another(usual(seed=1), "unchanged"),
            back(usual(seed=2), *ALL_GRADIENTS, "unchanged"),
            another(usual(seed=3), "unchanged"),
            infer(usual(seed=4), "unchanged"),
        ),
        case(
            "BN-13",
            "no-batches-yet",
            "momentum None: a loaded state has seen no batches.",
            "counts on",
            train(usual()),
            train(usual(seed=1)),
            Step("load", Values((3,), 3)),
            train(usual(seed=2), "moving_mean"),
            spec=BatchNormSpec(momentum=None),
        ),
    ]


def bits() -> list[Case]:
    """Layouts in memory, and equal bits."""
    cases = []
    for layout in ("transposed", "channels last", "sliced", "negative"):
        for rank, dtype in ((2, "float32"), (4, "float32"), (4, "float64"), (5, "float32")):
            if layout == "channels last" and rank == 2:
                continue
            values = Values(SHAPES[rank], 0, dtype, layout=layout)
            dy = Values(SHAPES[rank], 1, dtype, layout=layout)
            cases.append(
                case(
                    "BN-14",
                    f"{layout.replace(' ', '-')}-rank-{rank}-{dtype}",
                    f"Input and gradient that lie {layout} in memory.",
                    "reads memory in its order and ignores the strides",
                    train(values, "y"),
                    back(dy, *ALL_GRADIENTS),
                    infer(dy),
                    dtype=dtype,
                )
            )
    cases += [
        case(
            "BN-14",
            "mixed",
            "x and dy lie differently, and inference sees a third layout.",
            "takes dy's layout for x's",
            infer(usual(seed=2, layout="negative"), "y"),
            train(usual(layout="channels last"), "y"),
            back(usual(seed=1, layout="transposed"), *ALL_GRADIENTS),
        ),
        case(
            "BN-14",
            "bits-across-layouts",
            "The bits of the contiguous input from one that lies channels last.",
            "differs in the last bits, which it may",
            train(usual(layout="channels last"), "y"),
            back(usual(seed=1, layout="channels last"), *ALL_GRADIENTS),
            verdict="may differ",
            against="bits",
        ),
    ]
    everything: tuple[Observed, ...] = ("y", *MOVING)
    for name, shape, dtype in (
        ("rank-2", (37, 19), "float32"),
        ("rank-4", (5, 4, 7, 9), "float32"),
        ("float64", (5, 4, 7, 9), "float64"),
        ("float16", (5, 4, 7, 9), "float16"),
        ("many-samples", (700, 3), "float32"),
        ("many-chunks", (300, 2, 11, 11), "float32"),
        ("long-rows", (3, 2, 1300), "float32"),
        ("threads", (8, 24, 40, 40), "float32"),
        ("blocks", (2, 1, 140000), "float32"),
    ):
        steps = 10 if shape[0] == 5 else 1
        cases.append(
            case(
                "BN-15",
                name,
                f"The bits of the reference, twice, over {steps} training steps, input of shape {shape}.",
                "sums in an order that depends on threads, processor or luck, or in another than the specified",
                *(
                    step
                    for seed in range(steps)
                    for step in (
                        train(Values(shape, seed, dtype), *everything),
                        back(Values(shape, seed + 50, dtype), *ALL_GRADIENTS),
                    )
                ),
                infer(Values(shape, 99, dtype), "y"),
                back(Values(shape, 98, dtype), *ALL_GRADIENTS),
                features=shape[1],
                dtype=dtype,
                against="bits",
            )
        )
    return cases
