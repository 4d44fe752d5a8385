"""Errors for PyTorch tools that look for PyTorch's own classes (fusion, quantization, ``torch.jit.script``): call ``unswap``
first.

Without these errors, the tools silently skip the layers or fail with a message that names neither the layer nor the fix.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .compat import fuser_methods


def refuse(tool: str, *modules: Any) -> None:
    """Raise the error.

    Raises:
        RuntimeError: always.
    """
    its = ", ".join(type(module).__name__ for module in modules if type(module).__module__.startswith(__package__))
    raise RuntimeError(f"{tool} needs PyTorch's own layers, got {its} of multibn_torch. Call multibn_torch.unswap(model) first.")


def check_tracer(layer: nn.Module) -> None:
    """Raise RuntimeError if the current ``torch.fx`` trace belongs to a tool that would silently skip the layer."""
    frame = inspect.currentframe()
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if (module, function) == ("torch.fx.experimental.optimization", "fuse"):
            refuse("torch.fx.experimental.optimization.fuse", layer)
        if module == "torch.ao.quantization.quantize_fx" and function in ("prepare_fx", "prepare_qat_fx", "fuse_fx"):
            refuse(f"torch.ao.quantization.quantize_fx.{function}", layer)
        frame = frame.f_back


def register_fusers(ours: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Make ``torch.ao.quantization.fuse_modules`` raise for sequences that contain multibn's classes.

    Args:
        ours: PyTorch's class -> ours.
    """

    def fail(is_qat: bool, *modules: nn.Module) -> None:
        refuse(f"torch.ao.quantization.fuse_modules{'_qat' * is_qat}", *modules)

    for types in list(fuser_methods or ()):
        for table in (ours, {**ours, nn.ReLU: nn.ReLU}):  # a ReLU is ours only where it was fused
            swapped = tuple(table.get(cls, cls) for cls in types)
            if swapped != types:
                fuser_methods[swapped] = fail
