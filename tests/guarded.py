"""Run the kernel's compiled bodies on buffers between inaccessible pages: a read or write outside ends the process.

``python tests/guarded.py SEEDS`` goes over the shapes of all fixed cases and of so many random ones, in every type, as contiguous
and channels-last memory, forward and backward, with and without a ReLU, in every stage. Each buffer once ends at a page that may
not be touched, and once begins behind one. It prints a line of JSON with what it ran.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from multibn.kernel import entry, plan, schedule
from multibn.kernel.lanes import ALL
from multibn.layer.types import Array
from multibn_conformance.cases.drawn import drawn
from multibn_conformance.cases.fixed import CASES

LIBC = ctypes.CDLL(None, use_errno=True)
BODY = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
LARGEST = 1 << 16
"""Values of the largest shape that is run: larger ones have the same chunks more often."""


class Guarded:
    """Memory that ends before an inaccessible page, or begins after one."""

    def __init__(self, at_end: bool) -> None:
        self._at_end = at_end
        self._kept: list[tuple[mmap.mmap, int, int]] = []

    def __call__(self, size: int, dtype: Any, fill: Any = None) -> Array:
        """Return an array with this many values."""
        page, nbytes = mmap.PAGESIZE, max(1, size) * np.dtype(dtype).itemsize
        inside = -(-nbytes // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (start, start + page + inside):
            assert LIBC.mprotect(ctypes.c_void_p(guard), page, 0) == 0
        self._kept.append((memory, start, inside + 2 * page))
        offset = page + (inside - nbytes if self._at_end else 0)
        array = np.frombuffer(memory, dtype, max(1, size), offset)
        array[:] = 0 if fill is None else fill
        return array

    def free(self) -> None:
        """Restore access, so that the memory can be unmapped."""
        for memory, start, size in self._kept:
            LIBC.mprotect(ctypes.c_void_p(start), size, mmap.PROT_READ | mmap.PROT_WRITE)
            del memory
        self._kept.clear()


def shapes(seeds: int) -> list[tuple[int, int, int]]:
    """(N, C, S) of each input of the cases, contiguous and channels-last."""
    found: dict[tuple[int, int, int], None] = {}
    for case in (*CASES.values(), *(drawn(number) for number in range(seeds))):
        for step in case.steps:
            its = step.values.shape if step.values else ()
            if len(its) >= 2 and 0 < math.prod(its) <= LARGEST:
                space = math.prod(its[2:])
                found[its[0], its[1], space] = None
                found[its[0] * space, its[1], 1] = None
    return list(found)


def stages(groups: bool, sums_needed: bool) -> Iterator[int]:
    """Return the stages of ``schedule._stages``, with and without enough groups for the threads."""
    yield from [0] if groups else range(1 if sums_needed else 2, 4)


def run(kind: str, shape: tuple[int, int, int], at_end: bool, forward: bool, groups: bool, rectify: bool, training: bool) -> None:
    """Run one pass of a body on one thread."""
    new = Guarded(at_end)
    n, channels, s = shape
    size, cut = n * channels * s, plan.plan_of(shape)
    parameter = "float64" if kind == "float64" else "float32"
    values = np.random.default_rng(0).normal(1, 1, size)
    halves = {"int16": 0x3C00, "uint16": 0x3F80}  # the bits of 1
    x, dy = (new(size, kind, halves.get(kind, values)) for _ in range(2))
    y, (gamma, beta, mean, var, dgamma, dbeta) = new(size, kind), (new(channels, parameter, 1) for _ in range(6))
    saved, sums, means = new(2 * channels, "float64", 1), new(4 * cut.blocks * channels, "float64"), new(3 * channels, "float64")
    lanes, taken = new(ALL, "float64"), new(1, "int64")
    its = new(1, schedule.CALL).view(np.recarray)[0]
    arrays = {"x": x, "y": y, "dy": dy, "dx": y, "gamma": gamma, "beta": beta, "moving_mean": mean, "moving_var": var}
    arrays |= {"dgamma": dgamma, "dbeta": dbeta, "saved": saved, "sums": sums, "means": means, "lanes": lanes, "taken": taken}
    for name, array in arrays.items():
        its[name] = array.ctypes.data
    its["n"], its["channels"], its["s"], its["blocks"] = n, channels, s, cut.blocks
    its["unbiased"] = its["use_batch"] = its["update"] = its["through"] = training
    its["rectify"], its["large"], its["eps"], its["old"] = rectify, 0 if groups else 1 << 60, 1e-5, 0.9
    bodies = entry.prepare(kind)
    body = BODY((bodies.forward if forward else bodies.backward).address)
    for stage in stages(groups, training or not forward):
        count = cut.groups if stage == 0 else channels if stage == 2 else cut.groups * cut.blocks
        its["stage"], its["count"], its["pieces"], its["threads"], its["seat"] = stage, count, 1, 1, 0
        taken[:] = 0
        body(its.__array_interface__["data"][0] if hasattr(its, "__array_interface__") else 0)
    del x, dy, y, gamma, beta, mean, var, dgamma, dbeta, saved, sums, means, lanes, taken, its, arrays
    new.free()


def main(seeds: int, kinds: list[str]) -> None:
    """Run everything."""
    asked, passes = shapes(seeds), 0
    for kind in kinds:
        for shape in asked:
            for at_end in (True, False):
                for forward in (True, False):
                    for groups in (True, False):
                        for rectify, training in ((False, True), (True, True), (False, False)):
                            run(kind, shape, at_end, forward, groups, rectify, training)
                            passes += 1
    print(json.dumps({"shapes": len(asked), "types": len(kinds), "passes": passes}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] or ["float32", "float64", "int16", "uint16"])
