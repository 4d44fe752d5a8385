"""Gradients of max-poolings in compiled programs with our layers: PyTorch's bits, without a scatter where Inductor vectorises."""

from __future__ import annotations

import re
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import multibn_torch as ours
from multibn_torch.forward import inductor as passes
from multibn_torch.forward import pooling

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # 2026-12-01: torch 2.13 uses it to compile

LAYOUTS = torch.contiguous_format, torch.channels_last


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: Any) -> Any:
    torch.compiler.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(passes, "counts", dict.fromkeys(passes.counts, 0))
    # for one thread, Inductor writes a loop instead of calling scatter
    with inductor.patch({"fx_graph_cache": False, "cpp.threads": 2}), functorch.patch(enable_autograd_cache=False):
        yield


class Pooled(nn.Module):
    """A layer beside functions, each of an x of its own, so that nothing but the functions is differentiated."""

    def __init__(self, pools: Any) -> None:
        super().__init__()
        self.pools, self.norm = pools, ours.BatchNorm1d(3)

    def forward(self, xs: Any, other: Any) -> Any:
        return [pool(x) for pool, x in zip(self.pools, xs, strict=True)], self.norm(other)


def gradients(run: Any, xs: Any, give: Any) -> list[Any]:
    """The outputs and gradients of a ``Pooled``."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    ys, z = run(xs, torch.randn(5, 3))
    torch.autograd.backward([*ys, z.sum()], [*(give(y.detach()) for y in ys), None])
    return [*(y.detach() for y in ys), *(x.grad for x in xs)]


def given_for(y: Any) -> Any:
    """A gradient of y's type and layout, with zeros of both signs, an infinity and NaN."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    flat = dy.view(-1) if dy.is_contiguous() else dy.permute(0, 2, 3, 1).reshape(-1)
    for i, value in enumerate((-0.0, 0.0, torch.inf, torch.nan)):
        flat[i :: flat.numel() // 3] = value
    return dy if dy.is_contiguous() else flat.view(dy.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def images(shape: Any, layout: Any, dtype: Any = torch.float32) -> Any:
    """Few distinct values, so that windows have several maxima, and some NaN."""
    x = torch.randint(-2, 3, shape).to(dtype)
    x[0, 0, 1, 1] = torch.nan
    return x.contiguous(memory_format=layout)


def assert_same_bits(answers: Any, wanted: Any) -> None:
    for got, right in zip(answers, wanted, strict=True):
        assert got.stride() == right.stride()
        numbers = ~torch.isnan(right)
        assert torch.equal(~torch.isnan(got), numbers)
        assert torch.equal(got[numbers].view(torch.uint8), right[numbers].view(torch.uint8))


WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": (1, 3), "stride": (3, 2), "padding": (0, 1)},
    {"kernel_size": 5, "stride": 1, "padding": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_window_has_the_bits_of_eager_mode(layout: Any) -> None:
    model = Pooled([nn.MaxPool2d(**window) for window in (WINDOWS[1], *WINDOWS)])
    xs = [images((4, 20, 8, 9), layout, torch.float64), *(images((2, 20, 7, 10), layout) for _ in WINDOWS)]
    compiled = torch.compile(model, fullgraph=True)
    answers, code = run_and_get_code(lambda: gradients(compiled, xs, given_for))
    assert_same_bits(answers, gradients(model, xs, given_for))
    assert passes.counts["pooling"] == len(xs)
    assert ("scatter" in "".join(code)) == (layout is torch.contiguous_format)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_that_are_not_known_when_compiling(layout: Any) -> None:
    model = Pooled([nn.MaxPool2d(3, 2, 1)])
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for shape in ((4, 20, 8, 9), (2, 20, 7, 10), (6, 20, 11, 5)):
        xs = [images(shape, layout)]
        assert_same_bits(gradients(compiled, xs, given_for), gradients(model, xs, given_for))
    assert passes.counts["pooling"] == 1


def test_between_a_layer_and_a_convolution_nothing_is_scattered() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 4, 3)).double()
    ours.swap(model)
    x = torch.randn(2, 3, 14, 14, dtype=torch.float64)
    model(x).sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    _, code = run_and_get_code(lambda: torch.compile(model, fullgraph=True)(x).sum().backward())
    for p, right in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, right)
    assert passes.counts == {"relu": 0, "training": 1, "inference": 0, "pooling": 1}
    assert "scatter" not in "".join(code)


def scattered(x: Any, zeros: Any, shape: Any, flat: Any = (40, 16), stride: int = 2) -> Any:
    """Scatter some of x, (2, 20, 8, 8), to the places of the maxima of windows of 2x2."""
    _, indices = nn.functional.max_pool2d(x.detach(), 2, stride, return_indices=True)
    some = x[:, :, ::stride, ::stride]
    y = torch.full(zeros[:2], *zeros[2:], dtype=x.dtype).scatter_add(1, indices.reshape(flat), some.reshape(flat))
    return y if shape is None else y.view(shape)


OTHERS: list[Any] = [
    nn.MaxPool2d(2, dilation=2),
    nn.MaxPool2d(6, 1),  # Inductor has PyTorch's operator for windows of more than 25 values
    lambda x: nn.functional.max_pool2d(x[0], 2),  # (C, H, W)
    lambda x: nn.functional.max_pool2d(x.half(), 2),
    lambda x: nn.functional.max_pool3d(x[None], 2),
    lambda x: scattered(x, (40, 64, 0.0), None),  # nothing makes images of it
    lambda x: scattered(x, (40, 64, 0.0), (4, 10, 8, 8)),
    lambda x: scattered(x, (40, 64, 0.0), None).as_strided((2, 20, 8, 8), (1280, 64, 1, 8)),
    lambda x: scattered(x, (40, 128, 0.0), (40, 128, 1, 1)),
    lambda x: scattered(x, (80, 64, 0.0), (4, 20, 8, 8)),
    lambda x: scattered(x, (40, 64, 0.0), (2, 20, 8, 8), (2, 320)),
    lambda x: scattered(x, (160, 16, 0.0), (2, 20, 8, 8), (40, 1), 8),  # all maxima are in the first two rows
    lambda x: scattered(x, (40, 64, 1.0), (2, 20, 8, 8)),
    lambda x: scattered(x.half(), (40, 64, 0.0), (2, 20, 8, 8)),
]
"""What looks like the gradient of a max-pooling and is not, and max-poolings whose gradient is not replaced."""


def test_what_is_left_as_it_is() -> None:
    model, xs = Pooled(OTHERS), [torch.randn(2, 20, 8, 8).contiguous(memory_format=torch.channels_last) for _ in OTHERS]
    answers = gradients(torch.compile(model, fullgraph=True), xs, torch.ones_like)
    for got, right in zip(answers, gradients(model, xs, torch.ones_like), strict=True):
        torch.testing.assert_close(got, right)
    assert passes.counts == {"relu": 0, "training": 1, "inference": 0, "pooling": 0}


def test_a_scatter_of_the_users_that_is_a_max_poolings_gradient_is_replaced() -> None:
    """Each program of the test before differs from this one in what it is left for."""
    model = Pooled([lambda x: scattered(x, (40, 64, 0.0), (2, 20, 8, 8))])
    xs = [torch.randn(2, 20, 8, 8).contiguous(memory_format=torch.channels_last)]
    answers = gradients(torch.compile(model, fullgraph=True), xs, torch.ones_like)
    for got, right in zip(answers, gradients(model, xs, torch.ones_like), strict=True):
        assert torch.equal(got, right)
    assert passes.counts["pooling"] == 1


def test_a_program_without_a_layer_of_ours_is_left_as_it_is() -> None:
    x = torch.randn(2, 20, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    pool = torch.compile(nn.MaxPool2d(2))
    _, code = run_and_get_code(lambda: pool(x).sum().backward())
    assert "scatter" in "".join(code)


def test_where_inductor_calls_operators_nothing_is_replaced() -> None:
    model, xs = Pooled([nn.MaxPool2d(2)]), [images((2, 20, 8, 8), torch.channels_last)]
    with inductor.patch(fallback_by_default=True):
        answers = gradients(torch.compile(model, fullgraph=True), xs, given_for)
    for got, right in zip(answers, gradients(model, xs, given_for), strict=True):
        assert torch.equal(got.nan_to_num(), right.nan_to_num())
    assert passes.counts["pooling"] == 0


@pytest.mark.parametrize("change", ["", "by keyword", "plain value", "no value"])
def test_a_scatter_that_a_users_pass_has_changed_is_left_as_it_is(change: str) -> None:
    def gradient(x: Any, dy: Any) -> Any:
        _, indices = nn.functional.max_pool2d(x, 2, return_indices=True)
        return torch.ops.aten.max_pool2d_with_indices_backward(dy, x, [2, 2], [2, 2], [0, 0], [1, 1], False, indices)

    given = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    graph = make_fx(gradient, select_decomp_table(), tracing_mode="fake")(*given).graph
    (scatter,) = graph.find_nodes(op="call_function", target=torch.ops.aten.scatter_add.default)
    if change == "by keyword":
        scatter.args, scatter.kwargs = scatter.args[:3], {"src": scatter.args[3]}
    elif change == "plain value":
        scatter.args[3].meta["val"] = 1
    elif change == "no value":
        del scatter.args[3].args[0].meta["val"]
    assert pooling.replace(graph) == (not change)
    graph.lint()


def test_the_operator_is_inductors_alone() -> None:
    message = re.escape("Could not run 'multibn::max_pool2d_backward' with arguments from the 'CPU' backend")
    with pytest.raises(NotImplementedError, match=f"^{message}"):
        pooling.OURS(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.int8), [2, 2], [8, 8], [2, 2], [0, 0])
