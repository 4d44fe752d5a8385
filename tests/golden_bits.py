"""The bits that BN-15 promises: ``python tests/golden_bits.py write`` puts them into golden_bits.json.

``python tests/golden_bits.py float32 float64`` prints them as JSON, as this machine computes them, with what the
compiled code is made of.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multibn import BatchNormSpec
from multibn.layer.types import PARAMETER_TYPE, Array

FILE = Path(__file__).with_suffix(".json")
NAMES = ("y", "dx", "dgamma", "dbeta", "moving_mean", "moving_var")
STEPS = 10
SPEC = BatchNormSpec(momentum=0.9, moving_variance="unbiased")

SHAPES: dict[str, tuple[int, ...]] = {
    "one chunk for many channels": (5, 7, 3),
    "fully connected": (300, 3),  # two blocks
    "last group smaller": (4, 350, 2, 3),
    "a row in uneven chunks": (2, 2, 1300),
    "joined": (100, 3, 2),  # nine times as many short samples as one chunk takes
    "four samples at a time": (5, 2, 1100),
    "many groups": (2, 17, 31, 67),
    "staged": (70, 3, 19, 37),  # fewer groups than pieces of work, and above kernel.SERIAL
    "past the cache": (5, 16, 129),  # its rows begin at the same place of a line, its chunks at any
}


class Data(NamedTuple):
    """Input: arrays of one type, and of the type of its parameters."""

    x: list[Array]
    dy: list[Array]
    state: tuple[Array, Array, Array, Array]


def data(shape: tuple[int, ...], dtype: str) -> Data:
    """Make the input of ten steps from integers, since the streams of NumPy's random generators may change between releases."""
    size, channels = int(np.prod(shape)), shape[1]

    def values(seed: int, count: int) -> Array:
        i = np.arange(count, dtype=np.uint64) + np.uint64(seed * 1_000_003)
        i = (i ^ (i >> np.uint64(7))) * np.uint64(0x9E3779B97F4A7C15)
        i = (i ^ (i >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        return (i >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1

    level = np.arange(channels).reshape(-1, *(1,) * (len(shape) - 2)) * 3.0
    x = [((values(step, size).reshape(shape) + level) * (step + 1)).astype(dtype) for step in range(STEPS)]
    dy = [values(100 + step, size).reshape(shape).astype(dtype) for step in range(STEPS)]
    state = [values(200 + i, channels).astype(PARAMETER_TYPE[dtype]) for i in range(4)]
    return Data(x, dy, (state[0], state[1], state[2], abs(state[3])))


def hashes(subject: Any, given: Data) -> dict[str, str]:
    """Hash the results of a subject in ten training steps."""
    subject.load(*(a.copy() for a in given.state))
    found = {name: hashlib.sha256() for name in NAMES}
    for x, dy in zip(given.x, given.dy, strict=True):
        for name, array in zip(NAMES, (subject.forward(x, True), *subject.backward(dy), *subject.moving()), strict=True):
            found[name].update(np.ascontiguousarray(array).tobytes())
    return {name: each.hexdigest()[:16] for name, each in found.items()}


def golden(make: Callable[[int, BatchNormSpec], Any], dtypes: list[str], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Type -> name of the shape -> name of the array -> its hash."""
    return {dtype: {name: hashes(make(shape[1], SPEC), data(shape, dtype)) for name, shape in shapes.items()} for dtype in dtypes}


def main(*dtypes: str) -> None:
    """Compute with the kernel, and write or print.

    Args:
        dtypes: the types, or "write"; behind them "alone": compile in this process only, whose code can be inspected.
    """
    from multibn.kernel import beside
    from multibn.kernel import entry as kernel
    from multibn.numpy_backend import KernelSubject

    if dtypes[-1] == "alone":
        beside.can_start, dtypes = lambda: False, dtypes[:-1]

    if dtypes == ("write",):
        FILE.write_text(json.dumps(golden(KernelSubject, ["float16", "float32", "float64"], SHAPES), indent=1) + "\n")
        return
    start = time.monotonic()
    kernel.prepare(dtypes[0])
    seconds = time.monotonic() - start
    bits = golden(KernelSubject, list(dtypes), SHAPES)
    kernel.LARGE = 0
    past = golden(KernelSubject, list(dtypes), SHAPES)
    bodies, stats = kernel.prepare(dtypes[0]), kernel.forward_at.stats
    loaded = sum(body.cache_hits for body in bodies)
    code = "".join(body._library.get_asm_str() for body in bodies if not body.cache_hits)
    facts = {
        "registers": sorted(set(re.findall(r"\b([xyz]mm)\d", code))),
        "contracted": sorted(set(re.findall(r"\bv?fn?m(?:add|sub)\w*", code))),
        "compiled": len(bodies) - loaded,
        "loaded": loaded,
        "cache": stats.cache_path,
        "seconds": seconds,
    }
    print(json.dumps({"bits": bits, "past": past, **facts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
