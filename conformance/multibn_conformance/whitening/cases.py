"""The cases, by clause."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from multibn.whitening.spec import CLAUSES, KINDS, WhiteningSpec

from .case import ALL_GRADIENTS, MOVING, Data, Observed, Step, WhiteningCase

SHAPES: Final = {2: (13, 4), 3: (5, 4, 3), 4: (3, 4, 3, 2), 5: (3, 4, 1, 3, 2)}
EVERYTHING: tuple[Observed, ...] = ("y", *MOVING)
_CASES: list[WhiteningCase] = []


def _add(clause: str, name: str, comment: str, catches: str, *steps: Step, dtype: str = "float32", **spec: Any) -> None:
    features = steps[0].data.shape[1]
    given = WhiteningSpec(**{"momentum": 0.5, **spec})
    _CASES.append(WhiteningCase(f"{clause}-{name}", clause, comment, catches, steps, features, given, dtype))


def _train(data: Data, *observe: Observed) -> Step:
    return Step("train", data, observe or ("y",))


def _infer(data: Data, *observe: Observed) -> Step:
    return Step("infer", data, observe or ("y",))


def _back(like: Data, *observe: Observed) -> Step:
    """Backward with a dy of the input's shape and type."""
    dy = Data(like.shape, like.seed + 50, like.dtype, spectrum=None)
    return Step("backward", dy, observe or ALL_GRADIENTS)


_USUAL = Data(SHAPES[4])
_SIX = Data((4, 6, 5))

for rank, shape in SHAPES.items():
    x = Data(shape, seed=rank)
    _add(
        "WH-01",
        f"rank-{rank}",
        f"Input of rank {rank}.",
        "reduces other axes than all but axis 1",
        _train(x, *EVERYTHING),
        _back(x),
    )
for groups in (2, 3, 6):
    _add(
        "WH-01",
        f"groups-{groups}",
        f"Six channels in {groups} groups.",
        "cuts the channels in another order, or not at all",
        _train(_SIX, *EVERYTHING),
        _back(_SIX),
        groups=groups,
    )
_add(
    "WH-01", "channels", "Five channels for four.", "takes what it is not made for", _train(_USUAL), Step("refuse", Data((7, 5)))
)

_add("WH-02", "biased", "Few values, so that m and m-1 differ.", "divides by m-1", _train(Data((7, 3)), *EVERYTHING))
_add(
    "WH-02",
    "mean",
    "Channels far from 0.",
    "takes E[xx] - E[x]E[x], or no mean",
    _train(Data((9, 3, 4), mean=100.0), *EVERYTHING),
)

for kind in KINDS:
    _add("WH-03", kind, f"The output of {kind}.", "computes another matrix", _train(_USUAL), kind=kind)
    _add(
        "WH-03",
        f"{kind}-eps",
        "eps as large as the eigenvalues.",
        "leaves eps out, adds it to the root, or takes max(l, eps)",
        _train(_USUAL),
        kind=kind,
        eps=0.75,
    )
    _add(
        "WH-03",
        f"{kind}-small-eps",
        "eps below what counts, and eigenvalues as small.",
        "has an eps of its own, or a floor",
        _train(Data((12, 3, 2), dtype="float64", spectrum=(3e-8, 1e-8, 4e-9), mean=0.0)),
        kind=kind,
        eps=1e-12,
        dtype="float64",
    )
for steps in (1, 3, 7):
    _add(
        "WH-03",
        f"newton-{steps}",
        f"{steps} Newton steps.",
        "takes another number of steps",
        _train(_USUAL),
        kind="newton",
        steps=steps,
    )
for seed in range(4):
    _add(
        "WH-03",
        f"pca-sign-{seed}",
        "Order and sign of the eigenvectors.",
        "leaves order and sign to its eigensolver",
        _train(Data((15, 4), seed=20 + seed)),
        kind="pca",
    )

for scale, center in ((True, True), (False, True), (True, False), (False, False)):
    _add(
        "WH-04",
        f"scale-{scale}-center-{center}".lower(),
        "gamma and beta, where the spec has them.",
        "ignores gamma or beta, has them where there are none, or scales before it rotates",
        _train(_USUAL),
        _back(_USUAL),
        scale=scale,
        center=center,
    )

for momentum in (0.1, 0.0, None):
    data = [replace(_USUAL, seed=seed) for seed in (1, 2, 3)]
    _add(
        "WH-05",
        f"momentum-{momentum}".lower(),
        "Three updates.",
        "takes momentum for the weight of the new value, or updates twice",
        *(_train(each, *MOVING) for each in data),
        momentum=momentum,
    )
_add(
    "WH-05",
    "backward",
    "The update is in forward; backward makes none.",
    "updates in backward",
    _train(_USUAL, *MOVING),
    _back(_USUAL, "unchanged"),
    momentum=0.1,
)

for kind in KINDS:
    _add(
        "WH-06",
        f"{kind}-loaded",
        "Inference by the statistics that were loaded.",
        "whitens by the batch in inference, or updates",
        _infer(_USUAL, "y", "unchanged"),
        _back(_USUAL),
        kind=kind,
    )
    _add(
        "WH-06",
        kind,
        "Inference, after one update: output and gradients.",
        "whitens by the batch in inference, or updates",
        _train(_USUAL),
        _infer(replace(_USUAL, seed=9), "y", "unchanged"),
        _back(_USUAL),
        kind=kind,
    )

for kind in KINDS:
    for rank in (2, 4):
        x = Data(SHAPES[rank], seed=30 + rank)
        _add(
            "WH-07",
            f"{kind}-rank-{rank}",
            f"Gradients of {kind}.",
            "takes mean, covariance or matrix for constants, or has a wrong derivative of one",
            _train(x),
            _back(x),
            kind=kind,
        )
    _add(
        "WH-07",
        f"{kind}-float64",
        f"Gradients of {kind} in float64, eigenvalues far apart.",
        "has a wrong derivative",
        _train(replace(_USUAL, dtype="float64")),
        _back(replace(_USUAL, dtype="float64")),
        kind=kind,
        dtype="float64",
    )
for kind in ("zca", "newton"):
    equal = Data((8, 4), planted="unit vectors", dtype="float64")
    near = Data((11, 4), spectrum=(2.0, 2.0, 2.0, 0.5))
    nearer = Data((11, 4), spectrum=(2.0, 2.0 + 1e-13, 2.0 - 1e-13, 0.5), dtype="float64", mean=0.0)
    for name, x in (("equal", equal), ("near", near), ("nearer", nearer)):
        _add(
            "WH-07",
            f"{kind}-{name}",
            "Equal or nearly equal eigenvalues.",
            "divides by the difference of eigenvalues",
            _train(x),
            _back(x),
            kind=kind,
            dtype=x.dtype,
        )
_add(
    "WH-07",
    "pca-equal",
    "PCA where eigenvalues are equal: an error.",
    "gives NaN, or any number, for a gradient that does not exist",
    Step("train", equal),
    Step("refuse backward", Data((8, 4), 50, "float64", spectrum=None)),
    kind="pca",
    dtype="float64",
)
_near_pca = Data((11, 3), spectrum=(2.0, 1.999, 0.5), dtype="float64")
_add(
    "WH-07",
    "pca-near",
    "PCA where eigenvalues are a thousandth apart.",
    "holds near eigenvectors fixed",
    _train(_near_pca),
    _back(_near_pca),
    kind="pca",
    dtype="float64",
)

for kind in ("zca", "pca"):
    x = Data((9, 3, 2), planted="constant channel", spectrum=(4.0, 2.0, 1.0))
    _add(
        "WH-08",
        f"{kind}-constant",
        "A constant channel.",
        "divides by a variance of 0, or makes the rounding large",
        _train(x, *EVERYTHING),
        _back(x),
        kind=kind,
        eps=1e-2,
    )
for kind in ("zca", "newton"):
    dependent, few = Data((9, 3, 2), planted="dependent channels"), Data((3, 5))
    _add(
        "WH-08",
        f"{kind}-dependent",
        "A channel that is twice another.",
        "inverts a singular matrix",
        _train(dependent, *EVERYTHING),
        _back(dependent),
        kind=kind,
        eps=1e-2,
    )
    _add(
        "WH-08",
        f"{kind}-few",
        "Three values of five channels.",
        "inverts a singular matrix",
        _train(few, *EVERYTHING),
        _back(few),
        kind=kind,
        eps=1e-2,
    )
for kind in KINDS:
    _add(
        "WH-08",
        f"{kind}-single",
        "One channel: BatchNorm.",
        "cannot do without a matrix",
        _train(Data((7, 1, 3)), *EVERYTHING),
        _back(Data((7, 1, 3))),
        kind=kind,
    )
for bad in ("nan", "inf"):
    x = replace(_SIX, planted=bad)
    _add(
        "WH-08",
        bad,
        "A NaN or Inf in one of two groups, then an update.",
        "spreads it to other groups, or into the moving statistics",
        _train(x, *EVERYTHING),
        _back(x),
        _train(replace(_SIX, seed=3), *MOVING),
        groups=2,
    )
_empty = Data((0, 4, 3), spectrum=None)
_add(
    "WH-08",
    "empty",
    "No values.",
    "divides by 0, or counts the batch",
    _train(_empty, "y", "unchanged"),
    _back(_empty),
    momentum=None,
)
_add("WH-08", "one-value", "One value per channel.", "returns beta whatever the input", Step("refuse", Data((1, 4))))

for dtype in ("float16", "float64"):
    x = replace(_USUAL, dtype=dtype)
    _add(
        "WH-09", dtype, f"{dtype} input.", "computes in, or returns, another type", _train(x, *EVERYTHING), _back(x), dtype=dtype
    )
_add("WH-09", "integers", "int32 input.", "takes integers", Step("refuse", replace(_USUAL, dtype="int32", mean=9.0)))

for dtype in ("float32", "float64"):
    x = replace(_USUAL, dtype=dtype, mean=1e5)
    _add(
        "WH-10",
        f"mean-{dtype}",
        "A mean 1e5 times the deviation.",
        "takes E[xx] - E[x]E[x]",
        _train(x, *EVERYTHING),
        _back(x),
        dtype=dtype,
    )
    x = Data((40, 4, 5), spectrum=(100.0, 1.0, 1e-2, 1e-4), dtype=dtype)
    _add(
        "WH-10",
        f"condition-{dtype}",
        "Eigenvalues six decades apart.",
        "computes in float32",
        _train(x, *EVERYTHING),
        _back(x),
        dtype=dtype,
        eps=1e-9,
    )

CASES: Final[dict[str, WhiteningCase]] = {case.id: case for case in _CASES}
"""Every case, by its id."""

assert len(CASES) == len(_CASES)
assert {case.clause for case in CASES.values()} == set(CLAUSES), "a clause without a case"
