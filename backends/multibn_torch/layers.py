"""BatchNorm as PyTorch modules: the article's block, and layers that stand in for PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from multibn.layer import objection, spec_text
from multibn.spec import BatchNormSpec

from .function import PARAMETER, How, by_framework, by_kernel
from .poison import watch
from .switches import Switches

Implementation = Literal["auto", "kernel", "framework"]

_ERRORS: dict[str, type[Exception]] = {
    "rank": ValueError,
    "channels": RuntimeError,
    "input type": NotImplementedError,
    "parameter type": RuntimeError,
    "one value": ValueError,
}
"""The classes that ``torch.nn.functional.batch_norm`` raises."""

_PARAMETERS = ("weight", "bias")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Layer(Switches, _BatchNorm):
    """What the layers share: forward, the state's types, the text.

    ``implementation``: "kernel" (the CPU kernel), "framework" (PyTorch's own operators, any device), or "auto": the kernel on
    CPU, the operators elsewhere. ``name`` is the layer's name in the model, for messages; ``swap`` tells it.
    """

    ranks: tuple[int, ...]
    implementation: Implementation = "auto"
    name: str = ""
    moving_variance: Literal["biased", "unbiased"] = "unbiased"

    @property
    def spec(self) -> BatchNormSpec:
        """What this layer computes, as it stands now."""
        return BatchNormSpec(
            eps=self.eps,
            momentum=None if self.momentum is None else self._old() if self.momentum else BatchNormSpec.momentum,
            moving_variance=self.moving_variance,
            scale=self.weight is not None,
            center=self.bias is not None,
            normalize_with=self.normalize_with,
            update_statistics=self.update_statistics and self.track_running_stats and self.momentum != 0,
            learn_affine=any(p.requires_grad for p in self.parameters(recurse=False)) or not self.affine,
        )

    def __init__(self, *args: Any, implementation: Implementation = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if implementation not in get_args(Implementation):
            raise ValueError(
                f"implementation must be {' or '.join(map(repr, get_args(Implementation)))}, got {implementation!r}."
            )
        if implementation != "auto":
            self.implementation = implementation
        check(self)
        keep_single(self)

    def forward(self, input: Tensor) -> Tensor:
        """y for x of shape (N, C, ...), in the layer's mode (BN-01 to BN-12).

        Raises:
            ValueError: wrong rank, or one value per channel in training.
            RuntimeError: wrong number of channels, or parameters of the wrong type.
            NotImplementedError: a type of input that is not floating point.
        """
        mean, var, batches = map(self._buffers.__getitem__, _BUFFERS)
        weight, bias = map(self._parameters.__getitem__, _PARAMETERS)
        training = self.training
        update = training and mean is not None and self.track_running_stats and self.update_statistics
        use_batch = mean is None or (training and self.normalize_with == "batch")
        kind = PARAMETER.get(input.dtype)
        if not (
            input.dim() in self.ranks
            and input.shape[1] == self.num_features
            and (weight is None or weight.dtype == kind)
            and (bias is None or bias.dtype == kind)
            and (mean is None or mean.dtype == var.dtype == kind)  # type: ignore[union-attr]
            and (input.numel() > self.num_features or not (update or use_batch))
        ):
            self._refuse(input, update or use_batch)
            update = False  # nothing was wrong: the input is empty (BN-12)
        on_kernel = input.is_cpu if self.implementation == "auto" else self.implementation == "kernel"
        how = How(self.eps, self._old() if update else 0.0, self.moving_variance == "unbiased", use_batch, update)
        y = (by_kernel if on_kernel else by_framework)(input, weight, bias, mean, var, how)
        if update:
            batches.add_(1)  # type: ignore[union-attr]
            watch(self, input, y)
        return y

    def extra_repr(self) -> str:
        """PyTorch's text, and what differs from PyTorch."""
        text = str(super().extra_repr())  # type: ignore[no-untyped-call]
        text += "" if self.normalize_with == "batch" else f", normalize_with={self.normalize_with!r}"
        text += self.frozen_text()
        return text + ("" if self.implementation == "auto" else f", implementation={self.implementation!r}")

    def _old(self) -> float:
        """Weight of the old moving statistics; PyTorch's momentum is the weight of the new ones."""
        if self.momentum is None:
            return BatchNormSpec(momentum=None).weight_of_old(int(self.num_batches_tracked))  # type: ignore[arg-type]
        return 1.0 - self.momentum

    def _refuse(self, x: Tensor, needs_batch: bool) -> None:
        """Say what is wrong with x."""
        state = {**self._parameters, **self._buffers, "num_batches_tracked": None}
        problem = objection(
            tuple(x.shape),
            _name(x),
            num_features=self.num_features,
            ranks=self.ranks,
            needs_batch=needs_batch,
            parameters={name: (tuple(t.shape), _name(t)) for name, t in state.items() if t is not None},
        )
        if problem is not None:
            raise _ERRORS[problem.kind](problem.message)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Statistics and parameters stay float32 when the model becomes half (BN-10)."""

        def keep(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device, torch.float32) if new.dtype in (torch.float16, torch.bfloat16) else new

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]


def check(layer: Any) -> None:
    """Raise ValueError or TypeError if a layer with PyTorch's attributes has parameters that the specification forbids."""
    momentum = None if layer.momentum is None else layer.momentum and 1.0 - layer.momentum
    BatchNormSpec(eps=layer.eps, momentum=momentum)


def keep_single(layer: torch.nn.Module) -> None:
    """Make half-precision parameters and statistics float32 (BN-10)."""
    layer._apply(lambda t: t)  # type: ignore[no-untyped-call]


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


class BatchNorm1d(Layer, torch.nn.BatchNorm1d):
    """Takes the place of ``torch.nn.BatchNorm1d``: its arguments, its checkpoints; input (N, C) or (N, C, L)."""

    ranks = (2, 3)


class BatchNorm2d(Layer, torch.nn.BatchNorm2d):
    """Takes the place of ``torch.nn.BatchNorm2d``: its arguments, its checkpoints; input (N, C, H, W)."""

    ranks = (4,)


class BatchNorm3d(Layer, torch.nn.BatchNorm3d):
    """Takes the place of ``torch.nn.BatchNorm3d``: its arguments, its checkpoints; input (N, C, D, H, W)."""

    ranks = (5,)


class BatchNorm(Layer):
    """The article's block, in PyTorch.

    Args:
        num_features: C, the size of the channel axis.
        num_dims: rank of the input: 2 for fully connected layers (N, C), 4 for convolutions (N, C, H, W); 3 and 5 too.
        spec: what it computes; ``BatchNormSpec.article()`` is the article's own.
        implementation: see ``Layer``.
        device, dtype: of the state; float32, or float64 for float64 input (BN-10).

    State, under PyTorch's names: weight (gamma, ones), bias (beta, zeros), running_mean (zeros), running_var (ones),
    num_batches_tracked. ``gamma``, ``beta``, ``moving_mean`` and ``moving_var`` are the article's names for the same tensors.

    Raises:
        ValueError: num_features < 1, or num_dims not 2 to 5.
    """

    def __init__(
        self,
        num_features: int,
        num_dims: int,
        spec: BatchNormSpec | None = None,
        *,
        implementation: Implementation = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
            raise ValueError(
                f"num_features must be a whole number >= 1, the size of the channel axis, got {num_features!r} (BN-01)."
            )
        if num_dims not in (2, 3, 4, 5):
            raise ValueError(f"num_dims must be 2, 3, 4 or 5, the rank of the input (N, C, ...), got {num_dims!r} (BN-01).")
        spec = spec or BatchNormSpec()
        momentum = None if spec.momentum is None else 1.0 - spec.momentum
        affine = spec.scale or spec.center
        super().__init__(num_features, spec.eps, momentum, affine, True, device, dtype, implementation=implementation)
        for name, wanted in (("weight", spec.scale), ("bias", spec.center)):
            if not wanted:
                self.register_parameter(name, None)
        self.requires_grad_(spec.learn_affine)
        self.num_dims, self.ranks = num_dims, (num_dims,)
        self.moving_variance = spec.moving_variance
        self.normalize_with, self.update_statistics = spec.normalize_with, spec.update_statistics
        self._given = (momentum, spec.momentum)

    def _old(self) -> float:
        momentum, old = self._given  # 1 - (1 - old) is not always old
        return old if old is not None and self.momentum == momentum else super()._old()

    def extra_repr(self) -> str:
        """The constructor's arguments, and what is frozen."""
        spec = replace(self.spec, update_statistics=True, learn_affine=True)
        return f"{self.num_features}, {self.num_dims}, {spec_text(spec)}{self.frozen_text()}"

    gamma = property(lambda self: self.weight, doc="The article's name for weight.")
    beta = property(lambda self: self.bias, doc="The article's name for bias.")
    moving_mean = property(lambda self: self.running_mean, doc="The article's name for running_mean.")
    moving_var = property(lambda self: self.running_var, doc="The article's name for running_var.")
