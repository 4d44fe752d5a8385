"""BatchNorm of PyTorch tensors in eager mode, computed by the kernel."""

from __future__ import annotations

from ctypes import Array, addressof, c_double
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from multibn.layer.types import PARAMETER_TYPE
from multibn.memory import LENT, advise, take
from multibn_torch.compat import direct_apply, is_legacy_batched, profiler_enabled
from multibn_torch.compat import recomputed as recomputed
from multibn_torch.compat import run_as_written as run_as_written
from multibn_torch.compat import show_as as show_as
from multibn_torch.compat import transformed as transformed

from . import formulas, nonfinite, recompute
from .formulas import Moving, Settings
from .gate import (
    NotPlainError,
    Places,
    address,
    backward_again,
    check_apart,
    check_can_be_saved,
    forward_again,
    known_address,
    refusal,
)

_CPU = torch.device("cpu")  # explicit, since the default device may be another

NAME = "multibn::batch_norm"
"""What the profiler shows."""

PARAMETER = {getattr(torch, x): getattr(torch, parameter) for x, parameter in PARAMETER_TYPE.items()}
"""Type of the input -> type of gamma, beta and the moving statistics (BN-10)."""


Statistics = Array[c_double] | Tensor
"""Mean and 1/sqrt(var+eps) used for normalising, (2, C) float64: on CPU a ctypes array, which is faster to create than a
tensor.
"""


def by_kernel(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings, layer: nonfinite.Named | None = None,
    rectify: bool = False,
) -> Tensor:  # fmt: skip
    """Return y for CPU or CUDA tensors, without copying them; update the moving statistics in place (BN-05).

    The bits follow BN-15, the accuracy BN-16.

    Args:
        layer: the layer, for the warning about NaN or Inf.
        rectify: return max(y, 0).

    Raises:
        NotPlainError: the kernel cannot use one of the tensors; nothing has changed.
    """
    y: Tensor
    refused: list[Tensor] = []
    if torch.is_grad_enabled():
        if x.is_inference() or (gamma is not None and gamma.is_inference()):
            check_can_be_saved(x, gamma, beta)
        y = _apply(x, gamma, beta, (moving, how, refused, rectify, layer))
        if recompute.active() and y.grad_fn is not None and not x.is_inference():
            again = partial(kernel_again, statistics=y.grad_fn.kept[0], rectify=rectify)  # type: ignore[attr-defined]
            recompute.remember(y, again, x, gamma, beta)
    elif profiler_enabled():
        with record_function(NAME):
            y, _ = kernel_forward(x, gamma, beta, moving, how, refused, rectify, layer)
    else:
        y, _ = kernel_forward(x, gamma, beta, moving, how, refused, rectify, layer)
    if refused and layer is not None:
        nonfinite.tell(layer, x)
    return y


def looked_through(dy: Tensor) -> bool:
    """Return whether backward itself must be differentiable or vmappable (double backward, ``torch.func``,
    ``is_grads_batched``).
    """
    return torch.is_grad_enabled() or transformed() or bool(is_legacy_batched(dy))


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, call: tuple[Moving, Settings, list[Tensor], bool, Any]
    ) -> Tensor:
        _, how, _, rectify, _ = call
        y, statistics, seen = _forward(x, gamma, beta, *call)
        ctx.save_for_backward(x, gamma, beta if rectify else None)
        ctx.kept = statistics, how, beta is not None, rectify, seen
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma, beta = ctx.saved_tensors
        statistics, (eps, _, _, through, _), has_beta, rectify, seen = ctx.kept
        if looked_through(dy):
            _check_saved(x, laid_out(x)[2], seen)
            normalised_by = as_tensor(statistics)
            if rectify:
                dy = dy * formulas.positive(x, gamma, beta, normalised_by)
            dx, dgamma, dbeta = formulas.gradients(dy, x, gamma, normalised_by, eps, through)
        else:
            dx, dgamma, dbeta = kernel_backward(dy, x, gamma, statistics, through, beta, rectify, seen)
        return dx, None if gamma is None else dgamma, dbeta if has_beta else None, None


Seen = tuple[torch.dtype, tuple[int, int, int], int, int]
"""Properties of the inputs in forward, which backward compares: type, (N, C, S) and address of x, address of gamma. A plain
tuple, since creating a NamedTuple takes ten times as long.
"""


def _check_saved(x: Tensor, shape: tuple[int, int, int], seen: Seen) -> None:
    dtype, (n, channels, _), _, _ = seen
    if shape != seen[1] or x.dtype is not dtype:
        raise RuntimeError(
            f"backward needs the input that forward saved, {n} samples of {channels} channels of type {dtype}, got "
            f"shape {tuple(x.shape)} of type {x.dtype}. Do not assign to .data between forward and backward, and let hooks on "
            "saved tensors return what they were given."
        )


_kernel: Any = _Kernel
show_as(_kernel, NAME)
_apply: Any = direct_apply(_kernel)  # ``dispatch`` never calls it under a transform
run_as_written(_kernel.backward)


def kernel_forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings, refused: list[Tensor] | None = None,
    rectify: bool = False, layer: nonfinite.Named | None = None,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """Return y and the statistics that normalised, (2, C), which ``kernel_backward`` needs.

    Args:
        refused: output: x is appended if a channel's moving statistics are not updated because of NaN or Inf (BN-11).
        rectify: return max(y, 0).
        layer: the layer; caches the addresses of tensors that have been checked.

    Raises:
        NotPlainError: the kernel cannot use one of the tensors; nothing has changed.
    """
    y, statistics, _ = _forward(x, gamma, beta, moving, how, refused, rectify, layer)
    return y, statistics


def _forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: Settings, refused: list[Tensor] | None,
    rectify: bool, layer: nonfinite.Named | None,
) -> tuple[Tensor, Statistics, Seen]:  # fmt: skip
    if not x.is_cpu:
        y, statistics = _elsewhere(x).kernel_forward(x, gamma, beta, moving, how, refused, rectify)
        return y, statistics, (x.dtype, laid_out(x)[2], 0, 0)
    eps, old, unbiased, use_batch, update = how
    mean, var, batches = moving
    dtype = x.dtype
    kind = kernel_of(dtype, x.shape[1])
    if old is None:
        old = weight_of_old(batches)
    x, size, shape = laid_out(x)
    if not size:
        return output_like(x), kind.statistics(), (dtype, shape, 0, 0)
    nbytes = size * kind.itemsize
    x_at = known_address(x, nbytes) or address(x, dtype, nbytes, "the input")
    places = None if layer is None else forward_again(gamma, beta, mean, var, batches, update)
    whole_mean, whole_var = mean, var
    if places is None or layer is None or layer._examined != places:
        gamma, beta, whole_mean, whole_var = whole(gamma, beta, mean, var)
        gamma_at, beta_at, mean_at, var_at, count_at = _examine(kind, gamma, beta, whole_mean, whole_var, moving, update)
        if layer is not None and places is not None:
            layer._examined = gamma_at, beta_at, mean_at, var_at, count_at
    else:
        gamma_at, beta_at, mean_at, var_at, count_at = places
    y, statistics = output_like(x), kind.statistics()  # a ctypes array: a tensor takes many times as long to create
    if update and not count_at and batches is not None:
        batches.add_(1)
    left = kind.kernel.forward_at(
        kind.kernel.team(kind.forward, size, torch.get_num_threads()), shape, x_at, y.data_ptr(), gamma_at or kind.one,
        beta_at or kind.zero, mean_at or kind.zero, var_at or kind.one, addressof(statistics), count_at, eps, old, unbiased,
        use_batch, update, rectify,
    )  # fmt: skip
    if left and refused is not None:
        refused.append(x)
    if update:
        if mean is not whole_mean:
            mean.copy_(whole_mean)  # type: ignore[union-attr, arg-type]
        if var is not whole_var:
            var.copy_(whole_var)  # type: ignore[union-attr, arg-type]
    return y, statistics, (dtype, shape, x_at, gamma_at)


def kernel_backward(
    dy: Tensor, x: Tensor, gamma: Tensor | None, statistics: Statistics, through: bool, beta: Tensor | None = None,
    rectify: bool = False, seen: Seen | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dgamma and dbeta of ``kernel_forward``, given the statistics that ``kernel_forward`` returned.

    Args:
        through: whether forward normalised with batch statistics (BN-08).
        seen: what forward saved.

    Raises:
        NotPlainError: the kernel cannot use one of the tensors.
        RuntimeError: x has another type or shape than in forward.
    """
    if not x.is_cpu:
        if seen is not None:
            _check_saved(x, laid_out(x)[2], seen)
        return _elsewhere(x).kernel_backward(  # type: ignore[no-any-return]
            dy, x, gamma, statistics, through, beta, rectify
        )
    dtype = x.dtype
    kind = kernel_of(dtype, x.shape[1])
    x, size, shape = laid_out(x)
    x_seen = gamma_seen = 0
    if seen is not None:
        kind_seen, shape_seen, x_seen, gamma_seen = seen
        if shape != shape_seen or dtype is not kind_seen:
            _check_saved(x, shape, seen)
    dx = output_like(x)
    if dy.stride() != x.stride():
        dy = laid_out_as(x, dy)
    parameter = kind.parameter
    if size == 0:
        return dx, torch.zeros_like(parameter), torch.zeros_like(parameter)
    nbytes, x_at, gamma_at = size * kind.itemsize, x_seen, gamma_seen or kind.one
    if not backward_again(x, x_seen, gamma, gamma_seen, parameter.dtype, kind.nbytes):
        x_at = address(x, dtype, nbytes, "the input")
        if gamma is not None:
            if gamma.dim() != 1:
                raise refusal(gamma, parameter.dtype, "weight")
            gamma = gamma.contiguous()
            gamma_at = address(gamma, parameter.dtype, kind.nbytes, "weight")
    beta = None if beta is None else beta.contiguous()
    beta_at = kind.zero if beta is None else address(beta, parameter.dtype, kind.nbytes, "bias")
    dy_at = known_address(dy, nbytes) if dy.dtype is dtype and dy.is_cpu and dy.nbytes == nbytes else 0
    if not dy_at:
        try:
            dy_at = address(dy, dtype, nbytes, "the gradient of the output")
        except NotPlainError:
            dy = laid_out_as(x, dy)
            dy_at = dy.data_ptr()
    if isinstance(statistics, Tensor):
        statistics = statistics.contiguous()
        statistics_at = address(statistics, torch.float64, 2 * parameter.numel() * 8, "the statistics")
    else:
        statistics_at = addressof(statistics)
    dgamma, dbeta = torch.empty_like(parameter), torch.empty_like(parameter)
    kind.kernel.backward_at(
        kind.kernel.team(kind.backward, size, torch.get_num_threads()), shape, x_at, dy_at, dx.data_ptr(), gamma_at, beta_at,
        statistics_at, dgamma.data_ptr(), dbeta.data_ptr(), through, rectify,
    )  # fmt: skip
    return dx, dgamma, dbeta


def _examine(
    kind: _Kind, gamma: Tensor | None, beta: Tensor | None, whole_mean: Tensor | None, whole_var: Tensor | None, moving: Moving,
    update: bool,
) -> Places:  # fmt: skip
    """Check the parameters and moving statistics (see ``gate``); return their addresses."""
    named = {"weight": gamma, "bias": beta, "running_mean": whole_mean, "running_var": whole_var}
    for name, t in named.items():
        if t is not None and t.shape != kind.parameter.shape:
            raise refusal(t, kind.parameter.dtype, name)
    gamma_at, beta_at, mean_at, var_at = (
        0 if t is None else address(t, kind.parameter.dtype, kind.nbytes, name) for name, t in named.items()
    )
    count_at = 0
    if update:
        check_apart(moving.mean, moving.var, (gamma_at, beta_at, mean_at, var_at), kind.nbytes)
        batches = moving.batches
        if batches is not None and batches.dtype is torch.int64 and batches.numel() == 1:
            count_at = address(batches, torch.int64, 8, "num_batches_tracked")
    return gamma_at, beta_at, mean_at, var_at, count_at


def kernel_again(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, *, statistics: Statistics, rectify: bool
) -> Tensor:  # fmt: skip
    """Recompute y of ``kernel_forward`` with the same bits: run only the last pass, with the saved statistics."""
    if not x.is_cpu:
        return _elsewhere(x).kernel_again(x, gamma, beta, statistics=statistics, rectify=rectify)  # type: ignore[no-any-return]
    assert not isinstance(statistics, Tensor)
    kind = kernel_of(x.dtype, x.shape[1])
    x, size, shape = laid_out(x)
    y = output_like(x)
    if size:
        x_at = address(x, x.dtype, size * kind.itemsize, "the input")
        scale = as_tensor(statistics)[1]
        scale = scale if gamma is None else scale * gamma.detach()
        (beta,) = whole(beta)
        beta_at = kind.zero if beta is None else address(beta, kind.parameter.dtype, kind.nbytes, "bias")
        kind.kernel.normalise_at(
            kind.kernel.team(kind.forward, size, torch.get_num_threads()), shape, x_at, y.data_ptr(), beta_at,
            addressof(statistics), scale.numpy(), rectify,
        )  # fmt: skip
    return y


class _Kind(NamedTuple):
    """The kernel for one input type and number of channels."""

    kernel: Any
    forward: int
    backward: int
    one: int
    """Address of ones, in place of a missing gamma."""
    zero: int
    parameter: Tensor
    """A tensor of gamma's type and shape."""
    itemsize: int
    """Bytes per value of the input."""
    nbytes: int
    """Bytes of gamma."""
    statistics: type[Array[c_double]]
    kept: Any


@lru_cache(maxsize=256)
def kernel_of(dtype: torch.dtype, channels: int) -> _Kind:
    """Return the kernel for an input type and number of channels."""
    from multibn.kernel import entry as kernel  # import Numba only when needed

    bodies = kernel.prepare({torch.float16: "int16", torch.bfloat16: "uint16"}.get(dtype) or str(dtype).removeprefix("torch."))
    one = torch.ones(channels, dtype=PARAMETER[dtype], device=_CPU)
    zero = torch.zeros_like(one)
    addresses = bodies.forward.address, bodies.backward.address, one.data_ptr(), zero.data_ptr()
    return _Kind(kernel, *addresses, zero, dtype.itemsize, one.nbytes, c_double * (2 * channels), (bodies, one))


def weight_of_old(batches: Tensor | None) -> float:
    """Return the weight of the old moving statistics for momentum None, which weights all batches equally.

    Raises:
        RuntimeError: there is no num_batches_tracked.
    """
    if batches is None:
        raise RuntimeError(
            "momentum=None needs num_batches_tracked, the number of batches so far, got None (BN-05). Set it to torch.tensor(0), "
            "or give a momentum."
        )
    n = int(batches)
    return n / (n + 1)


def _elsewhere(x: Tensor) -> Any:
    """Return the module that computes on x's device.

    Raises:
        RuntimeError: no kernel supports the device, or Triton cannot be imported.
    """
    if not x.is_cuda:
        raise RuntimeError(
            f"implementation='kernel' computes on cpu and cuda, got input on {x.device}. Move the input, or use 'auto'."
        )
    try:
        from . import on_gpu
    except ImportError as error:
        raise RuntimeError(
            f"implementation='kernel' computes on cuda by Triton, which cannot be imported: {error}. Install the Triton "
            "that belongs to this PyTorch, or use 'auto'."
        ) from error
    return on_gpu


def as_tensor(statistics: Statistics) -> Tensor:
    """View the statistics that ``kernel_forward`` returned as a tensor, without a copy."""
    if isinstance(statistics, Tensor):
        return statistics
    return torch.frombuffer(statistics, dtype=torch.float64).view(2, -1)


def dense(x: Tensor) -> Tensor:
    """Return x if it is contiguous or channels-last contiguous, else a contiguous copy."""
    return laid_out(x)[0]


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Rank -> channels-last layout, where PyTorch has a name for it, by which it is recognised faster."""


def laid_out(x: Tensor) -> tuple[Tensor, int, tuple[int, int, int]]:
    """Return ``dense(x)``, its number of values, and (N, C, S) for the kernel; S is 1 for channels-last memory."""
    shape, size = x.shape, x.numel()
    n, channels = shape[0], shape[1]
    if not x.is_contiguous():
        last = CHANNELS_LAST.get(x.dim())
        if x.movedim(1, -1).is_contiguous() if last is None else x.is_contiguous(memory_format=last):
            return x, size, (size // channels, channels, 1)
        x = x.contiguous()
    return x, size, (n, channels, size and size // (n * channels))


def laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    """Copy a gradient to the type and memory layout of x.

    Raises:
        RuntimeError: dy has another shape, which only a call of an operator by hand can bring about.
    """
    if dy.shape != x.shape:
        raise RuntimeError(f"backward needs a gradient of the output's shape {tuple(x.shape)}, got {tuple(dy.shape)}.")
    return torch.empty_like(x).copy_(dy)


def whole(*ts: Tensor | None) -> list[Tensor | None]:
    """Make each tensor contiguous; a contiguous tensor is returned as it is."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in ts]


def output_like(x: Tensor) -> Tensor:
    """Allocate an output of x's shape, type and layout; reuse memory for large ones."""
    if x.nbytes < LENT:
        return torch.empty_like(x)
    if recompute.active():  # what is not to be stored is not kept for later either
        y = torch.empty_like(x)
        advise(y.data_ptr(), y.nbytes, 4 * LENT)
        return y
    return torch.frombuffer(take(x.nbytes), dtype=x.dtype).as_strided_(x.shape, x.stride())
