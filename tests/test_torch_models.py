"""Tools of PyTorch on whole models of transformers: swapped as unswapped, or an error that names ``unswap``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")

from torch import fx, nn

import multibn_torch as ours

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch 2.13 deprecates these tools, and uses what it deprecates
SMALL = {"num_channels": 3, "num_labels": 3}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
MOBILE = {"image_size": 32, "depth_multiplier": 0.25, "tf_padding": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet": ("ResNet", STAGES),
    "RegNet": ("RegNet", {**STAGES, "groups_width": 8}),
    "MobileNetV1": ("MobileNetV1", MOBILE),
    "MobileNetV2": ("MobileNetV2", MOBILE),
}


@pytest.fixture(params=MODELS)
def plain(request: Any) -> Any:
    """A model in inference with random weights and statistics."""
    name, settings = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **settings)
    model: Any = getattr(transformers, f"{name}ForImageClassification")(config)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def swapped(plain: Any) -> Any:
    """The same model, swapped and fused."""
    model = copy.deepcopy(plain)
    assert ours.swap(model, fuse_relu=True)
    return model


def images() -> Any:
    torch.manual_seed(1)
    return torch.randn(4, 3, 32, 32)


def logits(model: Any, x: Any) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        found = model(x)
    return found["logits"] if isinstance(found, dict) else found.logits


def parts(model: Any) -> list[str]:
    """Names of the largest submodules with a BatchNorm that torch.fx can trace; none is the whole model."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and not inside and any(isinstance(each, nn.Conv2d) for each in module.children()):
            fx.symbolic_trace(module)
            found.append(name)
    return found


def in_place(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A tool that changes a whole model part by part."""

    def changed(model: Any) -> Any:
        for name in parts(model) or [name for name, _ in model.named_children()]:
            model.set_submodule(name, change(model.get_submodule(name)))
        return model

    return changed


def fuse(model: Any) -> Any:
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def quantize(training: bool, model: Any) -> Any:
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

    example = (torch.randn(4, 3, 8, 8),)
    names = parts(model)
    for name in names:
        part = model.get_submodule(name)
        if training:
            made = prepare_qat_fx(part.train(), get_default_qat_qconfig_mapping("x86"), example)
        else:
            made = prepare_fx(part, get_default_qconfig_mapping("x86"), example)
        model.set_submodule(name, made)
    logits(model, images())
    for name in names:
        model.set_submodule(name, convert_fx(model.get_submodule(name).eval()))
    return model


def fuse_modules(model: Any) -> Any:
    pairs = [
        [f"{name}.convolution", f"{name}.normalization"]
        for name, module in model.named_modules()
        if {"convolution", "normalization"} <= dict(module.named_children()).keys()
    ]
    return torch.ao.quantization.fuse_modules(model, pairs)


TOOLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "fuse": ("torch.fx.experimental.optimization.fuse", in_place(fuse)),
    "PTQ": ("torch.ao.quantization.quantize_fx.prepare_fx", lambda model: quantize(False, model)),
    "QAT": ("torch.ao.quantization.quantize_fx.prepare_qat_fx", lambda model: quantize(True, model)),
    "fuse_modules": ("torch.ao.quantization.fuse_modules", fuse_modules),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_that_fold_layers_name_unswap_and_work_after_it(tool: str, plain: Any, swapped: Any) -> None:
    if type(plain).__name__.startswith("MobileNetV2") and tool in ("PTQ", "QAT"):
        pytest.skip("52 layers take 17 s; MobileNetV1 has the same blocks")
    name, change = TOOLS[tool]
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    with pytest.raises(RuntimeError) as caught:
        change(copy.deepcopy(swapped))
    assert str(caught.value) == (
        f"{name} needs PyTorch's own layers, got BatchNorm2d of multibn_torch. Call multibn_torch.unswap(model) first."
    )
    assert len(ours.unswap(swapped)) == layers
    torch.manual_seed(3)
    one = change(copy.deepcopy(plain))
    torch.manual_seed(3)
    other = change(swapped)
    assert not any("BatchNorm" in type(module).__name__ for module in other.modules())
    assert torch.equal(logits(one, images()), logits(other, images()))


@pytest.mark.parametrize("training", [True, False])
def test_no_tool_traces_these_models_whole(plain: Any, training: bool) -> None:
    """So FX quantization and fusing are tested part by part."""
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(plain.train(training))


def test_script_compiles_none_of_these_models_and_names_unswap(plain: Any, swapped: Any) -> None:
    with pytest.raises(Exception, match="get source"):
        torch.jit.script(plain)
    with pytest.raises(RuntimeError) as caught:
        torch.jit.script(swapped)
    assert str(caught.value) == (
        "torch.jit.script needs PyTorch's own layers, got BatchNorm2d of multibn_torch. Call multibn_torch.unswap(model) first."
    )
    ours.unswap(swapped)
    with pytest.raises(Exception, match="get source"):
        torch.jit.script(swapped)


@pytest.mark.parametrize("tool", ["trace", "export"])
def test_tracers_and_exporters_work_alike(tool: str, plain: Any, swapped: Any) -> None:
    x = images()

    def call(model: Any) -> Any:
        if tool == "trace":
            return torch.jit.trace(model, x, strict=False, check_trace=False)
        return torch.export.export(model, (x,)).module()

    one, other = call(plain), call(swapped)
    if tool == "export":  # the same operators
        targets = [[str(node.target) for node in each.graph.nodes if node.op == "call_function"] for each in (one, other)]
        assert sorted(targets[0]) == sorted(targets[1])
    torch.testing.assert_close(logits(other, x), logits(one, x))
    torch.testing.assert_close(logits(other, x), logits(plain, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: Any, plain: Any, swapped: Any) -> None:
    """The swapped model is as near to the model in float32 as the unswapped one is (BN-10), in the same type."""
    x = images()[:1, :, :16, :16]  # convolutions in float16 are slow
    wanted = logits(plain, x)
    one, other = logits(plain.to(dtype), x.to(dtype)), logits(swapped.to(dtype), x.to(dtype))
    assert one.dtype is other.dtype is dtype
    scale = wanted.abs().max()
    assert (other.float() - wanted).abs().max() <= (one.float() - wanted).abs().max() + 8 * torch.finfo(dtype).eps * scale
    for name, t in swapped.state_dict().items():
        its = name.rpartition(".")[0]
        layer = isinstance(swapped.get_submodule(its), nn.BatchNorm2d)
        assert t.dtype is (torch.float32 if layer else dtype) or not t.is_floating_point()


def test_the_text_of_a_model_shows_what_was_swapped(plain: Any, swapped: Any) -> None:
    assert "by=multibn" not in repr(plain)
    assert all(", by=multibn)" in repr(module) for module in swapped.modules() if isinstance(module, nn.BatchNorm2d))
    ours.unswap(swapped)
    assert repr(swapped) == repr(plain)
