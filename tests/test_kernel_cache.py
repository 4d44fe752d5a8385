"""Compiled code on disk: a damaged file, a full disk, a folder that others may write to, and forks while a thread compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from multibn.kernel import cache, compat

MODULE = """
from multibn.kernel.jit import compiled

@compiled
def double(x):
    return x + x
"""
RUN = """
import doubling
print(doubling.double(21), sum(doubling.double.stats.cache_hits.values()), sum(doubling.double.stats.cache_misses.values()))
"""


class Program:
    """A program with one small compiled function, whose cache is in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        (folder / "doubling.py").write_text(MODULE)
        self.cache.mkdir(mode=0o700)

    def run(self, code: str = RUN, **settings: str) -> tuple[str, str]:
        """What it printed, and what it reported."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "COV_", "COVERAGE_"))}
        path = os.pathsep.join([str(self.folder), *filter(None, [kept.get("PYTHONPATH")])])
        env = {**kept, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(self.cache), **settings}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr.strip()

    @property
    def files(self) -> list[Path]:
        return sorted(self.cache.rglob("doubling.double-*.nbc"))


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """One bit of the machine code is another: without the digest, this is loaded and runs."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda content: b"", lambda content: b"\0" * len(content)])
def test_a_damaged_file_is_reported_set_aside_and_compiled_anew(damage: Any, program: Program) -> None:
    assert program.run() == ("42 0 1", "")
    assert program.run() == ("42 1 0", "")
    (file,) = program.files
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    line = f"multibn: the cache file {file} is damaged; renamed it to .damaged and recompiling"
    assert program.run() == ("42 0 1", line)
    assert file.with_suffix(".damaged").read_bytes() == damage(sound)
    assert program.run() == ("42 1 0", "")


def test_a_full_disk_costs_the_cache_only(program: Program) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n" + RUN
    out, err = program.run(code)
    assert out == "42 0 1"
    assert err.startswith(f"multibn: cannot write the cache file {program.cache}")
    assert err.endswith(": File too large; the next process compiles again")
    assert program.files == []
    assert program.run() == ("42 0 1", "")


def test_a_folder_that_cannot_be_made_costs_the_cache_only(program: Program) -> None:
    out, _ = program.run(NUMBA_CACHE_DIR="/proc/none")
    assert out.startswith("42 ")


@pytest.mark.parametrize("mode", [0o777, 0o707])
def test_a_folder_that_others_may_write_to_is_not_used(mode: int, program: Program) -> None:
    program.run()
    (file,) = program.files
    file.parent.chmod(mode)
    out, err = program.run()
    assert out == "42 0 1"
    assert err == (
        f"multibn: the cache folder {file.parent} is not used, because other users can write to it and cached code is executed. "
        f"Run chmod go-w {file.parent}, or set NUMBA_CACHE_DIR to a folder that only you can write to"
    )
    file.parent.chmod(0o755)
    assert program.run() == ("42 1 0", "")


def test_files_of_other_sources_are_removed(program: Program) -> None:
    program.run()
    (before,) = program.files
    (program.folder / "doubling.py").write_text(MODULE.replace("x + x", "2 * x"))
    assert program.run() == ("42 0 1", "")
    (after,) = program.files
    assert after.name != before.name


FORK = """
import os, signal, threading, time
import doubling
from multibn.kernel import entry
from multibn.kernel.compat import global_compiler_lock

held = threading.Event()
def compile_for_a_while():
    with entry._preparing, global_compiler_lock:
        held.set()
        time.sleep(1)
threading.Thread(target=compile_for_a_while).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(100)
    os._exit(0 if doubling.double(21) == 42 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), doubling.double(21))
"""


def test_a_fork_waits_for_the_thread_that_compiles(program: Program) -> None:
    """Without that, the child finds the locks held by a thread that it does not have, and ends by the alarm."""
    assert program.run(FORK) == ("0 42", "")


def test_private_parts_of_numba_are_named_and_there() -> None:
    """Each of PARTS is found; one that a release lacks is reported with what stops working."""
    for place in compat.PARTS:
        assert compat.part(place) is not None
    compat.PARTS["numba.core.caching:Gone"] = "keep compiled code on disk"
    try:
        with pytest.raises(ImportError) as raised:
            compat.part("numba.core.caching:Gone")
    finally:
        del compat.PARTS["numba.core.caching:Gone"]
    import numba

    assert str(raised.value) == (
        f"Numba {numba.__version__} has no numba.core.caching.Gone, without which multibn's kernel cannot keep compiled code on "
        "disk. Install a release that multibn was tested with: pip install 'numba<=0.68.1'."
    )


def test_a_private_group_is_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    for private, trusted in ((True, True), (False, False)):
        cache._is_trusted.cache_clear()
        monkeypatch.setattr(cache, "_is_private", lambda group, private=private: private)
        assert cache._is_trusted(tmp_path) is trusted
    cache._is_trusted.cache_clear()


def test_the_mode_of_the_processor_changes_no_bit() -> None:
    """BN-15 where the thread rounds upwards, and after a call the mode is what it was."""
    import ctypes
    import ctypes.util

    from multibn import BatchNormSpec
    from multibn.kernel import arrays

    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    upward = 0x800 if os.uname().machine == "x86_64" else 0x400000
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(3, 2, (8, 3, 7)).astype(np.float32) for _ in range(2))

    def step() -> list[bytes]:
        one, zero = np.ones(3, np.float32), np.zeros(3, np.float32)
        mean, var = zero.copy(), one.copy()
        y, saved = arrays.forward(x, one, zero, mean, var, BatchNormSpec(momentum=0.5), True)
        return [a.tobytes() for a in (y, *arrays.backward(dy, saved), mean, var)]

    expected = step()
    assert libm.fesetround(upward) == 0
    try:
        found, mode = step(), libm.fegetround()
    finally:
        libm.fesetround(0)
    assert (found == expected, mode) == (True, upward)


def test_flushed_denormals_change_no_bit() -> None:
    """The same where PyTorch makes the thread flush denormals to zero."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from multibn import BatchNormSpec
    from multibn.kernel import arrays, entry

    entry.prepare("float32")  # NumPy warns if it is imported into a thread that flushes denormals
    x = np.array([1, 3, 5, 7], np.float32).reshape(4, 1) * np.float32(2.0**-147)
    one, zero, mean = np.ones(1, np.float32), np.zeros(1, np.float32), np.full(1, 4 * 2.0**-147, np.float32)
    var, spec = np.full(1, 1 - 2.0**-24, np.float32), BatchNormSpec(normalize_with="moving", eps=2.0**-60)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        y, _ = arrays.forward(x, one, zero, mean, var, spec, False)
    finally:
        torch.set_flush_denormal(False)
    assert (y.astype(np.float64).ravel() * 2.0**147).tolist() == [-3.0, -1.0, 1.0, 3.0]
