"""``recompute``: outputs of layers that later operators keep for backward are computed again there, instead of being stored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class recompute(torch.autograd.graph.saved_tensors_hooks):
    """Context manager: forwards inside do not store the outputs of our layers for backward; backward makes them again.

    What follows a layer, usually a convolution, keeps the layer's output y for the gradient of its weight, while the layer keeps
    its input x. Inside this context y is not kept: backward computes it again, bit for bit, from x, gamma, beta and the saved
    statistics. Swap with ``fuse_relu=True`` for networks with ReLU: a ReLU of PyTorch stores its own output.

    It applies to forwards on the CPU kernel in this thread; backward may run outside. Within ``torch.utils.checkpoint`` and under
    ``torch.compile`` it changes nothing.

    Raises:
        RuntimeError: in backward, if x, gamma, beta, or another tensor that the graph stores, was changed in place since forward.

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
"""Attribute of an output: how it was made."""


class Stored:
    """A tensor and its version, by which PyTorch tells whether it was changed in place."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it has been changed in place.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that recompute() needs for backward was changed in place: it is "
                f"at version {self.tensor._version}, expected version {self.version}. Change a copy, or leave recompute() out."
            )
        return self.tensor


class Made:
    """How an output was made: ``make`` of some tensors, each None or unchanged since."""

    __slots__ = ("make", "tensors", "version")

    def __init__(self, y: Tensor, make: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> None:
        self.version, self.make = y._version, make
        self.tensors = [None if each is None else Stored(each) for each in tensors]

    def get(self) -> Tensor:
        """The output, computed again.

        Raises:
            RuntimeError: one of the tensors has been changed in place.
        """
        with torch.no_grad():
            return self.make(*(None if each is None else each.get() for each in self.tensors))


def active() -> bool:
    """Whether this thread is inside ``recompute``."""
    return _here.depth > 0


def remember(y: Tensor, make: Callable[..., Tensor], *tensors: Tensor | None) -> None:
    """Note that y is ``make(*tensors)``, for whoever stores y for backward before it is changed in place."""
    setattr(y, _MADE, Made(y, make, tensors))


def _pack(t: Tensor) -> Stored | Made:
    made: Made | None = getattr(t, _MADE, None)
    return Stored(t) if made is None or made.version != t._version else made


def _unpack(kept: Stored | Made) -> Tensor:
    return kept.get()
