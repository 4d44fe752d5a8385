"""The clauses of synchronised statistics; those of BatchNorm are in ``multibn.spec.clauses``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CLAUSES: Final[Mapping[str, str]] = {
    "SY-01": "The batch is that of all ranks of the group: m, mean and var are over all their values; BN-01 to BN-12 hold.",
    "SY-02": (
        "Sums are exact: mean and var are the float64 nearest to the exact ones, sum(dy) and sum(dy*(x-mean)) likewise for that "
        "mean. So y, dx and the moving statistics have the same bits for every split of the batch, order of samples, memory "
        "layout, number of ranks, number of threads, and framework."
    ),
    "SY-03": "A rank may have any number of samples, also none; it takes part in every exchange.",
    "SY-04": "m = 0 and m = 1 (BN-12) are judged over the group, and every rank does the same.",
    "SY-05": "One update per forward, the same bits on all ranks; a recomputation exchanges again and updates nothing.",
    "SY-06": (
        "Gradients of gamma and beta are those of the rank's own samples; their exact sum over the ranks does not depend on the "
        "split."
    ),
    "SY-07": (
        "Ranks at different layers, passes or settings, or of which only some need the gradient of x, raise on all ranks, before "
        "anything is changed."
    ),
    "SY-08": "A rank that refuses its input tells the others; all raise, and the group stays usable.",
    "SY-09": "No wait is endless: after the group's timeout an error names the layer, the call and the rank.",
    "SY-10": "Inference, and a group of one, exchange nothing; a group of one has the bits of SY-02 all the same.",
    "SY-11": "A value that is not finite, on any rank, makes its channel NaN on all (BN-11).",
}
"""The specification, clause by clause."""
