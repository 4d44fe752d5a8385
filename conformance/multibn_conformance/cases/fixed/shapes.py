"""Cases of BN-01."""

from __future__ import annotations

from multibn_conformance.cases.case import SHAPES, Case, Step, back, case, train, usual
from multibn_conformance.cases.inputs import Values


def shapes() -> list[Case]:
    """Ranks and shapes, taken and refused."""
    cases = []
    for dtype in ("float32", "float64"):
        for rank in SHAPES:
            cases.append(
                case(
                    "BN-01",
                    f"rank-{rank}-{dtype}",
                    f"Output in training, rank {rank}.",
                    "reduces over the wrong axes, or takes another axis for the channels",
                    train(usual(rank, dtype=dtype), "y"),
                    dtype=dtype,
                )
            )
    for name, shape in {
        "one-channel": (6, 1, 5),
        "many-channels": (3, 601, 2),
        "wide-and-flat": (2, 1031),
        "prime-m": (1031, 2),
        "long-rows": (2, 2, 1543),
        "one-sample": (1, 3, 4, 5),
        "one-pixel": (7, 3, 1, 1),
    }.items():
        cases.append(
            case(
                "BN-01",
                name,
                f"Output and gradient in training, shape {shape}.",
                "is right for round sizes only: blocks of channels, the last partial block, axes of length 1",
                train(Values(shape), "y"),
                back(Values(shape, 1), "dx"),
                features=shape[1],
            )
        )
    for name, shape, why in (
        ("rank-1", (3,), "takes a single sample for a batch"),
        ("more-channels", (4, 4, 3, 5), "broadcasts or reads past the end of its parameters"),
        ("fewer-channels", (4, 2, 3, 5), "leaves channels out silently"),
        ("channels-last", (4, 3, 5, 6), "guesses where the channels are"),
    ):
        cases.append(
            case(
                "BN-01",
                f"refuses-{name}",
                f"Input of shape {shape} for {(6 if name == 'channels-last' else 3)} features is an error, and the state stays.",
                why,
                Step("refuse", Values(shape), ("unchanged",)),
                features=6 if name == "channels-last" else 3,
                verdict="must raise",
            )
        )
    return cases
