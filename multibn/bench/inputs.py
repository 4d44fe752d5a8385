"""The inputs of layers and the networks that the benchmarks of all frameworks share."""

from __future__ import annotations

from typing import Final

from .result import Input

STAGES: Final = tuple((32, *stage) for stage in ((64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)))
"""Inputs of the BatchNorm layers of a ResNet-50 at batch 32."""

SMALL: Final = ((8, 16, 4, 4), (32, 64))

COMMON: Final = (
    *(Input("stages", shape) for shape in STAGES),
    *(Input("inference", shape, training=False) for shape in STAGES[:3]),
    Input("fully connected", (8192, 1024)),
    *(Input("small", shape) for shape in SMALL),
)
"""Inputs for the layers of every framework; a framework's studies add others."""

MODELS: Final = {
    "densenet121": Input("models", (16, 3, 112, 112), model="densenet121"),
    "resnet18": Input("models", (32, 3, 64, 64), model="resnet18"),
}
"""Network -> its input. The ``contest`` of a framework's studies makes the network that ``Input.model`` names."""

COMPILED: Final = {
    name: Input("compiled", shape, model=name, compiled=True)
    for name, shape in {
        "convnet": (32, 3, 64, 64),
        "resnet18": (32, 3, 64, 64),
        "densenet121": (16, 3, 112, 112),
        "transformers-resnet": (32, 3, 64, 64),
        "transformers-mobilenetv2": (32, 3, 64, 64),
    }.items()
}
"""The networks of ``--compiled``, in PyTorch only."""

MEMORY: Final = {
    name: Input("memory", shape, model=name, recompute=True)
    for name, shape in {"densenet10": (32, 64, 32, 32), "densenet121": (16, 3, 112, 112), "resnet18": (32, 3, 64, 64)}.items()
}
"""The networks of ``--memory``, in PyTorch only."""

MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": str(256 << 10), "MALLOC_TRIM_THRESHOLD_": "0"}
"""Settings of the GNU allocator for measuring memory: freed memory is returned to the system at once."""

MALLOC_KEEPS: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
"""Settings for compiled networks: the process keeps freed memory. By default the number of page faults changes from step to step,
of either contestant, which hides what differs. One arena, since the GNU allocator returns the memory of any further one to the
system, whatever the thresholds are. The thread that runs backward would have one.
"""
