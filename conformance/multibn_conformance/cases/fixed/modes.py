"""Cases of BN-07 to BN-09."""

from __future__ import annotations

from multibn.spec.batchnorm import BatchNormSpec
from multibn_conformance.cases.case import (
    ALL_GRADIENTS,
    HALF_MOMENTUM,
    MOVING,
    SHAPES,
    Case,
    Step,
    back,
    case,
    infer,
    train,
    usual,
)
from multibn_conformance.cases.inputs import ZERO_GAMMA, Values


def modes() -> list[Case]:
    """Inference, gradients and the switches."""
    cases = []
    for dtype in ("float32", "float64"):
        for rank in SHAPES:
            values, dy = (usual(rank, dtype=dtype), usual(rank, 1, dtype))
            cases += [
                case(
                    "BN-07",
                    f"rank-{rank}-{dtype}",
                    "Inference normalises with the moving statistics and leaves them.",
                    "normalises with the batch, or updates in inference",
                    infer(values, "y", "unchanged"),
                    infer(dy, "y", "unchanged"),
                    dtype=dtype,
                ),
                case(
                    "BN-08",
                    f"training-rank-{rank}-{dtype}",
                    "Gradients in training, by differentiating the forward.",
                    "takes mean and variance for constants: the article's bias that grows without bound",
                    train(values),
                    back(dy, *ALL_GRADIENTS),
                    dtype=dtype,
                    source="Ioffe & Szegedy, section 2",
                ),
                case(
                    "BN-08",
                    f"inference-rank-{rank}-{dtype}",
                    "Gradients in inference: mean and variance are constants.",
                    "takes the training formula",
                    infer(values),
                    back(dy, *ALL_GRADIENTS, "unchanged"),
                    dtype=dtype,
                    source="MXNet: record(train_mode=False) with backward()",
                ),
            ]
    cases += [
        case(
            "BN-07",
            "after-training",
            "Inference after a training step leaves the statistics that training made.",
            "updates in inference, or keeps the last mode",
            train(usual()),
            infer(usual(seed=1), "unchanged"),
            infer(usual(seed=1), "unchanged"),
        ),
        case(
            "BN-07",
            "after-frozen-training",
            "Inference after a training step that updated nothing normalises with the statistics that were loaded.",
            "normalises with what training left behind",
            train(usual()),
            infer(usual(seed=1), "y", "unchanged"),
            spec=BatchNormSpec(update_statistics=False),
        ),
        case(
            "BN-07",
            "one-value",
            "One value per channel is enough in inference.",
            "refuses it, or normalises with the batch",
            infer(Values((1, 3)), "y", "unchanged"),
        ),
        case(
            "BN-08",
            "constant-dy",
            "The same dy everywhere: moving a whole channel changes nothing, so dx is 0.",
            "lets no gradient through the mean",
            train(usual()),
            back(usual(seed=1, kind="constant"), "dx"),
        ),
        case(
            "BN-08",
            "dy-along-x",
            "dy is x itself: scaling a channel changes next to nothing, so dx is next to 0.",
            "lets no gradient through the variance",
            train(usual()),
            back(usual(), "dx"),
        ),
        case(
            "BN-08",
            "twice",
            "Two training steps: the gradients of the second are its own.",
            "adds them to the first's",
            train(usual()),
            back(usual(seed=1), *ALL_GRADIENTS),
            train(usual(seed=2)),
            back(usual(seed=3), *ALL_GRADIENTS),
        ),
        case(
            "BN-08",
            "gamma-0",
            "A gamma of 0 has a gradient, and its channel's dx is 0.",
            "finds xhat by dividing by gamma",
            Step("load", Values((3,), ZERO_GAMMA)),
            train(usual()),
            back(usual(seed=1), *ALL_GRADIENTS),
            source="inplace_abn; residual blocks that begin with a gamma of 0",
        ),
        case(
            "BN-08",
            "the-last-forward",
            "Training, then inference of other values, then backward: the inference's gradient.",
            "keeps what the training forward saved",
            train(usual()),
            infer(usual(seed=1)),
            back(usual(seed=2), *ALL_GRADIENTS),
            spec=BatchNormSpec(update_statistics=False),
        ),
    ]
    for update in (True, False):
        spec = BatchNormSpec(momentum=HALF_MOMENTUM, normalize_with="moving", update_statistics=update)
        cases.append(
            case(
                "BN-09",
                f"moving-{('updated' if update else 'frozen')}",
                f"Training with the moving statistics as they were before, update_statistics={update}.",
                "normalises with the batch, or with what it has just updated; ties one switch to another",
                train(usual(), "y", *(MOVING if update else ("unchanged",))),
                back(usual(seed=1), *ALL_GRADIENTS, "unchanged"),
                train(usual(seed=2), *(MOVING if update else ("unchanged",))),
                spec=spec,
            )
        )
    cases += [
        case(
            "BN-09",
            "batch-updated",
            "Every training step normalises with its own batch, the later ones too.",
            "normalises with the moving statistics once there are some",
            *(train(usual(seed=seed), "y") for seed in range(3)),
        ),
        case(
            "BN-09",
            "batch-frozen",
            "Training with the batch's statistics, update_statistics=False.",
            "updates all the same",
            train(usual(), "y", "unchanged"),
            back(usual(seed=1), *ALL_GRADIENTS, "unchanged"),
            spec=BatchNormSpec(update_statistics=False),
        ),
        case(
            "BN-09",
            "not-learned",
            "learn_affine=False: gamma and beta act, and get no gradient.",
            "drops them, or learns them; freezes the statistics with them",
            train(usual(), "y", *MOVING),
            back(usual(seed=1), *ALL_GRADIENTS),
            spec=BatchNormSpec(momentum=HALF_MOMENTUM, learn_affine=False),
        ),
        case(
            "BN-09",
            "one-value-frozen",
            "One value per channel can be trained on if its statistics are not needed.",
            "refuses it",
            train(Values((1, 3)), "y", "unchanged"),
            spec=BatchNormSpec(normalize_with="moving", update_statistics=False),
        ),
    ]
    return cases
