"""The kernel in processes of its own: for other processors (BN-15), from a fresh and a read-only install, and not compiled."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import multibn
from multibn.kernel import threads

TESTS = Path(__file__).parent
GOLDEN = json.loads((TESTS / "golden_bits.json").read_text())
NOTICE = "multibn: compiling the CPU kernel for {}; the result is cached for later runs\n"


class Run(NamedTuple):
    """What a process printed, its messages, and the folders that it had."""

    facts: dict[str, Any]
    stderr: str
    home: Path


class Runs:
    """Processes with copies of the package, two at a time, all started when the first is asked for; a test waits for its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(2)
        self._futures: dict[str, Future[Run]] = {}
        cached: dict[str, Any] = {"package_is_writable": True}
        self._start("generic", "float32 alone", NUMBA_CPU_NAME="generic")
        self._start("nehalem", "float64 alone", home_is_writable=False, NUMBA_CPU_NAME="nehalem", NUMBA_CPU_FEATURES="")
        self._start("haswell", "float32 alone", **cached, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="")
        self._start("host", "float32", **cached)

    def __getitem__(self, name: str) -> Run:
        return self._futures[name].result()

    def again(self, name: str, dtype: str) -> Run:
        """A second process where a first one has been."""
        home = self[name].home
        return self._run(dtype, home, {"PYTHONPATH": str(home / "site")})

    def _start(
        self, name: str, arguments: str, package_is_writable: bool = False, home_is_writable: bool = True, **settings: str
    ) -> None:
        folder = self._folder / name
        ignored = shutil.ignore_patterns("__pycache__")
        package = shutil.copytree(Path(multibn.__file__).parent, folder / "site" / "multibn", ignore=ignored)
        if not package_is_writable:
            (
                package / "kernel" / "__pycache__"
            ).touch()  # a file where the folder would be: no user, not even root, can write there
        home = folder if home_is_writable else package / "kernel" / "__pycache__" / "home"
        self._futures[name] = self._pool.submit(self._run, arguments, home, {"PYTHONPATH": str(folder / "site"), **settings})

    def _run(self, arguments: str, home: Path, settings: dict[str, str]) -> Run:
        # Not coverage's either: it would measure the copies.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_", "OMP_", "COV_", "COVERAGE_"))}
        done = subprocess.run(
            [sys.executable, TESTS / "golden_bits.py", *arguments.split()],
            env={**kept, "HOME": str(home), **settings},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return Run(json.loads(done.stdout), done.stderr, home)


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def has_avx2() -> bool:
    try:
        return "avx2" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    if not _is_x86():
        pytest.skip("the processors are named for x86-64")
    return Runs(tmp_path_factory.mktemp("machines"))


@pytest.mark.parametrize(
    ("processor", "dtype", "registers"),
    [
        ("generic", "float32", ["xmm"]),
        ("nehalem", "float64", ["xmm"]),
        pytest.param(
            "haswell", "float32", ["xmm", "ymm"], marks=pytest.mark.skipif(not has_avx2(), reason="this processor has no AVX2")
        ),
    ],
)
def test_golden_bits_on_other_processors(runs: Runs, processor: str, dtype: str, registers: list[str]) -> None:
    facts = runs[processor].facts
    assert facts["registers"] == registers, "the code was not compiled for the processor that was asked for"
    assert facts["contracted"] == []
    assert facts["bits"] == facts["past"] == {dtype: GOLDEN[dtype]}


def test_first_use_of_a_fresh_install_compiles_once_and_says_so(runs: Runs) -> None:
    first = runs["host"]
    assert first.stderr == NOTICE.format("float32")
    expected = (1, 1) if threads.limit() > 1 else (2, 0)  # the other half by another process, on another processor
    assert (first.facts["compiled"], first.facts["loaded"]) == expected
    assert first.facts["contracted"] == []
    assert first.facts["bits"] == first.facts["past"] == {"float32": GOLDEN["float32"]}
    print(f"compiling for a fresh install took {first.facts['seconds']:.1f} s")

    second = runs.again("host", "float32")
    assert (second.facts["compiled"], second.facts["loaded"]) == (0, 2)
    assert second.facts["bits"] == first.facts["bits"]


@pytest.mark.parametrize(
    "changed", ["kernel/schedule", "kernel/jit", "kernel/plan", "kernel/halves", "spec/clauses", "kernel/simd"]
)
def test_another_version_of_any_source_is_not_served_by_the_old_cache(runs: Runs, changed: str, tmp_path: Path) -> None:
    """Numba itself looks only at the file of the function that is called."""
    site = shutil.copytree(runs["host"].home / "site", tmp_path / "site")
    assert list((site / "multibn" / "kernel" / "__pycache__").glob("plan.plan_of-*.nbc"))
    with (site / "multibn" / f"{changed}.py").open("a") as file:
        file.write("# changed\n")
    code = (
        "from multibn.kernel import plan; plan.plan_of((2, 3, 4)); "
        "print(sum(plan.plan_of.stats.cache_hits.values()), sum(plan.plan_of.stats.cache_misses.values()))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "COV_", "COVERAGE_"))}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=site, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0 1\n", "")


def test_read_only_install_is_cached_in_the_home_folder(runs: Runs) -> None:
    run = runs["generic"]
    assert run.stderr == NOTICE.format("float32")
    assert Path(run.facts["cache"]).is_relative_to(run.home)
    assert list(Path(run.facts["cache"]).glob("schedule.forward_body.*.nbc"))


def test_nothing_writable_at_all_still_works(runs: Runs) -> None:
    run = runs["nehalem"]
    assert run.stderr == "multibn: compiling the CPU kernel for float64\n"
    assert run.facts["cache"] is None


def test_import_loads_neither_numba_nor_a_framework() -> None:
    heavy = ("numba", "llvmlite", "torch", "mxnet")
    code = f"import sys, multibn; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_compilation() -> None:
    """The same functions run by Python give the same bits; coverage, which cannot see compiled code, measures them here."""
    done = subprocess.run(
        [sys.executable, TESTS / "plain_kernel.py"], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
