"""`make gpu`: judge and time the layers on every CUDA device, in at most 4 minutes; needs PyTorch with Triton, and NumPy.

``python3 tests/gpu_check.py [JSON file]`` writes what came, and prints a short table. Without a CUDA device the same program runs
in Triton's interpreter on a CPU, on tiny shapes: its verdicts are real, its times mean nothing and are left out of the table.

Exit status: 0 if nothing is wrong, 1 if something is, 2 if the time was up before all was done.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends"), str(ROOT / "conformance"), str(ROOT / "tests")]
BEGAN = time.monotonic()
LIMIT = float(os.environ.get("MULTIBN_GPU_SECONDS", "225"))

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import triton
from golden_bits import FILE, SHAPES, golden
from gpu_route import ROUTED
from rounding import rounded, ties

import multibn_torch as ours
from multibn import BatchNormSpec, reference
from multibn.layer.types import PARAMETER_TYPE, Array
from multibn_conformance.cases.case import Case
from multibn_conformance.cases.fixed import CASES
from multibn_conformance.cases.fixed.quick import QUICK
from multibn_conformance.judging.judge import judge
from multibn_conformance.subjects.backends import Candidate
from multibn_torch import triton_kernel

CUDA: Any = torch.cuda
CUDNN: Any = torch.backends.cudnn

SPEC = BatchNormSpec(eps=1e-12, momentum=0.7, moving_variance="unbiased")

STAGES = [(32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7)]
"""The BatchNorms of ResNet-50's stages, for a batch of 32 images."""

SMALL = [(32, 8, 7, 7), (2, 3, 70, 70), (256, 3, 2, 1), (600, 5, 1, 1), (130, 5, 8, 8), (16, 40, 9, 9)]
"""A row in pieces, joined samples, many blocks, channels that fill no tile."""

LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


def left() -> float:
    """Return the seconds that are left."""
    return LIMIT - (time.monotonic() - BEGAN)


class Report(NamedTuple):
    """The results."""

    environment: dict[str, Any]
    bits: list[dict[str, Any]]
    clauses: dict[str, Any]
    repeats: list[dict[str, Any]]
    tests: dict[str, Any]
    times: list[dict[str, Any]]
    wrong: list[str]
    not_done: list[str]

    def found(self, where: list[dict[str, Any]], entry: dict[str, Any], right: bool, what: str) -> None:
        """Note a result."""
        where.append({**entry, "right": right})
        if not right:
            self.wrong.append(what)


def environment() -> dict[str, Any]:
    """Describe the machine."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "cudnn": CUDNN.version() if ON_GPU else None,
        "devices": [f"{each.name}, {each.multi_processor_count} multiprocessors" for each in devices],
        "interpreter": not ON_GPU,
        "date": time.strftime("%Y-%m-%d"),
    }


# Bits.


def data(shape: tuple[int, ...], dtype: str, layout: str) -> tuple[torch.Tensor, ...]:
    """x, dy, gamma, beta, moving_mean and moving_var, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    kind, parameter = getattr(torch, dtype), getattr(torch, PARAMETER_TYPE[dtype])
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    x, dy = (t.to(kind).contiguous(memory_format=LAYOUTS[layout]) for t in (x * 2 + 3, dy))
    gamma, beta, mean, var = (torch.randn(shape[1], generator=generator).to(parameter) for _ in range(4))
    return x, dy, gamma, beta, mean, var.abs() + 0.1


def array(x: torch.Tensor, layout: str) -> Array:
    """Return (N, C, S) float64, in memory order."""
    if layout == "channels-last":
        return x.movedim(1, -1).reshape(-1, x.shape[1], 1).to(torch.float64).numpy()
    return x.reshape(*x.shape[:2], -1).to(torch.float64).numpy()


def expected(given: tuple[torch.Tensor, ...], layout: str, rectify: bool) -> list[Array]:
    """Return the float64 results of the NumPy reference, rounded once."""
    x, dy, *state = given
    dtype = str(x.dtype).removeprefix("torch.")
    gamma, beta, mean, var = (t.to(torch.float64).numpy() for t in state)
    done = reference.forward(array(x, layout), gamma, beta, mean, var, SPEC, True)
    y, dys = rounded(done.y, dtype), array(dy, layout)
    if rectify:
        y, dys = np.where(y <= 0, 0.0, y), np.where(y <= 0, 0.0, dys)
    dx, dgamma, dbeta = reference.backward(dys, done.saved)
    assert dgamma is not None
    assert dbeta is not None
    parameters = (dgamma, dbeta, done.moving_mean, done.moving_var)
    return [y, rounded(dx, dtype), *(rounded(each, PARAMETER_TYPE[dtype]) for each in parameters)]


def layer(shape: tuple[int, ...], implementation: str, state: Any, device: str) -> Any:
    """Make a layer with this state on the device."""
    kind = state[0].dtype
    made: Any = ours.BatchNorm(shape[1], 4, SPEC, implementation=implementation, device=device, dtype=kind)  # type: ignore[arg-type]
    with torch.no_grad():
        for t, value in zip((made.weight, made.bias, made.running_mean, made.running_var), state, strict=True):
            t.copy_(value)
    return made


def step(norm: Any, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Return y and gradients of one training step."""
    x = x.detach().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)]


def check_bits(report: Report, device: str, shape: tuple[int, ...], dtype: str, layout: str, rectify: bool = False) -> None:
    """Compare the kernel's bits on a device with the reference's on the CPU."""
    given = data(shape, dtype, layout)
    norm = layer(shape, "kernel", given[2:], device)
    norm.fuse_relu = rectify
    y, dx, dgamma, dbeta = (t.cpu() for t in step(norm, *(t.to(device) for t in given[:2])))
    got = [array(y, layout), array(dx, layout)]
    got += [t.cpu().to(torch.float64).numpy() for t in (dgamma, dbeta, norm.running_mean, norm.running_var)]
    names = ("y", "dx", "dgamma", "dbeta", "moving_mean", "moving_var")
    differ = {
        name: int((a.view(np.int64) != b.view(np.int64)).sum())
        for name, a, b in zip(names, got, expected(given, layout, rectify), strict=True)
        if (a.view(np.int64) != b.view(np.int64)).any()
    }
    entry = {"device": device, "shape": shape, "dtype": dtype, "layout": layout, "relu": rectify, "differ": differ}
    report.found(report.bits, entry, not differ, f"bits on {device}: {shape} {dtype} {layout}: {differ}")


def check_rounding(report: Report, device: str, dtype: str) -> None:
    """Results are rounded once: the last pass alone, of zeros and means that are ties, or next to ties."""
    values = ties(dtype)
    saved = torch.from_numpy(np.stack([-values, np.ones_like(values)])).to(device)
    x = torch.zeros((1, len(values), 1), dtype=getattr(torch, dtype), device=device)
    y = torch.empty_like(x)
    triton_kernel.run_normalise(x, y, None, None, saved)
    wrong = int((y.cpu().to(torch.float64).numpy().ravel() != rounded(values, dtype)).sum())
    entry = {"device": device, "shape": f"{len(values)} ties", "dtype": dtype, "differ": {"y": wrong} if wrong else {}}
    report.found(report.bits, entry, not wrong, f"rounding to {dtype} on {device}: {wrong} of {len(values)} values are wrong")


def check_golden(report: Report, device: str, dtype: str) -> None:
    """Compare with the bits of the CPU kernel in tests/golden_bits.json."""
    names = list(SHAPES) if ON_GPU else ["one chunk for many channels"]
    candidate = Candidate(ours.BACKEND, "kernel", device)
    found = golden(candidate.make, [dtype], {name: SHAPES[name] for name in names})[dtype]
    kept = json.loads(FILE.read_text())[dtype]
    differ = {name: sorted(k for k in its if its[k] != kept[name][k]) for name, its in found.items() if its != kept[name]}
    entry = {"device": device, "shape": f"golden, {len(names)} shapes, 10 steps", "dtype": dtype, "differ": differ}
    report.found(report.bits, entry, not differ, f"golden bits on {device}: {dtype}: {differ}")


# Clauses.


def check_clauses(report: Report, device: str, cases: list[Case]) -> None:
    """Judge both implementations, case by case, while there is time."""
    for case in cases:
        for implementation in ours.BACKEND.implementations:
            if left() < 15:
                report.not_done.append(f"{case.id} by {implementation} on {device}")
                continue
            came = judge(Candidate(ours.BACKEND, implementation, device), case)
            verdicts = report.clauses.setdefault(f"torch/{implementation}/{device}", {}).setdefault(case.clause, {})
            verdicts[came.status] = verdicts.get(came.status, 0) + 1
            if came.status == "fail":
                report.wrong.append(f"{came.subject} fails {came.message}")


# Times.


def seconds(run: Callable[[], Any], turns: int) -> float:
    """Return the mean duration of a run."""
    if not ON_GPU:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    begin, end = (CUDA.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(turns):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / turns / 1e3


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that replays the run with a CUDA graph."""
    side = CUDA.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(report: Report, device: str, shape: tuple[int, ...], dtype: str, layout: str) -> None:
    """Measure in turns: forward and backward of our layer by each implementation, of PyTorch's own, and a copy of the same
    bytes.
    """
    x, dy, *state = data(shape, dtype, layout)
    x, dy = x.to(device), dy.to(device)
    own = torch.nn.BatchNorm2d(shape[1], device=device)
    norms = {"kernel": layer(shape, "kernel", state, device), "framework": layer(shape, "framework", state, device), "own": own}
    y, dx = torch.empty_like(x), torch.empty_like(x)

    def copies() -> None:  # forward reads x twice and writes y, backward reads x and dy twice and writes dx: 8 passes, 4 copies
        for out in (y, y, dx, dx):
            out.copy_(x)

    runs: dict[str, Callable[[], Any]] = {name: partial(step, norm, x, dy) for name, norm in norms.items()}
    runs["copy"] = copies
    first = runs["kernel"]()
    alike = all(torch.equal(a, b) for _ in range(3) for a, b in zip(runs["kernel"](), first, strict=True))
    entry: dict[str, Any] = {"device": device, "shape": shape, "dtype": dtype, "layout": layout}
    report.found(report.repeats, entry, alike, f"other bits in a second run on {device}: {shape} {dtype} {layout}")
    if ON_GPU:
        runs |= {f"{name}, graph": graphed(run) for name, run in runs.items()}
    turns = dict.fromkeys(runs, 20)
    for name, run in runs.items():
        seconds(run, 3)  # warm
        turns[name] = max(1, min(50, int(0.02 / max(seconds(run, 3), 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5 if ON_GPU else 1):
        for name, run in runs.items():
            taken[name].append(seconds(run, turns[name]))
    report.times.append({**entry, "microseconds": {name: median(its) * 1e6 for name, its in taken.items()}})


# All of it.


def run_tests(report: Report) -> None:
    """Run the tests marked ``gpu``, if pytest is installed."""
    if find_spec("pytest") is None:
        report.tests["not run"] = "pytest is not installed"
        return
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-rs", "--show-capture=no"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path[:4])
    command = [sys.executable, "-m", "pytest", *options, "tests/test_gpu.py"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(10, left() - 20))
    except subprocess.TimeoutExpired:
        report.not_done.append("the tests marked gpu")
        return
    report.tests["summary"] = done.stdout.strip().splitlines()[-1:]
    if done.returncode != 0:
        report.wrong.append(f"tests marked gpu:\n{done.stdout[-6000:]}{done.stderr[-1000:]}")


def run(report: Report, write: Callable[[], None]) -> None:
    """Run the tasks, the most important first; note those for which no time is left. Results are written after each task."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    stages = STAGES if ON_GPU else [(4, 3, 6, 6)]
    small = SMALL if ON_GPU else [(4, 3, 5, 6)]
    types = ("float32", "bfloat16", "float16", "float64")
    quick = [case for case in CASES.values() if case.id in QUICK]
    rest = [case for case in CASES.values() if case.id not in QUICK]
    tasks: list[tuple[str, Callable[[], None]]] = []

    def add(what: str, task: Callable[..., None], *arguments: Any) -> None:
        tasks.append((what, lambda: task(report, *arguments)))

    for device in devices:
        for dtype in types[:3]:
            add(f"rounding to {dtype} on {device}", check_rounding, device, dtype)
        for shape in small:  # in float64, another order of summation shows most
            for dtype in ("float64", "float32"):
                add(f"bits of {shape}, {dtype}, on {device}", check_bits, device, shape, dtype, "NCHW")
        add(f"golden bits, float32, on {device}", check_golden, device, "float32")
        for dtype in types[1:]:
            for layout in LAYOUTS:
                add(f"bits, {dtype}, {layout}, on {device}", check_bits, device, small[0], dtype, layout, True)
        add(f"quick cases on {device}", check_clauses, device, quick if ON_GPU else quick[:12])
    if ON_GPU:
        add("tests marked gpu", run_tests)
    for layout in LAYOUTS:
        for shape in stages:
            add(f"times of {shape}, float32, {layout}", measure, devices[0], shape, "float32", layout)
    if ON_GPU:
        for layout in LAYOUTS:
            add(f"bits of {stages[0]}, {layout}", check_bits, devices[0], stages[0], "float32", layout)
        for device in devices:
            for dtype in ("float16", "float64"):
                add(f"golden bits, {dtype}, on {device}", check_golden, device, dtype)
            add(f"the other cases on {device}", check_clauses, device, rest)
        for layout in LAYOUTS:
            for dtype in ("bfloat16", "float16"):
                for shape in stages:
                    add(f"times of {shape}, {dtype}, {layout}", measure, devices[0], shape, dtype, layout)
    for what, task in tasks:
        if left() < 15:
            report.not_done.append(what)
            continue
        try:
            task()
        except Exception as error:  # the rest is still worth knowing
            report.wrong.append(f"{what}: {type(error).__name__}: {error}")
        write()


def table(report: Report) -> str:
    """Summarise the results."""
    where = ", ".join(report.environment["devices"]) or "no CUDA device: Triton's interpreter, on tiny shapes"
    lines = [f"{where}; torch {report.environment['torch']}, triton {report.environment['triton']}"]
    right = sum(each["right"] for each in report.bits)
    lines.append(f"bits of the CPU (BN-15): {right} of {len(report.bits)} checks equal")
    lines.append(f"a second run has the same bits: {sum(each['right'] for each in report.repeats)} of {len(report.repeats)}")
    for subject, clauses in report.clauses.items():
        count = {status: sum(its.get(status, 0) for its in clauses.values()) for status in ("pass", "fail", "differs", "skip")}
        failed = [clause for clause, its in clauses.items() if its.get("fail")]
        lines.append(f"{subject}: {', '.join(f'{n} {status}' for status, n in count.items())} {' '.join(failed)}".rstrip())
    lines += [f"tests marked gpu: {'; '.join(map(str, its))}" for its in report.tests.values()]
    if ON_GPU and report.times:
        names = list(report.times[0]["microseconds"])
        lines.append(f"{'microseconds, forward + backward':38}" + "".join(f"{name:>18}" for name in names))
        for each in report.times:
            title = f"{each['dtype']} {each['layout']} {'x'.join(map(str, each['shape']))}"
            lines.append(f"{title:38}" + "".join(f"{each['microseconds'][name]:18.0f}" for name in names))
    lines += [f"WRONG: {each}" for each in report.wrong]
    if report.not_done:
        lines.append(f"not done, for the time was up: {len(report.not_done)}, {report.not_done[0]} and so on")
    return "\n".join(lines)


def main(file: Path) -> int:
    """Run, write, print."""
    report = Report(environment(), [], {}, [], {}, [], [], [])
    if not ON_GPU:  # CPU tensors go where CUDA tensors go
        for routed in ROUTED:
            setattr(*routed)
        np.seterr(all="ignore")  # the interpreter computes with NumPy
    file.parent.mkdir(parents=True, exist_ok=True)
    run(report, lambda: _write(report, file))
    _write(report, file)
    print(table(report))
    print(f"{time.monotonic() - BEGAN:.0f} s, written to {file}")
    return 1 if report.wrong else 2 if report.not_done else 0


def _write(report: Report, file: Path) -> None:
    file.write_text(json.dumps(report._asdict() | {"seconds": time.monotonic() - BEGAN}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "gpu.json"))
