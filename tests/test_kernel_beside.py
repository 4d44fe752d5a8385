"""Half of the kernel is compiled in another process if there is a processor for it; without that process all still works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("numba")

from multibn.kernel import beside, cache, threads


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were started, each of which is replaced by one that ends at once."""
    commands: list[list[str]] = []

    def start(command: list[str], **settings: int) -> subprocess.Popen[bytes]:
        assert settings == dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        commands.append(command)
        return popen([sys.executable, "-c", ""])

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(threads, "limit", lambda: 2)
    return commands


def miss(cached: bool = True) -> None:
    """What happens when a function is not in the cache."""
    cache.announce(cached)


def test_one_process_starts_when_something_is_compiled(started: list[list[str]]) -> None:
    with beside.compile_backward("float32"):
        assert started == []
        miss()
        miss()
    miss()
    ((program, isolated, *_, kind),) = started
    assert (program, isolated, kind) == (sys.executable, "-I", "float32")


def test_none_starts_where_its_result_could_not_be_cached(started: list[list[str]]) -> None:
    with beside.compile_backward("float32"):
        miss(cached=False)
    assert started == []


def test_none_starts_where_all_is_cached(started: list[list[str]]) -> None:
    with beside.compile_backward("float32"):
        pass
    assert started == []


@pytest.mark.parametrize(
    ("executable", "frozen", "processors"),
    [("/usr/bin/uwsgi", False, 2), ("", False, 2), (None, False, 2), (sys.executable, True, 2), (sys.executable, False, 1)],
)
def test_none_starts_where_it_could_not_be_python(
    executable: str | None, frozen: bool, processors: int, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that embeds Python or is frozen, or a single processor."""
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "frozen", frozen, raising=False)
    monkeypatch.setattr(threads, "limit", lambda: processors)
    with beside.compile_backward("float32"):
        miss()
    assert started == []


def test_a_process_that_cannot_be_started_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(threads, "limit", lambda: 2)
    with beside.compile_backward("float32"):
        miss()


@pytest.mark.parametrize("raises", [False, True])
def test_a_process_is_ended_if_it_hangs_or_compiling_fails(raises: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    popen, processes = subprocess.Popen, []

    def start(*_: object, **__: object) -> subprocess.Popen[bytes]:
        processes.append(popen([sys.executable, "-c", "import time; time.sleep(1000)"]))
        return processes[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(threads, "limit", lambda: 2)
    monkeypatch.setattr(beside, "SECONDS", 0.1)
    before = time.monotonic()
    try:
        with beside.compile_backward("float32"):
            miss()
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert processes[0].returncode == -signal.SIGKILL
    assert time.monotonic() - before < 100
    assert cache.when_compiling == []


def test_the_other_process_finds_what_this_one_can_import(tmp_path: Path) -> None:
    """Where ``sys.path`` was changed by the program, and modules in the current folder that must not be imported."""
    (tmp_path / "numba.py").write_text("raise SystemExit('the wrong module')")
    code = (
        "import sys; sys.path.remove('') if '' in sys.path else None; "
        f"sys.path[:0] = {[path for path in sys.path if path]!r}; "
        "import pathlib; sys.path.append(pathlib.Path('/nowhere'))\n"
        "from multibn.kernel import beside, cache, threads; threads.limit = lambda: 2\n"
        "import subprocess; popen = subprocess.Popen\n"
        "def start(command, **settings):\n"
        "    command[3] = command[3].replace('schedule.backward_body', 'print(schedule.__file__)  #')\n"
        "    return popen(command)\n"
        "subprocess.Popen = start\n"
        "with beside.compile_backward('float32'):\n"
        "    cache.announce(True)\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "COV_"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=kept, capture_output=True, text=True)
    from multibn.kernel import schedule

    assert (done.stdout, done.stderr) == (f"{schedule.__file__}\n", "")
