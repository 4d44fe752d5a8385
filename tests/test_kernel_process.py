"""The kernel leaves its process as it was, survives fork, serves several callers, keeps to limits, says when it compiles."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import subprocess
import sys
import time
import types
from typing import Any

import numpy as np
import pytest

from multibn import BatchNormSpec
from multibn.kernel import arrays, cache, jit, threads
from multibn.kernel import entry as kernel

SHAPE = (70, 3, 37, 39)
"""Enough for threads."""


def step(seed: int, dtype: Any = np.float32) -> list[bytes]:
    """The bits of a forward and a backward."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.normal(3, 2, SHAPE).astype(dtype) for _ in range(2))
    gamma, beta, mean, var = (rng.uniform(1, 2, SHAPE[1]).astype(dtype) for _ in range(4))
    y, saved = arrays.forward(x, gamma, beta, mean, var, BatchNormSpec(), True)
    return [a.tobytes() for a in (y, *arrays.backward(dy, saved), mean, var)]


def test_calls_from_several_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "limit", lambda: 1)
    alone = [step(seed) for seed in range(6)]
    monkeypatch.setattr(threads, "limit", lambda: 3)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(step, range(6))) == alone


FORK = """
import hashlib, os, threading, warnings
import numpy as np
from multibn import BatchNormSpec
from multibn.kernel import threads
from multibn.numpy_backend import KernelSubject
from {module} import BACKEND
{more}
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 advises against fork in a process with threads
threads.limit = lambda: 2

def step(subject):
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(3, 2, (70, 3, 37, 39)).astype(np.float32) for _ in range(2))
    found = [subject.forward(x, True), *subject.backward(dy), *subject.moving()]
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in found)).hexdigest()

def layer():
    return BACKEND.make(3, BatchNormSpec(), "cpu", "kernel")

def busy():
    while not stop.is_set():
        step(KernelSubject(3))

expected, stop = step(layer()), threading.Event()
other = threading.Thread(target=busy)
other.start()  # the forks happen while threads work
for _ in range(3):
    child = os.fork()
    if child == 0:
        same = step(layer()) == step(layer()) == expected
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
other.join()
assert step(layer()) == expected
print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(
    ("module", "more"),
    [("multibn.numpy_backend", ""), ("multibn_torch", "import torch; torch.set_num_threads(2)"), ("multibn_mxnet", "")],
)
def test_a_forked_child_works_and_gives_the_same_bits(module: str, more: str) -> None:
    if module != "multibn.numpy_backend":
        framework = module.removeprefix("multibn_")
        pytest.importorskip(framework, reason=f"{framework} is not installed")
    code = FORK.format(module=module, more=more)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def record(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads do each call from now on."""
    counts: list[int] = []
    team = kernel.team

    def recorded(*arguments: Any) -> Any:
        found = team(*arguments)
        counts.append(found[2])
        return found

    monkeypatch.setattr(kernel, "team", recorded)
    return counts


def test_numpy_keeps_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = record(monkeypatch)
    for count in (1, 2, 3):
        monkeypatch.setattr(threads, "limit", lambda count=count: count)
        asked.clear()
        step(0)
        assert asked == [count, count]


def test_torch_keeps_to_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from multibn_torch import BatchNorm

    asked = record(monkeypatch)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            asked.clear()
            BatchNorm(3, 4)(torch.ones(SHAPE, requires_grad=True)).sum().backward()
            assert asked == [count, count]
    finally:
        torch.set_num_threads(before)


def test_denormals_and_rounding_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def arithmetic() -> list[float]:
        """Flushing denormals to zero, on either side, and every other rounding mode would change one of these."""
        tiny, third = np.array([2.0**-1074, 2.0**-1060]), np.array([1.0, -1.0]) / 3
        return [
            *(tiny * 3),
            *(tiny / 2),
            *third,
            *(np.array([1.0, -1.0]) + 2.0**-53),
            *(np.float32(2) ** -140 * np.ones(2, np.float32)),
        ]

    exact = [3 * 2.0**-1074, 3 * 2.0**-1060, 0.0, 2.0**-1061, 1 / 3, -1 / 3, 1.0, -1.0 + 2.0**-53, 2.0**-140, 2.0**-140]
    assert arithmetic() == exact
    monkeypatch.setattr(threads, "limit", lambda: 2)
    step(0)
    step(0, np.float64)
    assert arithmetic() == exact


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("openmp", [False, True])
def test_denormal_input_and_output_are_not_flushed(count: int, openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By no thread."""
    monkeypatch.setattr(threads, "limit", lambda: count)
    without = np.array([0, *threads._starters[1:]])
    if not openmp:
        monkeypatch.setattr(threads, "starters", lambda: without.ctypes.data)
    x = np.array([1, 3, 5, 7], np.float32).reshape(4, 1) * np.float32(2.0**-147)  # mean 4, deviations -3, -1, 1, 3
    x = np.repeat(x, 40_000, 1)
    one, zero = np.ones(40_000, np.float32), np.zeros(40_000, np.float32)
    spec = BatchNormSpec(normalize_with="moving", eps=2.0**-60)
    var = np.full(40_000, 1 - 2.0**-24, np.float32)
    mean = np.full(40_000, 4 * 2.0**-147, np.float32)
    y, _ = arrays.forward(x, one, zero, mean, var, spec, False)
    assert (y.astype(np.float64) * 2.0**147).T.tolist() == [[-3.0, -1.0, 1.0, 3.0]] * 40_000


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_ready", {})


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize(("kind", "name"), [("int16", "float16"), ("uint16", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize(("folder", "ending"), [("/somewhere", "; the result is cached for later runs"), (None, "")])
def test_one_line_when_compiling_takes_over_a_second(
    kind: str, name: str, folder: str | None, ending: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_slowly(kind: str) -> None:
        cache.announce(True)
        time.sleep(1.2)

    monkeypatch.setattr(kernel, "bodies", compile_slowly)
    monkeypatch.setattr(kernel.forward_at, "_cache", types.SimpleNamespace(cache_path=folder))
    kernel.prepare(kind)
    kernel.prepare(kind)  # at once: it is ready
    assert capsys.readouterr() == ("", f"multibn: compiling the CPU kernel for {name}{ending}\n")


@pytest.mark.usefixtures("unprepared")
def test_no_line_when_it_is_quick_or_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(kind: str) -> None:
        raise MemoryError

    monkeypatch.setattr(kernel, "bodies", fail)
    with pytest.raises(MemoryError):
        kernel.prepare("float32")
    monkeypatch.setattr(kernel, "bodies", lambda kind: time.sleep(1.2))  # loading is slow here, and nothing is compiled
    kernel.prepare("float32")
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(("folder", "while_loading"), [("/somewhere", False), (None, True)])
def test_no_garbage_is_collected_while_code_is_loaded(
    enabled: bool, folder: str | None, while_loading: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage is collected once something is compiled, and afterwards, also after an error, unless the program turned it off."""
    seen = []

    def load(kind: str) -> None:
        seen.append(gc.isenabled())
        cache.announce(True)
        seen.append(gc.isenabled())
        if kind == "float64":
            raise MemoryError

    monkeypatch.setattr(kernel, "bodies", load)
    monkeypatch.setattr(kernel.forward_at, "_cache", types.SimpleNamespace(cache_path=folder))
    if not enabled:
        gc.disable()
    try:
        kernel.prepare("float32")
        seen.append(gc.isenabled())
        with pytest.raises(MemoryError):
            kernel.prepare("float64")
        seen.append(gc.isenabled())
    finally:
        gc.enable()
    loads = [enabled and while_loading, enabled, enabled]
    assert seen == loads * 2
    assert cache.when_compiling == []


def test_compiled_without_a_place_for_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def njit(**options: bool) -> Any:
        asked.append(options)
        if "cache" in options:
            raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")
        return lambda function: function

    monkeypatch.setattr(jit, "njit", njit)
    assert jit.compiled(len) is len
    assert asked == [{"nogil": True, "error_model": "numpy", "cache": True}, {"nogil": True, "error_model": "numpy"}]
