"""The layers under tools that analyse a program instead of running it: compilers, exporters, tracers, fake tensors."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections import Counter
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn
from torch._dynamo.compiled_autograd import _enable
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import multibn_torch as ours
from multibn import BatchNormSpec
from multibn.layer.nonfinite import PoisonedBatch
from multibn_torch.forward import convolutions, reductions
from multibn_torch.forward.eager import PARAMETER, kernel_forward
from multibn_torch.forward.formulas import Moving, Settings
from multibn_torch.forward.gate import NotPlainError
from multibn_torch.forward.inductor import Fusion

pytestmark = [  # 2026-11-25: torch 2.13 uses what it deprecates while it compiles and exports
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(copyreg|onnxscript|torch).*"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Any:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def state(layer: Any) -> list[Any]:
    return [*layer.buffers(), *(p.grad for p in layer.parameters())]


def steps(layer: Any, shape: Any, backend: str = "aot_eager", batches: int = 3, **keywords: Any) -> int:
    """Check that training and inference give the same bits compiled and eager; return the number of compilations."""
    plain, counter = copy.deepcopy(layer), CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(batches):
        x, dy = torch.randn(shape) * 2 + 1, torch.randn(shape)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        for module, given in zip((compiled, plain), xs, strict=True):
            module.zero_grad()
            y = module(given, **keywords)
            y.backward(dy)
        for got, wanted in zip((xs[0].grad, *state(layer)), (xs[1].grad, *state(plain)), strict=True):
            assert torch.equal(got, wanted)
    layer.eval()
    plain.eval()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x, **keywords), plain(x, **keywords))
    assert plain.num_batches_tracked == batches
    return int(counter.frame_count)


@pytest.mark.parametrize("implementation", ["kernel", "framework"])
@pytest.mark.parametrize(
    ("cls", "shape", "options"),
    [
        (ours.BatchNorm2d, (4, 3, 5, 5), {}),
        (ours.BatchNorm1d, (8, 3), {"momentum": None}),
        (ours.BatchNorm1d, (8, 3, 4), {"affine": False}),
    ],
)
def test_compiles_whole_and_once_for_training_and_once_for_inference(
    cls: Any, shape: Any, options: Any, implementation: Any
) -> None:
    assert steps(cls(3, implementation=implementation, **options), shape) == 2


def test_inductor_gives_the_bits_of_the_program_as_it_is_written() -> None:
    assert steps(ours.BatchNorm2d(3, momentum=None), (4, 3, 5, 5), "inductor") == 2


KINDS = [(dtype, layout) for dtype in (torch.float32, torch.bfloat16, torch.float64) for layout in (0, 1)]


class Several(nn.Module):
    """Per type and layout: a layer with ReLU, and a layer with skip connection and ReLU, each with an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2 * len(KINDS)))
        for norm in self.norms:
            for parameter in norm.parameters():
                nn.init.normal_(parameter)
        ours.swap(self)
        for i, (dtype, _) in enumerate(KINDS):
            if dtype == torch.float64:
                self.norms[2 * i : 2 * i + 2].double()

    def forward(self, xs: Any) -> Any:
        ys = []
        for i in range(0, len(xs), 2):
            ys.append(torch.relu(self.norms[i](xs[i])))
            ys.append(torch.relu(self.norms[i + 1](xs[i + 1]) + xs[i + 1]))
        return ys


def given() -> Any:
    layouts = torch.contiguous_format, torch.channels_last
    return [
        (torch.randn(4, 6, 5, 5) * 2 + 1).to(dtype).contiguous(memory_format=layouts[layout]).requires_grad_()
        for dtype, layout in KINDS
        for _ in range(2)
    ]


def bits(t: Any) -> Any:
    return t.detach().contiguous().view(torch.uint8)


@pytest.fixture
def fusions(monkeypatch: Any) -> Any:
    """Count how often each fusion happens, with Inductor's caches disabled."""
    from multibn_torch.forward import inductor as passes

    monkeypatch.setattr(passes, "counts", dict.fromkeys(passes.counts, 0))
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield passes.counts


def test_inductor_fuses_and_gives_the_bits_of_the_program_as_it_is_written(fusions: Any) -> None:
    """Compare outputs, gradients and statistics, in training, then inference, for three types and two layouts."""
    several = Several()
    plain = copy.deepcopy(several)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(several, fullgraph=True, backend=counter)
    for _ in range(2):
        xs = given()
        answers = []
        for module in (compiled, plain):
            mine = [x.detach().clone().requires_grad_() for x in xs]
            module.zero_grad()
            ys = module(mine)
            torch.autograd.backward(ys, [torch.cos(y.detach() * 3) for y in ys])
            answers.append([*ys, *(x.grad for x in mine), *state(module)])
        for got, wanted in zip(*answers, strict=True):
            assert torch.equal(got, wanted)
    assert (counter.frame_count, fusions) == (1, {"relu": 2, "training": 8, "inference": 0, "pooling": 0})
    several.eval()
    plain.eval()
    with torch.no_grad():
        for got, wanted in zip(compiled(xs), plain(xs), strict=True):
            assert torch.equal(bits(got), bits(wanted))
    assert (counter.frame_count, fusions) == (2, {"relu": 4, "training": 8, "inference": 8, "pooling": 0})


class Varied(nn.Module):
    """Layers that differ in their settings, each with an input of its own; ReLU6 and a pooling follow the first two."""

    def __init__(self) -> None:
        super().__init__()
        made: Any = ours.BatchNorm2d
        self.norms = nn.ModuleList(
            [
                *(made(6, momentum=momentum) for momentum in (None, 0.0, 1.0)),
                *(made(6, affine=False), made(6, track_running_stats=False), made(6, eps=0.5)),
                *(ours.BatchNorm(6, 4, BatchNormSpec(moving_variance=estimate)) for estimate in ("biased", "unbiased")),
                *(made(6) for _ in range(4)),
            ]
        )
        last: list[Any] = list(self.norms)[-3:]
        last[0].freeze_statistics()
        last[1].use_moving_statistics()
        last[2].use_moving_statistics()
        last[2].freeze_statistics()
        for norm in self.norms:
            for parameter in norm.parameters():
                nn.init.normal_(parameter)

    def forward(self, xs: Any) -> Any:
        ys = [norm(x) for norm, x in zip(self.norms, xs, strict=True)]
        return [nn.functional.relu6(ys[0]), nn.functional.max_pool2d(ys[1], 2), *ys[2:]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inductor_gives_the_bits_of_every_setting(fusions: Any, layout: Any) -> None:
    """Two ordinary batches and one with NaN, which leaves the moving statistics of its channel as they are (BN-11).

    No NaN goes to ReLU6, for which Inductor's gradient is not that of eager mode.
    """
    settings = Varied()
    plain, compiled = copy.deepcopy(settings), torch.compile(settings, fullgraph=True)
    for poison in (0.0, torch.nan, 0.0):
        xs = [(torch.randn(4, 6, 5, 5) * 2 + 1).contiguous(memory_format=layout) for _ in settings.norms]
        for x in xs[1:]:
            x[1, 2, 3, 4] += poison
        answers = []
        with warnings.catch_warnings(action="ignore", category=PoisonedBatch):
            for module in (compiled, plain):
                mine = [x.clone().requires_grad_() for x in xs]
                module.zero_grad()
                ys = module(mine)
                torch.autograd.backward(ys, [torch.cos(y.detach().nan_to_num() * 3) for y in ys])
                answers.append([*ys, *(x.grad for x in mine), *module.buffers(), *(p.grad for p in module.parameters())])
        for got, wanted in zip(*answers, strict=True):
            assert torch.equal(torch.isnan(got), torch.isnan(wanted))
            assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
    assert fusions == {"relu": 0, "training": 9, "inference": 1, "pooling": 1}


def test_inductor_gives_the_bits_of_moving_statistics_that_are_not_finite(fusions: Any) -> None:
    layer: Any = ours.BatchNorm2d(5).eval()
    nn.init.normal_(layer.weight)
    layer.running_var.copy_(torch.tensor([torch.inf, torch.nan, 0.0, -1.0, 2.0]))
    layer.running_mean[4] = torch.inf
    x = torch.randn(2, 5, 3, 3)
    with torch.no_grad():
        y, wanted = torch.compile(copy.deepcopy(layer), fullgraph=True)(x), layer(x)
    assert torch.equal(torch.isnan(y), torch.isnan(wanted))
    assert torch.equal(bits(y.nan_to_num()), bits(wanted.nan_to_num()))
    assert fusions["inference"] == 1


def test_a_frozen_graph_folds_a_layer_into_the_convolution_before_it(fusions: Any) -> None:
    """As it folds PyTorch's own layer: the same kernels are generated."""
    torch.manual_seed(0)
    own: Any = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)
    )
    own[1].running_mean.normal_()
    own[4].running_var.uniform_(0.5, 2)
    mine = copy.deepcopy(own.eval())
    ours.swap(mine)
    x, kernels = torch.randn(2, 3, 12, 12), []
    with torch.no_grad(), inductor.patch(freezing=True):
        for model in (own, mine):
            y, code = run_and_get_code(torch.compile(model, fullgraph=True), x)
            torch.testing.assert_close(y, own(x))
            kernels.append([re.findall(r"cpp_pybinding\((\[.*?\])", text) for text in code])
    assert kernels[0] == kernels[1]
    assert fusions["inference"] == 2


def test_other_batch_sizes_compile_nothing_again_and_the_users_own_pass_runs_too(fusions: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    ours.swap(model)
    seen = []
    counter = CompileCounterWithBackend("inductor")
    with inductor.patch(joint_custom_post_pass=lambda graph: seen.append(len(graph.nodes))):
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        compiled(torch.randn(5, 3, 8, 8)).sum().backward()
        counts = counter.frame_count, len(seen), dict(fusions)
        for batch in (6, 9):
            compiled(torch.randn(batch, 3, 8, 8)).sum().backward()
    assert (counter.frame_count, len(seen), fusions) == counts
    assert seen
    assert fusions["training"] > 0


def block() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), ours.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), ours.BatchNorm2d(4)).double()


def gradients(model: Any, run: Any) -> list[Any]:
    y = run(torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    y.backward(torch.cos(y.detach() * 3))
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad), *model.buffers()]


def calls_in(code: Any) -> Any:
    return Counter(re.findall(r"(multibn_reductions\.\w+|torch\.ops\.multibn\.\w+)\(", "".join(code)))


def test_a_compiled_program_calls_the_kernel_without_the_dispatcher(fusions: Any) -> None:
    model, plain = block(), block()
    answer, code = run_and_get_code(lambda: gradients(model, torch.compile(model, fullgraph=True)))
    assert calls_in(code) == {"multibn_reductions.fill_statistics": 2, "multibn_reductions.fill_sums": 2}
    for got, wanted in zip(answer, gradients(plain, plain), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_layer_that_learns_nothing_sums_nothing(fusions: Any) -> None:
    model, plain = block(), block()
    for layer in (model[1], plain[1]):
        layer.use_moving_statistics()
        layer.freeze_statistics()
        layer.freeze_affine()
    answer, code = run_and_get_code(lambda: gradients(model, torch.compile(model, fullgraph=True)))
    assert calls_in(code) == {"multibn_reductions.fill_statistics": 1, "multibn_reductions.fill_sums": 1}  # of the other layer
    for got, wanted in zip(answer, gradients(plain, plain), strict=True):
        torch.testing.assert_close(got, wanted)


class Convolutions(nn.Module):
    """Layers around convolutions of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, dilation=2, padding=2, groups=2, bias=False)
        self.transposed = nn.ConvTranspose2d(16, 16, 3, stride=2)
        self.pointwise = nn.Conv2d(16, 8, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))
        ours.swap(self)

    def forward(self, x: Any) -> Any:
        x = nn.functional.relu6(self.norms[0](self.first(x)))
        x = nn.functional.silu(self.norms[1](self.depthwise(nn.functional.pad(x, (0, 1, 0, 1)))))
        x = torch.relu(self.norms[2](self.grouped(x)) + x)
        return self.pointwise(self.norms[3](self.transposed(x)))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_convolutions_of_every_kind(fusions: Any, frozen: bool) -> None:
    model = Convolutions()
    if frozen:
        for convolution in (model.first, model.grouped):
            convolution.requires_grad_(False)
    plain = copy.deepcopy(model).double()
    x = torch.randn(4, 3, 12, 12, requires_grad=not frozen)
    x64 = x.detach().double().requires_grad_(x.requires_grad)
    compiled = torch.compile(model, fullgraph=True)
    _, code = run_and_get_code(lambda: compiled(x).square().mean().backward())
    calls = code[-1].count("= torch.ops.aten.convolution_backward.default(")
    assert calls == (4 if frozen else 5)  # the first convolution has no backward if frozen
    assert "'torch.ops.aten.convolution_backward.default'" not in code[-1]  # the name of a result of Inductor's own lowering
    plain(x64).square().mean().backward()
    assert fusions["training"] == 4
    for t, wanted in zip((x, *model.parameters()), (x64, *plain.parameters()), strict=True):
        assert (t.grad is None) == (wanted.grad is None)
        if t.grad is not None:
            assert t.grad.is_contiguous()
            torch.testing.assert_close(t.grad.double(), wanted.grad, rtol=1e-3, atol=1e-5)


def test_the_backward_of_a_depthwise_convolution_copies_nothing(fusions: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 4, 1),
    )
    ours.swap(model)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(4, 3, 9, 9)
    _, code = run_and_get_code(lambda: compiled(x).sum().backward())
    assert code[-1].count("aten.convolution_backward.default(") == 3
    assert "empty_strided_cpu((4, 16, 9, 9)" not in code[-1]  # dx is written where dy was


def large_weight(**options: Any) -> tuple[nn.Module, str]:
    """A model with a weight that is larger than the images, and how its compiled backward asserts that dweight is contiguous."""
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, **options), nn.BatchNorm2d(24), nn.ReLU()
    )
    weight: Any = model[3].weight
    ours.swap(model)
    return model, f"{tuple(weight.shape)}, {weight.stride()}, 'torch.ops.multibn.convolution_backward.default'"


@pytest.mark.parametrize("options", [{}, {"stride": 2, "bias": True}], ids=str)
def test_the_gradient_of_a_weight_as_large_as_the_images_is_made_in_its_own_layout(fusions: Any, options: dict[str, Any]) -> None:
    model, contiguous = large_weight(**options)
    plain = copy.deepcopy(model).double()
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    compiled, x64 = torch.compile(model, fullgraph=True), x.detach().double().requires_grad_()
    _, code = run_and_get_code(lambda: compiled(x).square().mean().backward())
    assert contiguous in code[-1]
    plain(x64).square().mean().backward()
    for t, wanted in zip((x, *model.parameters()), (x64, *plain.parameters()), strict=True):
        assert t.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(t.grad.double(), wanted.grad, rtol=1e-3, atol=1e-5)


OTHERS = ["larger x", "larger dy", "dynamic", "frozen", "channels-last", "float64", "groups", "1-D", "transposed", "1x1"]


@pytest.mark.parametrize("why", ["", *OTHERS, "overlap", "part", "forward", "by keyword", "plain value"])
def test_which_convolutions_take_contiguous_tensors(why: str) -> None:
    x, w = torch.randn(4, 24, 2, 2), torch.randn(24, 24, 3, 3, requires_grad=why != "frozen")
    options: dict[str, Any] = {"padding": 1}
    convolve: Any = nn.functional.conv2d
    if why == "larger x":
        x, options = torch.randn(4, 24, 32, 32), {"stride": 16}
    elif why == "larger dy":
        options = {"padding": 20}
    elif why == "channels-last":
        w = w.detach().to(memory_format=torch.channels_last).requires_grad_()
    elif why == "float64":
        x, w = x.double(), w.detach().double().requires_grad_()
    elif why == "groups":
        x, options = torch.randn(1, 48, 2, 2), {"padding": 1, "groups": 2}
    elif why == "1-D":
        x, w, convolve = torch.randn(4, 24, 2), torch.randn(24, 24, 3, requires_grad=True), nn.functional.conv1d
    elif why == "1x1":
        x, w, options = torch.randn(1, 24, 2, 2), torch.randn(24, 24, 1, 1, requires_grad=True), {}
    elif why == "overlap":
        x = x.as_strided(x.shape, (50, 2, 1, 1))
    elif why == "part":
        x = torch.randn(4, 24, 3, 3)[:, :, :2, :2]
    elif why == "transposed":
        convolve = nn.functional.conv_transpose2d

    def gradients(x: Any, w: Any) -> Any:
        wanted = [each for each in (x, w) if each.requires_grad]
        return torch.autograd.grad(convolve(x, w, **options).sum(), wanted)

    mode: Any = "symbolic" if why == "dynamic" else "fake"
    graph = make_fx(gradients, tracing_mode=mode)(x.requires_grad_(), w).graph
    before = [node.target for node in graph.nodes]
    (backward,) = graph.find_nodes(op="call_function", target=convolutions.ATEN)
    backward.meta["partitioner_tag"] = "is_forward" if why == "forward" else "is_backward"
    if why == "by keyword":
        backward.args, backward.kwargs = backward.args[:-1], {"output_mask": backward.args[-1]}
    elif why == "plain value":
        backward.args[1].meta["val"] = x
    convolutions.replace(graph)
    added = [node.target for node in graph.nodes if node.target not in before]
    operators = [torch.ops.aten.clone.default] * 3 + [convolutions.OURS, torch.ops.aten.copy.default]
    assert added == ([convolutions.OURS] if why else operators)


def test_the_gradient_of_an_input_that_overlaps_itself(fusions: Any) -> None:
    model = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24))
    ours.swap(model)
    x = torch.randn(1000).as_strided((4, 24, 2, 2), (144, 6, 1, 1)).requires_grad_()
    weights = torch.randn(4, 24, 2, 2)
    (wanted,) = torch.autograd.grad((model(x) * weights).sum(), x)
    (got,) = torch.autograd.grad((torch.compile(model, fullgraph=True)(x) * weights).sum(), x)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_a_program_that_computes_gradients_of_a_convolution_in_forward(fusions: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(24))
    ours.swap(model)
    x, w = torch.randn(4, 24, 2, 2), torch.randn(24, 24, 3, 3, requires_grad=True)

    def step(w: Any) -> Any:
        return model(torch.func.grad(lambda v: nn.functional.conv2d(x, v, padding=1).square().sum())(w))

    wanted, got = step(w), torch.compile(step, fullgraph=True)(w)
    weights = torch.randn_like(wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    gradients = [torch.autograd.grad((y * weights).sum(), w)[0] for y in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_copies_for_backward_are_not_stored_by_forward(fusions: Any) -> None:
    model = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24))
    ours.swap(model)
    x = torch.randn(4, 24, 2, 2)
    compiled = torch.compile(model, fullgraph=True)
    _, code = run_and_get_code(lambda: compiled(x).square().sum().backward())
    assert "assert_size_stride(primals_" in code[-1]  # x, as it is
    assert "assert_size_stride(clone" not in code[-1]  # an input of backward


@pytest.mark.parametrize("before", [nn.ReLU(), nn.MaxPool2d(2)])
def test_what_backward_takes_of_an_input_is_stored_in_its_own_type(fusions: Any, before: Any) -> None:
    """Not in float64 too, where an operator that Inductor computes makes the input."""
    compiled = torch.compile(nn.Sequential(before, ours.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), fullgraph=True)
    x = torch.randn(4, 4, 8, 8, requires_grad=True)
    _, (forward, _) = run_and_get_code(lambda: compiled(x).sum().backward())
    assert set(re.findall(r"empty_strided_cpu\(\(\d+, \d+, \d+, \d+\), .*, torch\.(float\d+)\)", forward)) == {"float32"}


def gradient_of_a_convolution() -> Any:
    def gradient(x: Any, w: Any) -> Any:
        return torch.autograd.grad(nn.functional.conv2d(x, w).sum(), w)

    return make_fx(gradient)(torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)).graph


def test_a_program_without_a_layer_of_ours_is_left_as_it_is() -> None:
    graph = gradient_of_a_convolution()
    before = [node.target for node in graph.nodes]
    assert torch.ops.aten.convolution_backward.default in before
    Fusion()(graph)
    assert [node.target for node in graph.nodes] == before


@pytest.mark.parametrize("known", [True, False])
def test_a_convolution_is_left_as_it_is_if_a_users_pass_gives_it_what_has_no_value_yet(known: bool) -> None:
    graph = gradient_of_a_convolution()
    (backward,) = graph.find_nodes(op="call_function", target=torch.ops.aten.convolution_backward.default)
    if not known:
        with graph.inserting_before(backward):
            doubled = graph.call_function(torch.ops.aten.mul.Tensor, (backward.args[0], 2.0))
        backward.args = (doubled, *backward.args[1:])
    convolutions.replace(graph)
    assert backward.target is (convolutions.OURS if known else convolutions.ATEN)


def test_inductors_cpp_wrapper_calls_the_operators(fusions: Any) -> None:
    model, plain = block(), block()
    with inductor.patch(cpp_wrapper=True):
        answer = gradients(model, torch.compile(model, fullgraph=True))
    assert fusions["training"] > 0
    for got, wanted in zip(answer, gradients(plain, plain), strict=True):
        torch.testing.assert_close(got, wanted)


CACHED = """
import torch, multibn_torch
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), multibn_torch.BatchNorm2d(4))
torch.compile(model, fullgraph=True)(torch.randn(4, 3, 9, 9)).square().sum().backward()
seen = counters["aot_autograd"]
print(seen["autograd_cache_hit"], seen["autograd_cache_miss"], model[1].weight.grad.tolist())
"""


def test_a_program_from_inductors_cache_is_run_by_another_process(tmp_path: Any) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    said = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True, check=True)
        said.append(done.stdout.split(maxsplit=2))
    assert said[0][:2] == ["0", "1"]
    assert said[1][:2] == ["1", "0"]
    assert said[0][2] == said[1][2]


def test_a_compiled_program_is_run_by_a_process_that_compiled_nothing(tmp_path: Any, fusions: Any) -> None:
    _, code = run_and_get_code(torch.compile(ours.BatchNorm2d(4), fullgraph=True), torch.randn(2, 4, 3, 3))
    (tmp_path / "program.py").write_text(code[0])
    program = "import program; print(tuple(program.call(program.get_args())[0].shape))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "(2, 4, 3, 3)\n"


STORAGE = "the input needs a storage of at least {} bytes, got one of {}. Allocate the storage before the layer is called."
CHANGES = {
    "x freed": STORAGE.format(8192, 0),
    "x shrunk": STORAGE.format(8192, 4096),
    "base freed": STORAGE.format(9216, 0),
    "weight's type": "the CPU kernel needs weight of type torch.float32, one value for each channel, got shape (16,) of type "
    "torch.float16. Give one of the right type and size.",
    "weight's size": "the CPU kernel needs weight of type torch.float32, one value for each channel, got shape (8,) of type "
    "torch.float32. Give one of the right type and size.",
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_tensor_that_changed_before_a_compiled_backward_is_named(what: str) -> None:
    """A program of PyTorch's own operators crashes, or reads one type as another."""
    layer = ours.BatchNorm2d(16)
    base = torch.randn(9, 16, 4, 4)
    x = base[1:] if what == "base freed" else base[1:].clone()
    x.requires_grad_()
    with inductor.patch(size_asserts=False):
        y = torch.compile(layer, fullgraph=True)(x)
        if what == "weight's type":
            layer.weight.data = layer.weight.data.half()
        elif what == "weight's size":
            layer.weight.data = torch.ones(8)
        else:
            x.untyped_storage().resize_(x.nbytes // 2 if what == "x shrunk" else 0)
        with pytest.raises(RuntimeError) as caught:
            y.backward(torch.ones_like(y))
    assert str(caught.value) == CHANGES[what]


def test_a_pulled_apart_gamma_is_read_right_in_a_compiled_backward() -> None:
    weights, biases, x = torch.randn(6, 2), torch.randn(6, 2), torch.randn(4, 6, 5, 5)
    answers = []
    for compiled in (False, True):
        layer = ours.BatchNorm2d(6)
        layer.weight, layer.bias = nn.Parameter(weights[:, 0]), nn.Parameter(biases[:, 1])
        given = x.clone().requires_grad_()
        y = torch.compile(lambda x, layer=layer: torch.relu(layer(x)), fullgraph=True, disable=not compiled)(given)
        y.backward(torch.cos(y.detach() * 3))
        assert layer.weight.stride() == layer.bias.stride() == (2,)
        answers.append((y, given.grad, layer.weight.grad, layer.bias.grad))
    for got, wanted in zip(*answers, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_fills_a_tensor_takes_what_the_operators_take(dtype: Any) -> None:
    """Gaps between the values, a gradient of another layout; a gradient of another type is refused."""
    x, dy = torch.randn(4, 6, 5, 5, dtype=dtype), torch.randn(4, 6, 5, 5, dtype=dtype)
    gamma, beta = torch.randn(2, 6, dtype=PARAMETER[dtype])
    out = torch.empty(reductions.ROWS, 6, dtype=torch.float64)
    for given in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(4, 12, 5, 5, dtype=dtype)[:, ::2]):
        statistics = torch.ops.multibn.statistics(given, 1e-5, True)
        reductions.fill_statistics(given, 1e-5, True, out=out)
        assert torch.equal(out, statistics)
        for affine, rectify in ((True, True), (True, False), (False, True), (False, False)):
            parameters = [*([gamma] if affine else []), *([beta] if rectify else [])]
            for gradient in (dy, dy.contiguous(memory_format=torch.channels_last)):
                reductions.fill_sums(gradient, given, statistics, *parameters, scaled=affine, rectify=rectify, out=out)
                pair = gamma if affine else None, beta if rectify else None
                assert torch.equal(out, torch.ops.multibn.sums(gradient, given, *pair, statistics, rectify))
    with pytest.raises(NotPlainError, match=re.escape(f"the CPU kernel needs the gradient of the output of type {dtype}, ")):
        reductions.fill_sums(dy.to(torch.float16), x, statistics, gamma, scaled=True, rectify=False, out=out)


def test_a_layer_in_half_precision_before_anything_but_its_own_relu_is_left_as_it_is(fusions: Any) -> None:
    from multibn_torch.forward import inductor as passes

    layer = ours.BatchNorm2d(4)

    def twice_used(x: Any) -> Any:
        y = layer(x)
        return torch.relu(y) + y

    graph = make_fx(twice_used)(torch.randn(2, 4, 5, 5, dtype=torch.bfloat16))
    passes.Fusion()(graph.graph)
    assert fusions == {"relu": 0, "training": 0, "inference": 0, "pooling": 0}
    assert "aten.relu" in graph.code


def test_the_pass_is_installed_once_and_runs_after_the_users() -> None:
    """Of which there may be none, one, or several."""
    from multibn_torch.forward import inductor as passes

    class Known(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            seen.append("theirs")

        def uuid(self) -> Any:
            return "known"

    def unknown(graph: Any) -> None:
        seen.append("theirs")

    for given, cached in ((None, True), (Known(), True), (unknown, False), ([unknown], True)):
        seen: list[str] = []
        with inductor.patch(joint_custom_post_pass=given):
            passes.install()
            once: Any = inductor.joint_custom_post_pass
            passes.install()
            assert inductor.joint_custom_post_pass is once
            graph = make_fx(torch.sin)(torch.ones(2)).graph
            each: Any
            for each in once if isinstance(once, list) else [once]:
                each(graph)
            assert len(seen) == (given is not None)
            mine = once[-1] if isinstance(once, list) else once
            assert isinstance(mine, passes.Fusion)
            assert (mine.uuid() is not None) == cached
            assert pickle.dumps(mine.uuid())


def test_a_mask_compiles_whole() -> None:
    assert steps(ours.BatchNorm1d(3), (4, 3, 5), mask=torch.rand(4, 5) > 0.4) == 2


def test_a_compiled_mask_that_is_true_once_is_refused() -> None:
    layer = torch.compile(ours.BatchNorm1d(3), fullgraph=True, backend="aot_eager")
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = True
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel when training, got a mask that is True once "):
        layer(torch.randn(4, 3, 5), mask=mask)


def test_layouts_survive_compilation() -> None:
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
    for given in (x, x.transpose(2, 3), x[..., ::2]):
        layer: Any = ours.BatchNorm2d(3)
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
        y, wanted = compiled(given), layer(given)
        assert torch.equal(y, wanted)
        assert y.stride() == wanted.stride()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PyTorch's layers do so too
@pytest.mark.parametrize("fuse_relu", [True, False])
def test_a_compiled_backward_gives_the_same_gradients(fuse_relu: bool) -> None:
    """Trace the backward of an eager forward with compiled autograd."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    ours.swap(net, fuse_relu)
    plain, counter = copy.deepcopy(net), CompileCounterWithBackend("eager")
    x, dy = torch.randn(2, 3, 5, 6), torch.randn(2, 4, 3, 4)
    plain(x).backward(dy)
    y = net(x)
    with _enable(partial(torch.compile, backend=counter)):
        y.backward(dy)
    assert counter.frame_count > 0
    for got, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, wanted.grad)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("inside", [True, False])
def test_one_update_under_checkpointing_and_compilation(inside: bool, backend: str) -> None:
    layer: Any = ours.BatchNorm1d(3)
    x = torch.randn(8, 3, requires_grad=True)

    def forward(x: Any) -> Any:
        return checkpoint(layer, x, use_reentrant=False)

    compiled: Any = torch.compile(forward if inside else layer, fullgraph=True, backend=backend)
    y = compiled(x) if inside else checkpoint(compiled, x, use_reentrant=False)
    y.square().sum().backward()
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))


def trained(cls: Any, shape: Any, **options: Any) -> tuple[Any, Any]:
    layer = cls(shape[1], **options)
    for _ in range(3):
        layer(torch.randn(shape) * 2 + 1)
    return layer.eval(), torch.randn(shape)


def test_exports_pytorchs_own_operator() -> None:
    layer, x = trained(ours.BatchNorm2d, (2, 3, 4, 5))
    program = torch.export.export(layer, (x,))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.batch_norm.default"]
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize(
    ("cls", "shape", "options"), [(ours.BatchNorm2d, (2, 3, 4, 5), {}), (ours.BatchNorm1d, (4, 3), {"affine": False})]
)
def test_the_onnx_file_gives_the_same_numbers(cls: Any, shape: Any, options: Any, dynamo: bool, tmp_path: Any) -> None:
    onnx = pytest.importorskip("onnx", reason="ONNX is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    if dynamo:
        pytest.importorskip("onnxscript", reason="ONNX Script is not installed")
    layer, x = trained(cls, shape, **options)
    path = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (x,), path, dynamo=dynamo, verbose=False)
    nodes = onnx.load(path).graph.node
    assert [(node.domain, node.op_type) for node in nodes if node.op_type != "Constant"] == [("", "BatchNormalization")]
    session = onnxruntime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x))


def test_a_mask_is_exported_too() -> None:
    layer, x = trained(ours.BatchNorm1d, (2, 3, 5))
    mask = torch.rand(2, 5) > 0.5
    program = torch.export.export(layer, (x, mask))
    torch.testing.assert_close(program.module()(x, mask), layer(x, mask))


def test_a_trace_of_torchscript_can_be_saved() -> None:
    layer, x = trained(ours.BatchNorm2d, (2, 3, 4, 5))
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), layer(x))


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")  # torch.nn.functional
def test_a_training_layer_is_traced_without_a_warning_of_ours() -> None:
    layer, x = ours.BatchNorm2d(3), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(torch.jit.trace(layer, x, check_trace=False)(x), layer(x))


def test_a_layer_is_one_call_in_a_graph_of_fx() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), ours.BatchNorm2d(4), torch.nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(graph.eval()(x), model.eval()(x))

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = ours.BatchNorm1d(3)

        def forward(self, x: Any, mask: Any) -> Any:
            return self.norm(x, mask=mask)

    masked = Masked().eval()
    x, mask = torch.randn(2, 3, 4), torch.rand(2, 4) > 0.5
    assert torch.equal(torch.fx.symbolic_trace(masked)(x, mask), masked(x, mask))


@pytest.mark.parametrize("implementation", ["auto", "kernel", "framework"])
def test_tensors_without_memory(implementation: Any) -> None:
    layer: Any = ours.BatchNorm2d(3, device="meta", implementation=implementation)
    x = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.is_meta
    assert y.shape == x.grad.shape == x.shape
    with FakeTensorMode():
        layer = ours.BatchNorm2d(3, implementation=implementation)
        x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        assert layer(x).stride() == x.stride()
    whole = ours.BatchNorm2d(3, implementation=implementation)
    graph = make_fx(whole)(torch.randn(2, 3, 4, 4))
    assert ("multibn.forward.default" in graph.code) == (implementation != "framework")
    x = torch.randn(2, 3, 4, 4)
    graph.load_state_dict(whole.state_dict(), strict=False)
    torch.testing.assert_close(graph(x), copy.deepcopy(whole)(x))


def test_another_default_device_changes_nothing() -> None:
    layer, x = ours.BatchNorm2d(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    wanted = copy.deepcopy(layer)(x)
    with torch.device("meta"):
        y = layer(x)
        y.sum().backward()
    assert torch.equal(y, wanted)
    assert x.grad is not None


def test_a_layer_elsewhere_is_refused() -> None:
    with pytest.raises(RuntimeError) as caught:
        ours.BatchNorm2d(3, device="meta")(torch.randn(2, 3, 4, 4))
    assert str(caught.value) == "expected weight on cpu, where the input is, got it on meta. Move the layer or the input."
    with pytest.raises(RuntimeError) as caught:
        kernel_forward(
            torch.empty(2, 3, 4, device="meta"), None, None, Moving(None, None, None), Settings(1e-5, 0.9, True, True, False)
        )
    assert (
        str(caught.value) == "implementation='kernel' computes on cpu and cuda, got input on meta. Move the input, or use 'auto'."
    )


def test_the_operators_take_statistics_in_any_memory_layout() -> None:
    x, dy, gamma = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.randn(3)
    saved = torch.ops.multibn.statistics(x, 1e-5, True)[:2]
    strided = torch.stack([saved, saved], -1)[..., 0]
    assert not strided.is_contiguous()
    for operator, last in ((torch.ops.multibn.sums, (False,)), (torch.ops.multibn.backward, (True, False))):
        between = (gamma, None) if operator is torch.ops.multibn.sums else (None, gamma, None)
        for got, wanted in zip(operator(dy, x, *between, strided, *last), operator(dy, x, *between, saved, *last), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", [(), (1, 3), (2, 4)])
def test_the_operators_refuse_too_few_statistics(shape: Any) -> None:
    x, statistics = torch.randn(4, 3, 5), torch.ones(shape, dtype=torch.float64)
    with pytest.raises(NotPlainError) as caught:
        torch.ops.multibn.sums(x, x, None, None, statistics, False)
    assert str(caught.value) == (
        f"the CPU kernel needs the statistics of type torch.float64, one value for each channel, got shape {shape} of type "
        "torch.float64. Give one of the right type and size."
    )


@pytest.mark.parametrize("x", [torch.ones(4, 3, dtype=torch.int32), torch.ones(4)])
def test_the_operators_refuse_what_the_kernel_cannot_take(x: Any) -> None:
    message = (
        "multibn::statistics and multibn::sums take an input (N, C, ...) of torch.float16, torch.bfloat16, torch.float32, "
        f"torch.float64, got shape {tuple(x.shape)} of {x.dtype}. Call a layer instead, which examines its input."
    )
    operators = torch.ops.multibn
    for operator, arguments in (
        (operators.statistics, (x, 1e-5, True)),
        (operators.sums, (x, x, None, None, torch.ones(2, 3, dtype=torch.float64), False)),
    ):
        with pytest.raises(RuntimeError) as caught:
            operator(*arguments)
        assert str(caught.value) == message


def test_the_operators_refuse_a_gradient_of_another_shape() -> None:
    """It would be broadcast."""
    x = torch.randn(4, 3, 2, 2)
    saved = torch.ops.multibn.statistics(x, 1e-5, True)[:2]
    for operator, arguments in (
        (torch.ops.multibn.sums, (None, None, saved, False)),
        (torch.ops.multibn.backward, (None, None, None, saved, True, False)),
    ):
        with pytest.raises(RuntimeError) as caught:
            operator(torch.ones(1), x, *arguments)
        assert str(caught.value) == "backward needs a gradient of the output's shape (4, 3, 2, 2), got (1,)."
