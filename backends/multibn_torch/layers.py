"""BatchNorm as PyTorch modules: ``BatchNorm``, configured by a ``BatchNormSpec``, and drop-in replacements for PyTorch's own
layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.fx import Proxy

from multibn import identity
from multibn.layer.inputs import objection
from multibn.spec.batchnorm import BatchNormSpec, spec_text
from multibn.spec.parameters import check_features, check_rank, real_number

from . import refusals
from .compat import BatchNormBase, tracing_state
from .forward.dispatch import normalise, rectify
from .forward.eager import PARAMETER
from .forward.formulas import Moving, Settings
from .forward.identity import begin
from .switches import Switches

Implementation = Literal["auto", "kernel", "framework"]

ERRORS: dict[str, type[Exception]] = {
    "rank": ValueError,
    "channels": RuntimeError,
    "input type": NotImplementedError,
    "parameter type": RuntimeError,
    "one value": ValueError,
}
"""Kind of problem -> exception class, the same as ``torch.nn.functional.batch_norm`` raises."""

_HALF = (torch.float16, torch.bfloat16)


class Layer(Switches, BatchNormBase):
    """Base class of the layers: forward, types of the state, repr.

    Attributes:
        implementation: "kernel" (multibn's kernel: the same bits on CPU and, through Triton, on CUDA), "framework" (PyTorch's
            own operators, any device), or "auto": the kernel where measurements show it at least as fast, which is on CPU; the
            operators elsewhere.
        init: "identity" initialises gamma and beta so that the first training batch passes unchanged; see ``multibn.identity``.
        name: the layer's name in the model, for messages; set by ``swap``.
        fuse_relu: return max(y, 0), computed in the same pass as y; set by ``swap`` if a ReLU follows, which then returns its
            input unchanged.
        fused_in: keys of the modules that call both the layer and its ReLU; the layer rectifies only inside their forward. Set by
            ``swap``.
        before_function: whether the ReLU is a function, such as ``torch.nn.functional.relu``; set by ``swap``.
    """

    ranks: tuple[int, ...]
    implementation: Implementation = "auto"
    init: identity.Init = "standard"
    _began = False
    _examined: Any = None  # addresses at which the kernel's gate last checked the tensors
    name: str = ""
    fuse_relu = False
    fused_in: tuple[str, ...] = ()  # keys of the modules that call the layer and its ReLU
    before_function = False  # whether one of these ReLUs is a function
    moving_variance: Literal["biased", "unbiased"] = "unbiased"

    @property
    def spec(self) -> BatchNormSpec:
        """The specification that this layer currently computes."""
        return BatchNormSpec(
            eps=self.eps,
            momentum=BatchNormSpec.momentum if self.momentum == 0 else self._old(),
            moving_variance=self.moving_variance,
            scale=self.weight is not None,
            center=self.bias is not None,
            normalize_with=self.normalize_with,
            update_statistics=self.update_statistics and self.track_running_stats and self.momentum != 0,
            learn_affine=any(p.requires_grad for p in self.parameters(recurse=False)) or not self.affine,
        )

    def __init__(
        self, *args: Any, implementation: Implementation = "auto", init: identity.Init = "standard", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if implementation not in get_args(Implementation):
            raise ValueError(
                f"implementation must be {' or '.join(map(repr, get_args(Implementation)))}, got {implementation!r}."
            )
        if implementation != "auto":
            self.implementation = implementation
        check_layer(self)
        keep_single(self)
        self._set_init(init)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return y for x, in the layer's mode (BN-01 to BN-12).

        Args:
            input: x, of shape (N, C, ...).
            mask: (N, ...), boolean, for sequences of different lengths: the layer ignores x where the mask is False and returns 0
                there.

        Raises:
            ValueError: wrong rank, or one value per channel in training; a mask of the wrong shape.
            RuntimeError: wrong number of channels, or parameters of the wrong type, shape or device; a mask on another device.
            NotImplementedError: the input's type is not floating point.
            TypeError: the mask is not boolean.
        """
        if isinstance(input, Proxy):
            return as_leaf(self, input, mask)
        parameters, buffers = self._parameters, self._buffers  # much faster than attribute access
        # pruning and parametrization remove weight and bias from the dict
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        mean, var = buffers["running_mean"], buffers["running_var"]
        training = self.training
        update = training and mean is not None and self.track_running_stats and self.update_statistics
        use_batch = mean is None or (training and self.normalize_with == "batch")
        needs_batch = (update or use_batch) and mask is None
        size, kind, on_cpu = self.num_features, PARAMETER.get(input.dtype), input.is_cpu
        if tracing_state() is None and not (  # torch.jit.trace warns about every comparison
            input.dim() in self.ranks
            and input.shape[1] == size
            and (input.numel() > size or not needs_batch)
            and (weight is None or (weight.dtype == kind and weight.numel() == size))
            and (bias is None or (bias.dtype == kind and bias.numel() == size))
            and (mean is None or (mean.dtype == kind and mean.numel() == size))
            and (var is None or (var.dtype == kind and var.numel() == size))
            # for CPU input, gate.py checks the state's device
            and (on_cpu or all(t is None or t.is_cpu is on_cpu for t in (weight, bias, mean, var)))
            and (mean is None) is (var is None)
        ):
            self._refuse(input, needs_batch)
            update = False  # _refuse found no error, so the batch is empty, and an empty batch does not update (BN-12)
        if self.init == "identity" and training and use_batch:
            begin(self, input, mask)
        on_kernel = on_cpu if self.implementation == "auto" else self.implementation == "kernel"
        how = Settings(self.eps, self._old() if update else 0.0, self.moving_variance == "unbiased", use_batch, update)
        moving = Moving(mean, var, buffers["num_batches_tracked"])
        way = rectify if self.fuse_relu else normalise
        return way(input, weight, bias, moving, how, on_kernel, mask, self)

    def __prepare_scriptable__(self) -> None:
        """Called by ``torch.jit.script``, which cannot compile the layer.

        Raises:
            RuntimeError: always.
        """
        refusals.refuse("torch.jit.script", self)

    def extra_repr(self) -> str:
        """Extend PyTorch's repr by every setting that differs from PyTorch's default, and by ``by=multibn``."""
        text = str(super().extra_repr())  # type: ignore[no-untyped-call]
        text += "" if self.normalize_with == "batch" else f", normalize_with={self.normalize_with!r}"
        text += self.frozen_text()
        text += "" if self.init == "standard" else f", init={self.init!r}"
        text += self._relu_text()
        return text + ("" if self.implementation == "auto" else f", implementation={self.implementation!r}") + ", by=multibn"

    def _relu_text(self) -> str:
        return ", fuse_relu=True" if self.fuse_relu else ""

    def reset_parameters(self) -> None:
        """Reset parameters and statistics to their initial values; init="identity" applies again to the next training batch."""
        super().reset_parameters()
        self._began = False

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._began = False

    def _set_init(self, init: identity.Init) -> None:
        if init != "standard":
            identity.check_init(init, self.spec)
            self.init = init

    def _old(self) -> float | None:
        """Return the weight of the old moving statistics, None for equal weights; PyTorch's momentum weights the batch."""
        return None if self.momentum is None else 1.0 - self.momentum

    def _refuse(self, x: Tensor, needs_batch: bool) -> None:
        """Raise an exception if x or the state is invalid."""
        names = ("weight", "bias", "running_mean", "running_var")
        state = {name: t for name in names if (t := getattr(self, name)) is not None}
        problem = objection(
            tuple(x.shape),
            type_name(x),
            num_features=self.num_features,
            ranks=self.ranks,
            needs_batch=needs_batch,
            parameters={name: (tuple(t.shape), type_name(t)) for name, t in state.items()},
            cast=how_to_cast(x.dtype),
        )
        if problem is not None:
            raise ERRORS[problem.kind](problem.message)
        if (self.running_mean is None) is not (self.running_var is None):
            raise RuntimeError(
                "expected running_mean and running_var, or neither, got only "
                f"{'running_var' if self.running_mean is None else 'running_mean'} (BN-05). Give both, or set both to None."
            )
        for name, t in state.items():
            if t.is_cpu != x.is_cpu:
                raise RuntimeError(
                    f"expected {name} on {x.device}, where the input is, got it on {t.device}. Move the layer or the input."
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply fn, but keep statistics and parameters in float32 when the model is cast to half precision (BN-10)."""

        def keep(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device, torch.float32) if new.dtype in _HALF else new

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]


def check_layer(layer: Any) -> None:
    """Raise ValueError or TypeError if the eps or momentum of a PyTorch layer violates the specification."""
    BatchNormSpec(eps=layer.eps)
    if layer.momentum is None:
        return
    allowed = "a number with 0 <= momentum <= 1, or None"
    momentum = real_number("momentum", layer.momentum, allowed)
    if momentum != 0 and not 0 <= 1 - momentum < 1:  # 0 is PyTorch's way to never update
        raise ValueError(
            f"momentum must be {allowed}, got {layer.momentum!r} (BN-05). In PyTorch, it is the weight of the new value."
        )


def keep_single(layer: torch.nn.Module) -> None:
    """Convert half-precision parameters and statistics to float32 (BN-10)."""
    if any(t.dtype in _HALF for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))):
        layer._apply(lambda t: t)  # type: ignore[no-untyped-call]


def as_leaf(layer: Layer, x: Proxy, mask: Proxy | None) -> Proxy:
    """Record the layer as one call_module node in a ``torch.fx`` graph, as ``torch.fx`` does for PyTorch's own layers."""
    refusals.check_tracer(layer)
    keywords = {} if mask is None else {"mask": mask}
    tracer: Any = x.tracer
    y: Proxy = tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), keywords)
    return y


_CASTS = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}


def how_to_cast(dtype: torch.dtype) -> str:
    """Return the end of an error message: which cast gives the layer the types for this input."""
    return (
        f"Call {_CASTS.get(dtype, 'float')}() of the layer or of the model, also after load_state_dict(assign=True), "
        "which keeps the types of what it loads."
    )


def type_name(t: Tensor) -> str:
    """Return NumPy's name for a tensor's type, such as ``float32``."""
    return str(t.dtype).removeprefix("torch.")


class BatchNorm1d(Layer, torch.nn.BatchNorm1d):
    """Drop-in replacement for ``torch.nn.BatchNorm1d``: same arguments, same checkpoints; input (N, C) or (N, C, L)."""

    ranks = (2, 3)


class BatchNorm2d(Layer, torch.nn.BatchNorm2d):
    """Drop-in replacement for ``torch.nn.BatchNorm2d``: same arguments, same checkpoints; input (N, C, H, W)."""

    ranks = (4,)


class BatchNorm3d(Layer, torch.nn.BatchNorm3d):
    """Drop-in replacement for ``torch.nn.BatchNorm3d``: same arguments, same checkpoints; input (N, C, D, H, W)."""

    ranks = (5,)


class BatchNorm(Layer):
    """The article's block, as a PyTorch module.

    Args:
        num_features: C, the size of the channel axis.
        num_dims: rank of the input: 2 for fully connected layers (N, C), 4 for convolutions (N, C, H, W); 3 and 5 too.
        spec: parameters of the layer; default ``BatchNormSpec()``.
        implementation, init: see ``Layer``.
        device, dtype: of the state; float32, or float64 for float64 input (BN-10).

    The state has PyTorch's names: weight (gamma, ones), bias (beta, zeros), running_mean (zeros), running_var (ones),
    num_batches_tracked. ``gamma``, ``beta``, ``moving_mean`` and ``moving_var`` are the article's names for the same tensors.

    Raises:
        ValueError: num_features < 1, num_dims not 2 to 5, or init="identity" without gamma, beta or batch statistics.
    """

    def __init__(
        self,
        num_features: int,
        num_dims: int,
        spec: BatchNormSpec | None = None,
        *,
        implementation: Implementation = "auto",
        init: identity.Init = "standard",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_features(num_features)
        check_rank(num_dims)
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
        self._set_init(init)

    def _old(self) -> float | None:
        momentum, old = self._given  # 1 - (1 - old) may round to another value than old
        return old if old is not None and self.momentum == momentum else super()._old()

    def extra_repr(self) -> str:
        """The constructor's arguments, and what is frozen."""
        spec = replace(self.spec, update_statistics=True, learn_affine=True)
        init = "" if self.init == "standard" else f", init={self.init!r}"
        return f"{self.num_features}, {self.num_dims}, {spec_text(spec)}{init}{self.frozen_text()}{self._relu_text()}"

    gamma = property(lambda self: self.weight, doc="The article's name for weight.")
    beta = property(lambda self: self.bias, doc="The article's name for bias.")
    moving_mean = property(lambda self: self.running_mean, doc="The article's name for running_mean.")
    moving_var = property(lambda self: self.running_var, doc="The article's name for running_var.")
