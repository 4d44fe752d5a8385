"""What of PyTorch's own test suite for BatchNorm our layers refuse or do differently, on purpose."""

from __future__ import annotations

from typing import Final, NamedTuple


class Difference(NamedTuple):
    """A difference.

    Args:
        where: a pattern (of fnmatch) of the tests' names: entry, mode, type, sample, property.
        error: what the test ends with instead.
        message: a regular expression that the error's text matches.
        reason: why it is so.
    """

    where: str
    error: type[Exception]
    message: str
    reason: str


DIFFERENCES: Final = [
    Difference(
        "nn.BatchNorm* error eps *",
        ValueError,
        r"^eps must be a finite number > 0, got -?[01]\.0 \(BN-03\)",
        "An impossible eps is refused when the layer is made, and not at its first forward.",
    ),
    Difference(
        "nn.BatchNorm* train * zero_batch state",
        AssertionError,
        r"num_batches_tracked",
        "An empty batch updates nothing (BN-12). PyTorch counts it, and the averages of momentum=None are wrong from then on.",
    ),
    Difference(
        "*batch_norm* momentum=-*",
        ValueError,
        r"^momentum must be ",
        "A negative weight of the new value is an extrapolation and no average: it makes negative variances (BN-05).",
    ),
    Difference(
        "nn.functional.batch_norm * shape=(0,)*",
        ValueError,
        r"^expected input of rank 2 or 3, got rank 1, shape \(0,\) \(BN-01\)",
        "Without a channel axis there is no BatchNorm; PyTorch's own layers refuse it too, its function takes it if it is empty.",
    ),
]
