"""The layers on a CUDA device; `make gpu` runs these too. Other tests use Triton's interpreter and fake tensors instead."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.utils.checkpoint import checkpoint

import multibn_torch as ours
from multibn import BatchNormSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # of whatever versions are there
]

SHAPE = (8, 16, 14, 14)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last])
def data(request: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    x, dy = (torch.randn(SHAPE, device="cuda").to(memory_format=request.param) for _ in range(2))
    return x * 2 + 1, dy


def layer(**options: Any) -> Any:
    return ours.BatchNorm2d(SHAPE[1], implementation="kernel", device="cuda", **options)


def step(norm: Any, x: Any, dy: Any) -> list[Any]:
    """Return y, gradients and statistics of one training step."""
    x = x.detach().requires_grad_()
    y = norm(x)
    gradients = torch.autograd.grad(y, [x, *norm.parameters()], dy)
    return [y.detach(), *gradients, *(buffer.clone() for buffer in norm.buffers())]


def same(got: list[Any], wanted: list[Any]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def test_the_bits_are_the_cpus(data: Any) -> None:
    """By the CPU kernel, where Numba is installed."""
    pytest.importorskip("numba", reason="Numba is not installed: make gpu compares with the NumPy reference and golden bits")
    norm = layer()
    same([t.cpu() for t in step(copy.deepcopy(norm), *data)], step(norm.cpu(), *(t.cpu() for t in data)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_cuda_graph_gives_the_same_bits(data: Any, momentum: Any) -> None:
    x, dy = data
    norm, plain = layer(momentum=momentum), layer(momentum=momentum)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(copy.deepcopy(norm), x, dy)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph, given = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        results = step(norm, given, dy)
    for factor in (1.0, -3.0):
        given.copy_(x * factor)
        graph.replay()
        same(results, step(plain, given, dy))


@pytest.fixture
def strict() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("strict")
def test_nothing_waits_for_the_device(data: Any) -> None:
    norm = layer(momentum=None)
    step(norm, *data)
    torch.cuda.set_sync_debug_mode("error")
    step(norm, *data)


def test_streams(data: Any) -> None:
    norms = [layer() for _ in range(4)]
    wanted = step(copy.deepcopy(norms[0]), *data)
    torch.cuda.synchronize()
    results = []
    for norm in norms:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(step(norm, *data))
    torch.cuda.synchronize()
    for got in results:
        same(got, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_layer_on_a_device_that_is_not_the_current_one(data: Any) -> None:
    wanted = step(layer(), *data)
    got = step(layer().to("cuda:1"), *(t.to("cuda:1") for t in data))
    same([t.cpu() for t in got], [t.cpu() for t in wanted])


def test_compiled(data: Any) -> None:
    norm = layer()
    same(step(torch.compile(copy.deepcopy(norm), fullgraph=True), *data), step(norm, *data))


def test_checkpointing_updates_once(data: Any) -> None:
    norm, plain = layer(), layer()
    x = data[0].detach().requires_grad_()
    checkpoint(norm, x, use_reentrant=False).backward(data[1])
    plain(data[0].detach().requires_grad_()).backward(data[1])
    same([*norm.buffers(), norm.weight.grad, norm.bias.grad], [*plain.buffers(), plain.weight.grad, plain.bias.grad])


@pytest.mark.parametrize("rectify", [False, True])
def test_recompute(data: Any, rectify: bool) -> None:
    """The same bits, eager and captured, and y is not kept. The factor's gradient is y, as backward makes it again."""
    x, dy = data

    def run(norm: Any, again: bool) -> tuple[list[Any], int]:
        given, factor = x.detach().requires_grad_(), torch.ones_like(x, requires_grad=True)
        before = torch.cuda.memory_allocated()
        with ours.recompute() if again else nullcontext():
            product = norm(given) * factor
        kept = torch.cuda.memory_allocated() - before
        return [*torch.autograd.grad(product, [given, factor, *norm.parameters()], dy), *norm.buffers()], kept

    norm = layer()
    norm.fuse_relu = rectify
    others = [copy.deepcopy(norm) for _ in range(2)]
    wanted, kept = run(norm, False)
    got, less = run(others[0], True)
    same(got, wanted)
    assert kept - less >= x.nbytes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = run(others[1], True)
    graph.replay()
    same(captured, wanted)


PLACED = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a slice of channels-last": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :16],
}


@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("kind", ["as it is", "beta alone", "moving statistics, updated", "float64 far from 0"])
def test_by_pytorchs_operators_it_is_the_cpus(placed: str, kind: str) -> None:
    spec = BatchNormSpec(scale=kind != "beta alone", normalize_with="moving" if kind.startswith("moving") else "batch")
    far = kind.startswith("float64")
    dtype, bound = (torch.float64, 1e-9) if far else (torch.float32, 1e-4)
    torch.manual_seed(11)
    norm: Any = ours.BatchNorm(SHAPE[1], 4, spec, implementation="framework", dtype=dtype)
    x, dy = (torch.randn(SHAPE, dtype=dtype) for _ in range(2))
    results = []
    for its in (copy.deepcopy(norm).cuda(), norm):
        device = next(its.buffers()).device
        given = PLACED[placed]((x + 1e6 * far).to(device)).detach().requires_grad_()
        y = its(given)
        results.append([y.detach(), *torch.autograd.grad(y, [given, *its.parameters()], dy.to(device)), *its.buffers()])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=bound, atol=bound)


def test_by_pytorchs_operators_it_follows_its_input() -> None:
    torch.manual_seed(10)
    mine: Any = ours.BatchNorm2d(3).cuda()
    own: Any = torch.nn.BatchNorm2d(3).cuda()
    x = torch.randn(4, 3, 5, 5, device="cuda")
    torch.testing.assert_close(mine(x), own(x))
    torch.testing.assert_close(mine.running_var, own.running_var)
