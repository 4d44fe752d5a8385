"""``recompute``: recompute layer outputs in backward instead of storing them for later operators."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class recompute(torch.autograd.graph.saved_tensors_hooks):
    """Context manager in which forwards do not store the outputs of multibn layers; backward recomputes them.

    The operator after a layer, usually a convolution, stores the layer's output y for the gradient of its weight, while the layer
    stores its input x. Inside this context y is not stored: backward recomputes y, bit for bit, from x, gamma, beta and the saved
    statistics. In networks with ReLU, swap with ``fuse_relu=True``, since PyTorch's ReLU stores its own output.

    The context affects forwards by the kernel, on CPU and on CUDA devices, in the current thread; backward may run outside of the
    context. Inside ``torch.utils.checkpoint`` and under ``torch.compile`` it has no effect.

    Raises:
        RuntimeError: in backward, if x, gamma, beta or another tensor that the graph stores was changed in place since forward.

    >>> import multibn_torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), multibn_torch.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 3))
    >>> with recompute():
    ...     loss = model(torch.randn(2, 3, 8, 8)).sum()
    >>> loss.backward()
    """

    def __init__(self) -> None:
        super().__init__(_pack, _unpack)

    def __enter__(self) -> None:
        super().__enter__()
        _here.depth += 1

    def __exit__(self, *args: object) -> None:
        _here.depth -= 1
        super().__exit__(*args)


class _Here(threading.local):
    depth = 0


_here = _Here()
_MADE = "_multibn_made"
"""Attribute of an output: its ``Made``."""


class Stored:
    """A tensor and its version counter, which detects in-place changes."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: the tensor has been changed in place.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that recompute() needs for backward was changed in place: it is "
                f"at version {self.tensor._version}, expected version {self.version}. Modify a copy instead, or do not use "
                "recompute()."
            )
        return self.tensor


class Made:
    """Recipe for recomputing an output: a function and its arguments, each None or a tensor that must not change."""

    __slots__ = ("make", "tensors", "version")

    def __init__(self, y: Tensor, make: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> None:
        self.version, self.make = y._version, make
        self.tensors = [None if each is None else Stored(each) for each in tensors]

    def get(self) -> Tensor:
        """Return the recomputed output.

        Raises:
            RuntimeError: an argument has been changed in place.
        """
        with torch.no_grad():
            return self.make(*(None if each is None else each.get() for each in self.tensors))


def active() -> bool:
    """Return whether the current thread is inside ``recompute``."""
    return _here.depth > 0


def remember(y: Tensor, make: Callable[..., Tensor], *tensors: Tensor | None) -> None:
    """Attach the recipe ``make(*tensors)`` to y. It is used when an operator saves y for backward, unless y has been changed in
    place.
    """
    setattr(y, _MADE, Made(y, make, tensors))


def _pack(t: Tensor) -> Stored | Made:
    made: Made | None = getattr(t, _MADE, None)
    return Stored(t) if made is None or made.version != t._version else made


def _unpack(kept: Stored | Made) -> Tensor:
    return kept.get()
