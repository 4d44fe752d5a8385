"""The GPU kernel without a GPU: its plan and launches, with fake CUDA tensors."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from triton_launches import KERNELS, recorded

import multibn_torch as ours
from multibn.kernel.plan import plan_of
from multibn.spec.clauses import LANES
from multibn_torch import triton_kernel
from multibn_torch.forward import eager, on_gpu
from multibn_torch.forward.formulas import Moving, Settings
from multibn_torch.triton_kernel import launching, plan


def test_the_cut_is_that_of_the_cpu_kernel() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        shape = tuple(int(2 ** draw.uniform(0, most)) for most in (17, 12, 14))
        cut, there = plan.cut_of(*shape), plan_of(shape)
        assert cut == tuple(getattr(there, name) for name in cut._fields)


def test_tiles_fit() -> None:
    """Tiles are powers of two, cover all channels, blocks and values, and fit in a program."""
    draw = random.Random(0)
    for _ in range(2000):
        n, channels, s = (int(2 ** draw.uniform(0, most)) for most in (20, 12, 14))
        cut, lanes, fold, rows = plan.plan_of(n, channels, s)
        for size in (lanes.p, lanes.joined, lanes.width, lanes.q, fold.blocks, fold.q, rows.r, rows.k, lanes.warps):
            assert size == plan.power_of_two(size)
        assert lanes.joined >= cut.joined
        assert lanes.width >= cut.width
        assert lanes.p * lanes.q * lanes.groups >= channels
        assert fold.q * fold.programs >= channels
        assert fold.many == (cut.blocks > fold.blocks)
        assert rows.rows * rows.columns == n * channels * s
        assert lanes.p * lanes.joined * lanes.width * lanes.q <= 4 * LANES
        assert fold.blocks * fold.q <= 2048
        assert rows.r * rows.k <= plan.ELEMENTS


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which of PyTorch's operators ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_nothing_waits_and_all_memory_is_pytorchs(momentum: float | None, layout: Any) -> None:
    """CUDA graphs require: no operator that reads a value, copies between devices or synchronises; allocation by empty only."""
    with FakeTensorMode(), recorded() as launches, Operators() as ran:
        x = torch.empty(8, 3, 5, 6, device="cuda", dtype=torch.bfloat16).to(memory_format=layout)
        gamma, beta, mean, var = (torch.empty(3, device="cuda") for _ in range(4))
        batches = torch.empty((), dtype=torch.int64, device="cuda")
        ran.names.clear()
        how = Settings(1e-5, momentum, True, True, True)
        y, statistics = on_gpu.kernel_forward(x, gamma, beta, Moving(mean, var, batches), how, rectify=True)
        dx, dgamma, dbeta = on_gpu.kernel_backward(torch.empty_like(x), x, gamma, statistics, True, beta, True)
        again = on_gpu.kernel_again(x, gamma, beta, statistics=statistics, rectify=True)
        assert {y.device, dx.device, dgamma.device, dbeta.device, again.device} == {x.device}
        assert y.stride() == dx.stride() == again.stride() == x.stride()
    assert [launch.kernel.__name__ for launch in launches] == [*KERNELS, "normalise"]
    for launch in launches:
        assert {t.device for t in launch.given if isinstance(t, torch.Tensor)} == {x.device}
        assert launch.options["enable_fp_fusion"] is False
    views = {"aten.view.default", "aten.view.dtype", "aten.transpose.int", "aten.permute.default"}
    views |= {"aten.detach.default", "prim.device.default"}
    memory = {"aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"}
    assert ran.names - views <= memory


def test_a_value_that_is_read_would_be_found(monkeypatch: Any) -> None:
    """Check that the test above would fail if any code reads from the device."""
    monkeypatch.setattr(triton_kernel, "_float64_bits", lambda value: torch.empty((), device="cuda").item())
    with FakeTensorMode():
        x: Any = torch.empty(8, 3, 5, device="cuda")
        mean = torch.empty(3, device="cuda")
    with x.fake_mode, recorded(), pytest.raises(DataDependentOutputException):
        on_gpu.kernel_forward(x, None, None, Moving(mean, mean, None), Settings(1e-5, 0.9, True, True, True))


@pytest.mark.parametrize("implementation", ["kernel", "framework", "auto"])
def test_what_a_compiler_sees_of_a_layer_on_a_gpu(implementation: Any) -> None:
    """Check operators, shapes, layouts and devices. "auto" does not select the kernel on GPU, where it was not measured."""
    with FakeTensorMode(), torch.no_grad():  # PyTorch without CUDA cannot run autograd on CUDA tensors
        layer: Any = ours.BatchNorm2d(3, device="cuda", implementation=implementation)
        x: Any = torch.empty(2, 3, 4, 5, device="cuda").to(memory_format=torch.channels_last)
        layer.eval()  # nor copy to CUDA tensors, as an update does
        y = layer(x)
        assert (y.device, y.stride()) == (x.device, x.stride())
        code = make_fx(layer)(x).code
        assert ("multibn.forward.default" in code) == (implementation == "kernel")
        assert "_local_scalar_dense" not in code
        statistics = torch.empty(2, 3, dtype=torch.float64, device="cuda")
        dx, dgamma, dbeta = torch.ops.multibn.backward(y, x, None, layer.weight, None, statistics, True, False)
        assert (dx.device, dx.stride()) == (x.device, x.stride())
        assert (dgamma.device, dgamma.shape, dbeta.shape) == (x.device, (3,), (3,))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"gamma": "cuda:1"}, "expected gamma on cuda:0, where x is, got it on cuda:1. Move one of them."),
        ({"batches": "cpu"}, "expected batches on cuda:0, where x is, got it on cpu. Move one of them."),
    ],
)
def test_several_devices_are_not_mixed(tensors: dict[str, str], message: str) -> None:
    with FakeTensorMode(), recorded() as launches:
        x = torch.empty(4, 3, 5, device="cuda:0")
        gamma, mean, var = (torch.empty(3, device=tensors.get(name, "cuda:0")) for name in ("gamma", "mean", "var"))
        batches = torch.empty((), dtype=torch.int64, device=tensors.get("batches", "cuda:0"))
        with pytest.raises(RuntimeError) as caught:
            on_gpu.kernel_forward(x, gamma, None, Moving(mean, var, batches), Settings(1e-5, 0.9, True, True, True))
    assert str(caught.value) == message
    assert not launches


def test_the_device_of_the_tensors_is_the_current_one_while_kernels_are_launched(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("a context of", device))
    with FakeTensorMode():
        x = torch.empty(4, device="cuda:1")
        context: Any = triton_kernel._on(x)
    assert context == ("a context of", torch.device("cuda:1"))


def test_without_triton_the_error_says_what_to_do(monkeypatch: Any) -> None:
    monkeypatch.delattr("multibn_torch.forward.on_gpu")
    monkeypatch.setitem(sys.modules, "multibn_torch.forward.on_gpu", None)
    with FakeTensorMode():
        x = torch.empty(4, 3, 5, device="cuda")
    with pytest.raises(RuntimeError) as caught:
        eager.kernel_forward(x, None, None, Moving(None, None, None), Settings(1e-5, 0, True, True, False))
    start = "implementation='kernel' computes on cuda by Triton, which cannot be imported: "
    end = "Install the Triton that belongs to this PyTorch, or use 'auto'."
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(end)


def test_tensors_on_a_cpu_are_refused_where_kernels_are_compiled() -> None:
    x = torch.zeros(4, 3, 5)
    saved = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError) as caught:
        triton_kernel.run_normalise(x, x, None, None, saved)
    assert str(caught.value) == "the Triton kernel takes tensors on a CUDA device, got x on cpu. Move the tensors."


class Kernel:
    """Stands for a compiled kernel: records Triton's own launches, and the direct ones that follow."""

    arg_names = ("x", "y", "n", "WIDE", "KIND")

    def __init__(self) -> None:
        self.by_triton: list[Any] = []
        self.direct: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        if len(grid) == 3:  # of what Triton compiled
            return lambda *arguments: self.direct.append((grid[0], *arguments))

        def first(*arguments: Any, **options: Any) -> Kernel:
            self.by_triton.append((grid[0], len(arguments), options))
            return self

        return first


def test_a_launch_is_triton_s_own_only_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(launching, "DIRECT", True)
    kernel, x, y = Kernel(), torch.zeros(40), torch.zeros(40)

    def launch(x: Any, n: int = 7, wide: bool = True) -> None:
        launching.launch(kernel, 3, (x, y), (n,), {"KIND": "float32", "WIDE": wide}, warps=2)

    launch(x)
    launch(x)
    options = {"KIND": "float32", "WIDE": True, "num_warps": 2, "enable_fp_fusion": False}
    assert kernel.by_triton == [(3, 3, options)]
    assert kernel.direct == [(3, x.data_ptr(), y.data_ptr(), 7, True, "float32")]
    launch(x[1:])  # less aligned
    launch(x.double())
    launch(x, n=8)
    launch(x, wide=False)
    assert len(kernel.by_triton) == 5
    assert len(kernel.direct) == 1


def test_with_another_release_every_launch_is_triton_s_own(monkeypatch: Any) -> None:
    monkeypatch.setattr(launching, "DIRECT", False)
    kernel, x = Kernel(), torch.zeros(40)
    for _ in range(2):
        launching.launch(kernel, 3, (x, x), (7,), {"KIND": "float32", "WIDE": True}, warps=2)
    assert len(kernel.by_triton) == 2
