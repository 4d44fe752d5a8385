"""``unswap`` restores the same objects, so that tools that match PyTorch's classes work; ``swap`` lists what it skips."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn

import multibn_torch as ours
from multibn_torch.swap import ReLU


def convolutional() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def resnet() -> Any:
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    config = transformers.ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config)


def mobilenet() -> Any:
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    config = transformers.MobileNetV2Config(num_channels=3, image_size=32, depth_multiplier=0.25, num_labels=3, tf_padding=False)
    return transformers.MobileNetV2ForImageClassification(config)


def regnet() -> Any:
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    config = transformers.RegNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, num_labels=3
    )
    return transformers.RegNetForImageClassification(config)


MODELS: list[Any] = [convolutional, resnet, mobilenet, regnet]


@pytest.mark.parametrize("make", MODELS)
def test_the_very_objects_come_back(make: Any) -> None:
    model = make()
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    names = ours.swap(model, fuse_relu=True)
    assert names
    model.train()(torch.randn(4, 3, 32, 32))
    model.train(before[0][2]["training"])
    assert ours.unswap(model) == list(names)
    for module, (same, cls, attributes) in zip(model.modules(), before, strict=True):
        assert module is same
        assert type(module) is cls
        assert vars(module).keys() == attributes.keys()


@pytest.mark.parametrize("make", MODELS[1:])
def test_relus_are_fused_in_the_parts_that_can_be_traced(make: Any) -> None:
    torch.manual_seed(1)
    plain, x = make().train(), torch.randn(4, 3, 32, 32)
    model = copy.deepcopy(plain)
    ours.swap(plain)
    result = ours.swap(model, fuse_relu=True)
    if make is not mobilenet:  # MobileNet's activations are ReLU6
        assert result.fused
    torch.manual_seed(2)
    wanted = plain(x).logits
    torch.manual_seed(2)
    assert torch.equal(model(x).logits, wanted)


def block(make: Any) -> Any:
    """A convolution, a BatchNorm and an activation that a model has somewhere, in inference."""
    model = make()
    if make is convolutional:
        return model.eval()
    return next(part.eval() for part in model.modules() if {"convolution", "normalization"} <= dict(part.named_children()).keys())


def fused_by_fx(model: Any) -> Any:
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def fused_by_names(model: Any) -> Any:
    names = [name for name, _ in model.named_children()]
    return torch.ao.quantization.fuse_modules(model, [names[: 3 if isinstance(list(model.children())[2], nn.ReLU) else 2]])


def observed(model: Any) -> Any:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    return prepare_fx(model, get_default_qconfig_mapping("x86"), (torch.randn(4, 3, 8, 8),))


def observed_in_training(model: Any) -> Any:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (torch.randn(4, 3, 8, 8),))


TOOLS: dict[str, Any] = {
    "torch.fx.experimental.optimization.fuse": fused_by_fx,
    "torch.ao.quantization.fuse_modules": fused_by_names,
    "torch.ao.quantization.quantize_fx.prepare_fx": observed,
    "torch.ao.quantization.quantize_fx.prepare_qat_fx": observed_in_training,
    "torch.jit.script": torch.jit.script,
}


@pytest.mark.filterwarnings("ignore")  # PyTorch 2.13 deprecates these tools, and uses what it deprecates
@pytest.mark.parametrize("fuse_relu", [True, False])
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_that_look_for_own_classes_name_unswap_and_work_after_it(tool: str, make: Any, fuse_relu: bool) -> None:
    model, x = block(make), torch.randn(4, 3, 8, 8)
    if tool == "torch.jit.script":  # which cannot compile the forward of MobileNetV2's own class
        model = nn.Sequential(*model.children()).eval()
    wanted = model(x)
    ours.swap(model, fuse_relu=fuse_relu)
    relu = ", ReLU" if tool.endswith("fuse_modules") and fuse_relu and any(type(m) is ReLU for m in model.modules()) else ""
    with pytest.raises(RuntimeError) as caught:
        TOOLS[tool](model)
    assert str(caught.value) == (
        f"{tool} needs PyTorch's own layers, got BatchNorm2d{relu} of multibn_torch. Call multibn_torch.unswap(model) first."
    )
    ours.unswap(model)
    changed = TOOLS[tool](model.eval())
    if "qat" not in tool:
        torch.testing.assert_close(changed(x), wanted)
    if ("fx" in tool and "qat" not in tool) or "modules" in tool:
        assert not any(type(module) is nn.BatchNorm2d for module in changed.modules())
    elif "qat" in tool:
        assert any(type(module).__module__ == "torch.ao.nn.intrinsic.qat.modules.conv_fused" for module in changed.modules())


def test_a_layer_that_does_more_is_not_taken_back() -> None:
    model = convolutional()
    ours.swap(model)
    ours.freeze_statistics(model)
    with pytest.raises(ValueError) as caught:
        ours.unswap(model)
    assert str(caught.value) == (
        "1: PyTorch's layer has no equivalent of update_statistics=False. Set update_statistics=True first."
    )
    ours.use_moving_statistics(model)
    with pytest.raises(ValueError) as caught:
        ours.unswap(model)
    assert str(caught.value) == (
        "1: PyTorch's layer has no equivalent of normalize_with='moving', update_statistics=False. "
        "Set normalize_with='batch', update_statistics=True first."
    )
    assert type(model[1]) is ours.BatchNorm2d


@pytest.mark.parametrize("training", [True, False])
def test_quantization_folds_the_layer_again(training: bool) -> None:
    """Quantize with FX, during training (QAT) and after it (PTQ)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch 2.13 deprecates its own quantization
        from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

        model, x = convolutional().train(training), torch.randn(4, 3, 8, 8)
        ours.swap(model, fuse_relu=True)
        ours.unswap(model)
        if training:
            prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (x,))
        else:
            prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        quantized = convert_fx(prepared.eval())
        assert not any("BatchNorm" in type(module).__name__ for module in quantized.modules())
        assert quantized(x).shape == (4, 4, 6, 6)


def test_what_is_not_swapped_is_named() -> None:
    class Other(nn.BatchNorm1d):
        pass

    model = nn.ModuleDict({"lazy": nn.LazyBatchNorm1d(), "sync": nn.SyncBatchNorm(3), "other": Other(3)})
    assert ours.swap(model).skipped == {
        "lazy": "LazyBatchNorm1d has no parameters yet; swap after the first batch",
        "sync": "SyncBatchNorm normalises with statistics of all processes; use multibn_torch.SyncBatchNorm instead",
        "other": "Other is a subclass of PyTorch's layer and may compute something else",
    }
    with pytest.raises(TypeError) as caught:
        ours.swap([model])  # type: ignore[arg-type]
    assert str(caught.value) == (
        "swap needs a torch.nn.Module, got list. Pass a module; for several models, call swap once for each."
    )
    with pytest.raises(TypeError) as caught:
        ours.unswap(3)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "unswap needs a torch.nn.Module, got int. Pass a module; for several models, call unswap once for each."
    )
