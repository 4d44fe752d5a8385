"""Run random programs in threads, forks and processes, over every backend: the bits must agree, and memory must stay bounded.

``make soak`` runs ``python tests/soak.py 600``. Each program draws a shape, a type, a spec and values from its seed, and takes a
few training steps with the layer of a backend. Every backend must give the bits of the NumPy kernel: from any thread, in a forked
child and in a new process. It prints a line of JSON: programs by place, differences, and the growth of memory.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import random
import sys
import threading
import time
import warnings
from collections import Counter
from typing import Any

import numpy as np

from multibn import BatchNormSpec
from multibn.backend import Backend
from multibn_conformance.subjects.backends import backends

GROWTH_MIB = 400
"""Memory that the process may grow by after its first minute, or its first fifth."""


def step(backend: Backend, seed: int) -> str:
    """A digest of y, dx, dgamma, dbeta and the moving statistics over a few steps of the program of a seed."""
    rng = np.random.default_rng(seed)
    channels = int(rng.choice([1, 2, 3, 7, 16, 33, 64]))
    space = [(), (5,), (4, 4), (9, 7), (28, 28), (2, 3, 4)][rng.integers(6)]
    shape = (int(rng.integers(2, 40)), channels, *space)
    dtype = str(rng.choice(["float32", "float32", "float64"]))
    spec = BatchNormSpec(
        eps=float(rng.choice([1e-5, 1e-12])),
        momentum=[0.9, 0.5, None][rng.integers(3)],
        moving_variance=["biased", "unbiased"][rng.integers(2)],  # type: ignore[arg-type]
    )
    subject = backend.make(channels, spec, "cpu", "kernel")
    gamma, beta = (rng.normal(1, 0.5, channels).astype(dtype) for _ in range(2))
    subject.load(gamma, beta, np.zeros(channels, dtype), np.ones(channels, dtype))
    digest = hashlib.sha256()
    for _ in range(3):
        x, dy = (rng.normal(rng.normal(0, 10), 2, shape).astype(dtype) for _ in range(2))
        for array in (subject.forward(x, True), *subject.backward(dy), *subject.moving()):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def forked(backend: Backend, seed: int) -> str:
    """``step`` in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, step(backend, seed).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        found = file.read()
    os.waitpid(child, 0)
    return found


def process(name: str, seeds: list[int]) -> list[str]:
    """``step`` of several seeds in a new process."""
    warnings.simplefilter("ignore")
    ((backend, _),) = backends([name])[0]
    return [step(backend, seed) for seed in seeds]


def resident() -> float:
    """Return the resident MiB of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(seconds: float, first: int = 0) -> int:
    """Run until the time is over; return 1 if a digest differs or memory grows."""
    warnings.simplefilter("ignore")
    present = {each.name: each for each, _ in backends()[0] if "kernel" in each.implementations}
    reference = present["numpy"]
    start, counts, differ = time.monotonic(), Counter[str](), []
    lock, seeds, base = threading.Lock(), iter(range(first, 1 << 60)), 0.0

    def compare(place: str, name: str, seed: int, found: str, expected: str) -> None:
        with lock:
            counts[f"{name} in {place}"] += 1
            if found != expected:
                differ.append({"place": place, "backend": name, "seed": seed})

    def work(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() - start < seconds:
            with lock:
                seed = next(seeds)
            expected = step(reference, seed)
            for name in present:
                if name == "mxnet" and number:  # MXNet's own engine is driven from one thread
                    continue
                compare("threads", name, seed, step(present[name], seed), expected)
            if number == 0 and chance.random() < 0.2:
                name = chance.choice(
                    [each for each in present if each != "mxnet"]
                )  # MXNet forbids a fork with its engine running
                compare("forks", name, seed, forked(present[name], seed), expected)

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ThreadPoolExecutor(4) as threads, concurrent.futures.ProcessPoolExecutor(1, context) as processes:
        running = [threads.submit(work, number) for number in range(4)]
        while time.monotonic() - start < seconds:
            for name in present:
                with lock:
                    some = [next(seeds) for _ in range(5)]
                for seed, found in zip(some, processes.submit(process, name, some).result(), strict=True):
                    compare("processes", name, seed, found, step(reference, seed))
            if not base and time.monotonic() - start > min(60, seconds / 5):
                base = resident()
        for each in running:
            each.result()
    grown = resident() - base
    result: dict[str, Any] = {"seconds": round(time.monotonic() - start), "programs": dict(sorted(counts.items()))}
    result |= {"differences": differ, "grown_mib": round(grown), "allowed_mib": GROWTH_MIB}
    print(json.dumps(result))
    return int(bool(differ) or grown > GROWTH_MIB)


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
