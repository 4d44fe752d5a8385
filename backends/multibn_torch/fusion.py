"""Fuse a layer with the ReLU after it in eager mode, only while the module that calls both is running.

``arm`` hooks the module whose forward calls the layer and the ReLU. While it runs, the layer rectifies and the ReLU passes the
result on. A layer that is called by anything else returns y. A rectified output that no ReLU took is an error, raised when the
module returns.

A ReLU module is told to pass the output on by its class. A function, such as ``torch.nn.functional.relu``, is told by the type of
the output, ``Rectified``, which only this function sees.
"""

from __future__ import annotations

import inspect
import threading
import uuid
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

FUNCTIONS = (torch.relu, torch.relu_, torch.nn.functional.relu, torch.nn.functional.relu_)
"""The functions that compute ReLU; ``METHODS`` the methods of tensors that do, by name."""

METHODS = ("relu", "relu_")
_RELUS = frozenset((*FUNCTIONS, *(getattr(Tensor, name) for name in METHODS)))

_FUSION = "_multibn_fusion"
"""Attribute of a hooked module: its key and the handles of its hooks."""

_RECTIFIED = "_multibn_rectified"
"""Attribute of a rectified output: its version, by which PyTorch tells whether it was changed in place; None if it has none."""


@dataclass
class Run:
    """A forward of a hooked module."""

    module: torch.nn.Module
    key: str
    frame: FrameType | None
    """The frame that calls the forward: an interrupted run is not ended, but its frame has left the stack."""
    waiting: int = 0
    """Rectified outputs that no ReLU has taken yet."""


class _Runs(threading.local):
    def __init__(self) -> None:
        self.stack: list[Run] = []


_runs = _Runs()


def arm(module: torch.nn.Module) -> str:
    """Hook a module, if it is not hooked yet, and return its key for the layers that it calls."""
    if _FUSION not in vars(module):
        handles = module.register_forward_pre_hook(_begin), module.register_forward_hook(_end, always_call=True)
        vars(module)[_FUSION] = uuid.uuid4().hex, handles
    return str(vars(module)[_FUSION][0])


def disarm(module: torch.nn.Module) -> None:
    """Remove the hooks of ``arm``."""
    _, handles = vars(module).pop(_FUSION, ("", ()))
    for handle in handles:
        handle.remove()


def current(keys: tuple[str, ...]) -> Run | None:
    """The innermost run of a module with one of the keys, in this thread."""
    for run in reversed(_runs.stack):
        if run.key in keys:
            frame = inspect.currentframe()
            while frame is not None and frame is not run.frame:
                if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                    return None  # the layer runs again in backward, when the module does not
                frame = frame.f_back
            return None if frame is None else run
    return None


def mark(y: Tensor, run: Run) -> None:
    """Remember that y is rectified."""
    setattr(y, _RECTIFIED, None if y.is_inference() else y._version)
    run.waiting += 1


class Rectified(Tensor):
    """A rectified output on its way to a ReLU function, which returns the output itself; other functions get the output too."""

    output: Tensor

    @staticmethod
    def wrap(y: Tensor) -> Rectified:
        """Wrap an output that ``mark`` has seen."""
        wrapped = y.as_subclass(Rectified)
        wrapped.output = y
        return wrapped

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the output for a ReLU, if the output has not changed since; else call the function with the output."""
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if func in _RELUS and type(first) is Rectified and take(first.output):
            return first.output
        args, kwargs = tree_map_only(Rectified, lambda wrapped: wrapped.output, (args, kwargs))
        return func(*args, **kwargs)


def take(y: Tensor) -> bool:
    """Tell the run that a ReLU has y; return whether y is as ``mark`` saw it, so that the ReLU has nothing left to do."""
    if not hasattr(y, _RECTIFIED):
        return False
    version = getattr(y, _RECTIFIED)
    delattr(y, _RECTIFIED)
    for run in reversed(_runs.stack):
        if run.waiting:
            run.waiting -= 1
            break
    return version is not None and version == y._version


def _begin(module: torch.nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        here = inspect.currentframe()
        _runs.stack.append(Run(module, vars(module)[_FUSION][0], here and here.f_back))


def _end(module: torch.nn.Module, args: Any, y: Any) -> None:
    """End the run, also after an error, when y is None."""
    if torch.compiler.is_compiling() or not any(run.module is module for run in _runs.stack):
        return
    run = _runs.stack.pop()
    while run.module is not module:  # one that was interrupted
        run = _runs.stack.pop()
    if run.waiting and y is not None:
        raise RuntimeError(
            f"{type(module).__name__} no longer passes the output of each fused layer to its ReLU, as it did when "
            "swap(model, fuse_relu=True) looked at it. Call unswap before the model is changed, then swap again."
        )
