"""What a benchmark measures: inputs of layers, and networks, which every framework's studies share."""

from __future__ import annotations

from typing import Final

from .result import Input

STAGES: Final = tuple((32, *stage) for stage in ((64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)))
"""What the BatchNorm layers of a ResNet-50 see at batch 32."""

SMALL: Final = ((8, 16, 4, 4), (32, 64))

COMMON: Final = (
    *(Input("stages", shape) for shape in STAGES),
    *(Input("inference", shape, training=False) for shape in STAGES[:3]),
    Input("fully connected", (8192, 1024)),
    *(Input("small", shape) for shape in SMALL),
)
"""What the layers of every framework are measured on; a framework's studies add to it."""

MODELS: Final = {
    "densenet121": Input("models", (16, 3, 112, 112), model="densenet121"),
    "resnet18": Input("models", (32, 3, 64, 64), model="resnet18"),
}
"""Network -> what it is trained on. The ``contest`` of a framework's studies makes the network that ``Input.model`` names."""
