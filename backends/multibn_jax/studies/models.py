"""ResNet-18 in plain ``flax.nnx``, channels last, for ``multibn bench --model``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from flax import nnx

Norm = Callable[..., Any]
"""``flax.nnx.BatchNorm``, or what stands in its place: made of features and rngs."""


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 2), which is a convolution where the shape changes."""

    def __init__(self, given: int, features: int, stride: int, norm: Norm, rngs: nnx.Rngs) -> None:
        self.conv1, self.bn1 = _conv(given, features, 3, stride, rngs), norm(features, rngs=rngs)
        self.conv2, self.bn2 = _conv(features, features, 3, 1, rngs), norm(features, rngs=rngs)
        changes = stride != 1 or given != features
        self.downsample = nnx.List([_conv(given, features, 1, stride, rngs), norm(features, rngs=rngs)] if changes else [])

    def __call__(self, x: Any) -> Any:
        """(N, H, W, given) to (N, H / stride, W / stride, features)."""
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(y + x)


class ResNet18(nnx.Module):
    """He et al. 2015, table 1, 18 layers."""

    def __init__(self, norm: Norm, classes: int = 1000) -> None:
        rngs = nnx.Rngs(0)
        self.conv1, self.bn1 = _conv(3, 64, 7, 2, rngs), norm(64, rngs=rngs)
        widths = (
            (64, 64, 1),
            (64, 64, 1),
            (64, 128, 2),
            (128, 128, 1),
            (128, 256, 2),
            (256, 256, 1),
            (256, 512, 2),
            (512, 512, 1),
        )
        self.blocks = nnx.List([BasicBlock(*each, norm, rngs) for each in widths])
        self.fc = nnx.Linear(512, classes, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, 3) to (N, classes)."""
        x = nnx.max_pool(nnx.relu(self.bn1(self.conv1(x))), (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


def _conv(given: int, features: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    padding = [(size // 2, size // 2)] * 2
    return nnx.Conv(given, features, (size, size), stride, padding=padding, use_bias=False, rngs=rngs)


MODELS: Final = {"resnet18": ResNet18}
"""Name -> ``make(norm)``, with the same initial weights each time."""
