"""Whitening: its numbered clauses, and the parameters that a layer may choose.

BatchNorm approximates whitening, which gives the channels mean 0, variance 1 and no correlation. The article derives it by PCA
and rejects it for its cost, which ``multibn bench --whitening`` measures. Sources: the article; Kessy, Lewin & Strimmer, "Optimal
whitening and decorrelation" (2018), for ZCA; Huang et al., "Decorrelated Batch Normalization" (2018), for the layer; Huang et
al., "Iterative Normalization" (2019), for Newton's iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from multibn.spec.parameters import check_features, one_of, real_number

Kind = Literal["zca", "pca", "newton"]

CLAUSES: Final[Mapping[str, str]] = {
    "WH-01": (
        "Input as in BN-01: x of rank >= 2, C channels on axis 1, m values per channel. The channels are cut, in their order, "
        "into equal groups of d = C/groups; each group is whitened on its own. Below, X is the (d, m) matrix of a group."
    ),
    "WH-02": "Batch statistics: mean = X 1/m, Sigma = (X-mean)(X-mean)^T/m, of the values as given, before any rounding.",
    "WH-03": (
        "Whitening: Xhat = W (X-mean), with S = Sigma + eps I, eps finite and > 0, honoured however small. zca: W = S^(-1/2), "
        "the symmetric one. pca: W = L^(-1/2) U, the rows of U the eigenvectors of S, the largest eigenvalue first; the first "
        "component of an eigenvector that is at least half as large as its largest is positive. newton: N = S/tr(S), P_0 = I, "
        "P_(k+1) = (3 P_k - P_k^3 N)/2, W = P_T/sqrt(tr(S)) with T = steps."
    ),
    "WH-04": (
        "y = gamma*xhat + beta, a gamma and a beta for each row of Xhat. scale=False: there is no gamma. center=False: there is "
        "no beta. Neither is overwritten."
    ),
    "WH-05": (
        "Moving statistics: the moving mean (C,), which begins as 0, and the moving covariance (groups, d, d), which begins as "
        "I. moving = momentum*moving + (1-momentum)*batch, momentum the weight of the OLD value, 0 <= momentum < 1; None: the "
        "equal-weight average of all batches. Once per training forward, never in backward. The covariance is the biased one."
    ),
    "WH-06": (
        "In inference the moving statistics whiten, by WH-03, and nothing changes. For pca that is the moving covariance's own "
        "basis: its rows may come in another order, or with another sign, than in a batch."
    ),
    "WH-07": (
        "Training gradients flow through mean, Sigma and W; in inference they do not. For zca and newton they exist and are "
        "right for all eigenvalues, equal ones too. For pca a gradient does not exist where two eigenvalues are equal: backward "
        "then raises, and says what to use instead. Directions without variance are the exception: theirs are held fixed."
    ),
    "WH-08": (
        "Degenerate input: a direction without variance (a constant channel, channels that depend on each other, m <= d) has "
        "xhat = 0. m = 0 and m = 1 in training are as in BN-12. A NaN or Inf stays in its group, and a group whose moving "
        "statistics would not be finite leaves them as they were."
    ),
    "WH-09": (
        "Types as in BN-10: the input's type out; statistics and parameters are float32 for half inputs. Integers are refused."
    ),
    "WH-10": (
        "Accurate: mean, Sigma, W and the gradient through them are computed in float64, and so are the moving statistics, "
        "rounded once; the products with the data in the type of the statistics, the mean taken away first. What may be lost "
        "grows with the condition of S (for pca also with the largest eigenvalue over the smallest gap): see docs/whitening.md. "
        "An implementation may promise the arithmetic of the statistics' type for all of it instead."
    ),
}
"""The specification of whitening, clause by clause. Numbers are stable."""

KINDS: Final = ("zca", "pca", "newton")


@dataclass(frozen=True)
class WhiteningSpec:
    """The parameters of one whitening layer; ``repr`` prints the code that rebuilds it.

    Args:
        eps: added to every eigenvalue of the covariance (WH-03); finite and > 0, however small.
        momentum: weight of the OLD moving statistics (WH-05), 0 <= momentum < 1, or None for the equal-weight average.
        kind: "zca", "pca" or "newton" (WH-03).
        groups: number of groups of channels (WH-01).
        steps: T of Newton's iteration; "zca" and "pca" ignore it.
        scale: whether there is a gamma (WH-04).
        center: whether there is a beta (WH-04).

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value that is not allowed.

    >>> WhiteningSpec(kind="newton")
    WhiteningSpec(eps=1e-05, momentum=0.9, kind='newton', groups=1, steps=5, scale=True, center=True)
    """

    eps: float = 1e-5
    momentum: float | None = 0.9
    kind: Kind = "zca"
    groups: int = 1
    steps: int = 5
    scale: bool = True
    center: bool = True

    def __post_init__(self) -> None:
        eps = real_number("eps", self.eps, "a finite number > 0")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(
                f"eps must be a finite number > 0, got {self.eps!r} (WH-03). It is added to every eigenvalue, for a direction "
                "without variance has eigenvalue 0; use a small number, such as the article's 1e-12."
            )
        object.__setattr__(self, "eps", eps)
        if self.momentum is not None:
            momentum = real_number("momentum", self.momentum, "a number with 0 <= momentum < 1, or None")
            if not 0 <= momentum < 1:
                raise ValueError(
                    f"momentum must be a number with 0 <= momentum < 1, or None, got {self.momentum!r} (WH-05). It is the weight "
                    "of the OLD value; PyTorch's number is the weight of the new one, so use 1 minus it."
                )
            object.__setattr__(self, "momentum", momentum)
        one_of("kind", self.kind, KINDS, "WH-03")
        for name, what, clause in (("groups", "groups of channels", "WH-01"), ("steps", "Newton steps", "WH-03")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, the number of {what}, got {value!r} ({clause}).")
        for name in ("scale", "center"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WhiteningSpec:
        """Return the spec that ``to_dict`` described; an unknown name raises TypeError, which lists the known ones."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise TypeError(f"WhiteningSpec has no parameter {name!r}; it has {', '.join(known)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict of numbers, strings and booleans, fit for JSON."""
        return asdict(self)

    def weight_of_old(self, batches: int) -> float:
        """Return the weight of the old moving statistics in the update after ``batches`` training batches (WH-05)."""
        return batches / (batches + 1) if self.momentum is None else self.momentum

    def group_size(self, num_features: int) -> int:
        """Return d, the number of channels of a group.

        Raises:
            ValueError: num_features is not an integer >= 1, or groups do not divide it.
        """
        check_features(num_features, "WH-01")
        if num_features % self.groups:
            raise ValueError(
                f"groups must divide num_features, for the groups are equal, got {self.groups} groups of {num_features} channels "
                "(WH-01). Use a divisor of the number of channels."
            )
        return num_features // self.groups
