"""The specification, clause by clause, and the constants of BN-15.

The clauses follow Ioffe & Szegedy, "Batch Normalization" (2015), section 3, and settle what frameworks leave open. Their
numbers are stable; docstrings, conformance cases and failure messages carry them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

LANES: Final = 2048
"""BN-15: a row (the values of one sample and channel) is cut into the fewest equal chunks of at most this many values."""


BLOCK: Final = 64
"""BN-15: this many chunks are added, position by position and in order, before the positions are folded in halves."""


JOINED: Final = 8
"""BN-15: at most one in this many samples of the batch are joined, since lanes used once cost more than they save."""


PIVOT: Final = 4
"""BN-15: deviations of a block are taken from the mean of its first chunks, this many."""


CLAUSES: Final[Mapping[str, str]] = {
    "BN-01": "Input of rank >= 2 with a channel axis (default 1). All other axes are reduced; m values per channel.",
    "BN-02": "Batch statistics: mean = sum(x)/m, var = sum((x-mean)^2)/m, of the values as given, before any rounding.",
    "BN-03": "Normalise: xhat = (x-mean)/sqrt(var+eps). eps is inside the root, finite and > 0, and honoured however small.",
    "BN-04": "y = gamma*xhat + beta. scale=False: there is no gamma. center=False: there is no beta. Neither is overwritten.",
    "BN-05": (
        "Moving statistics: moving = momentum*moving + (1-momentum)*batch, with momentum the weight of the OLD value, "
        "0 <= momentum < 1; None: the equal-weight average of all batches so far, without the initial state. "
        "Once per training forward: never in backward, never twice for one forward (activation recomputation included)."
    ),
    "BN-06": "The moving variance takes the biased batch variance, or the unbiased one (times m/(m-1)), as the spec says.",
    "BN-07": "In inference the moving statistics normalise, and nothing changes.",
    "BN-08": "Training gradients flow through mean and var. In inference they do not.",
    "BN-09": (
        "Three switches are independent: normalise with batch or moving statistics (the moving ones as they were before this "
        "forward); update them or not; learn gamma and beta or not."
    ),
    "BN-10": (
        "Types: float16, bfloat16, float32, float64 in, the same type out. Statistics and parameters are float32 for half "
        "inputs. Integers are refused."
    ),
    "BN-11": (
        "A NaN or Inf stays in its channel. A channel whose moving statistics would not be finite, in their type, after an "
        "update (so where the batch statistics are not) leaves both as they were."
    ),
    "BN-12": (
        "m = 0 in training: empty output, zero parameter gradients, no update of any kind. m = 1 in training, where batch "
        "statistics are used: an error that says why and what to do."
    ),
    "BN-13": "State round-trips: names, values, mode; it follows the layer across devices and types.",
    "BN-14": (
        "Memory layout and strides (channels_last, slices, transposes) do not change the meaning: the same values give the "
        "same result within BN-16. Equal bits across memory layouts are not promised."
    ),
    "BN-15": (
        "Reproducible: on CPU the same input gives the same bits in NumPy, PyTorch, MXNet and JAX, for every number of threads, "
        "in every run, and on every IEEE-754 machine. The order of summation is therefore part of the specification: samples of "
        f"C*S <= {LANES // 2} values are joined, {LANES}//(C*S) or N//{JOINED} at a time, whichever is less; each row of S "
        f"values lies in ceil(S/{LANES}) chunks of equal length (the last may be shorter); {BLOCK} chunks at a time are added "
        "position by position, the joined samples folded in halves, then the positions, then the sums of these blocks. "
        "Deviations are taken from the mean of the first "
        f"{PIVOT} chunks of their block, and moved to the mean of all when the blocks are put together. float64, no fast-math, "
        "no contraction; rounded to nearest and with denormals kept, whatever mode the calling thread has set."
    ),
    "BN-16": (
        "Accurate: |result - exact value of these formulas for the given inputs| <= 0.51 ulp of the output's type (1 ulp for "
        "float64) + 1e-14 * kappa * scale, with kappa = sqrt(1 + mean^2/var) and scale = |gamma| (+ |beta| for float64) for y, "
        "|gamma|*max|dy|/sqrt(var+eps) for dx, the sum of the absolute terms for dgamma and dbeta; for mean/std up to 1e6 and m "
        "up to 1e8. For float64, |gamma| counts max(1, |xhat|) times: a far outlier has float64's own roundings. Moving "
        "statistics: 0.51 ulp per update, and what float64 itself rounds in it."
    ),
}
"""The specification, clause by clause."""
