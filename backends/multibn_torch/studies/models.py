"""The networks of ``multibn bench``: ResNet-18, DenseNet-121 and small ones in plain ``torch.nn``, two of ``transformers``.

Layers, initial weights and checkpoint names match torchvision's; torchvision need not be installed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 2); a convolution in the shortcut where the shape changes."""

    def __init__(self, given: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = None
        if stride != 1 or given != features:
            self.downsample = nn.Sequential(nn.Conv2d(given, features, 1, stride, bias=False), nn.BatchNorm2d(features))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, given, H, W) to (N, features, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)  # type: ignore[no-any-return]


class DenseLayer(nn.Module):
    """Compute ``growth`` new features from all earlier ones (Huang et al. 2017, DenseNet-B)."""

    def __init__(self, given: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(given)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(given, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, found: list[Tensor]) -> Tensor:
        """Return (N, growth, H, W), computed from all earlier features of the block."""
        y = self.conv1(self.relu1(self.norm1(torch.cat(found, 1))))
        return self.conv2(self.relu2(self.norm2(y)))  # type: ignore[no-any-return]


class DenseBlock(nn.ModuleDict):
    """Dense layers, each with the features of all earlier layers as input."""

    def __init__(self, layers: int, given: int, growth: int) -> None:
        super().__init__({f"denselayer{i + 1}": DenseLayer(given + i * growth, growth) for i in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, given, H, W) to (N, given + layers * growth, H, W)."""
        found = [x]
        for layer in self.values():
            found.append(layer(found))
        return torch.cat(found, 1)


def resnet18(classes: int = 1000) -> nn.Module:
    """Make ResNet-18 (He et al. 2015, table 1)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, 2, 1),
    )
    given = 64
    for i, features in enumerate((64, 128, 256, 512)):
        layers[f"layer{i + 1}"] = nn.Sequential(
            BasicBlock(given, features, 1 if i == 0 else 2), BasicBlock(features, features, 1)
        )
        given = features
    layers.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(given, classes))
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def densenet121(classes: int = 1000) -> nn.Module:
    """Make DenseNet-121 (Huang et al. 2017, table 1): growth 32, transitions that halve the number of features."""
    features: OrderedDict[str, nn.Module] = OrderedDict(
        conv0=nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        norm0=nn.BatchNorm2d(64),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(3, 2, 1),
    )
    given, growth = 64, 32
    for i, layers in enumerate((6, 12, 24, 16)):
        features[f"denseblock{i + 1}"] = DenseBlock(layers, given, growth)
        given += layers * growth
        if i < 3:
            features[f"transition{i + 1}"] = nn.Sequential(
                OrderedDict(
                    norm=nn.BatchNorm2d(given),
                    relu=nn.ReLU(inplace=True),
                    conv=nn.Conv2d(given, given // 2, 1, bias=False),
                    pool=nn.AvgPool2d(2, 2),
                )
            )
            given //= 2
    features["norm5"] = nn.BatchNorm2d(given)
    model = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(features),
            relu=nn.ReLU(inplace=True),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(given, classes),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def convnet(classes: int = 1000) -> nn.Module:
    """Make five 3x3 convolutions, each with BatchNorm and ReLU, and two poolings."""

    def block(given: int, features: int) -> list[nn.Module]:
        return [nn.Conv2d(given, features, 3, padding=1, bias=False), nn.BatchNorm2d(features), nn.ReLU()]

    return nn.Sequential(
        *block(3, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2), *block(64, 128),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes),
    )  # fmt: skip


def densenet10(classes: int = 1000) -> nn.Module:
    """Make a dense block of ten layers, growth 32, for (N, 64, H, W)."""
    return nn.Sequential(DenseBlock(10, 64, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64 + 10 * 32, classes))


class Logits(nn.Module):
    """An image classifier of ``transformers`` that takes and returns tensors."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        import transformers

        config = getattr(transformers, f"{name}Config")(num_labels=1000, **options)
        self.model = getattr(transformers, f"{name}ForImageClassification")(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, 1000)."""
        return self.model(x).logits  # type: ignore[no-any-return]


def transformers_resnet() -> nn.Module:
    """Make ResNet-18 of ``transformers``."""
    return Logits("ResNet", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", embedding_size=64)


def transformers_mobilenetv2() -> nn.Module:
    """Make MobileNetV2 of ``transformers``, which has depthwise convolutions and ReLU6."""
    return Logits("MobileNetV2")


MODELS: Final[dict[str, Callable[[], nn.Module]]] = {
    "densenet121": densenet121,
    "resnet18": resnet18,
    "convnet": convnet,
    "densenet10": densenet10,
    "transformers-resnet": transformers_resnet,
    "transformers-mobilenetv2": transformers_mobilenetv2,
}
"""Name of a model, as in ``multibn.bench.inputs`` -> function that makes it."""
