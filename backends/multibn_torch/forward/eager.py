"""BatchNorm by the kernel as a function of PyTorch tensors, for programs that run as they are written."""

from __future__ import annotations

from contextlib import suppress
from ctypes import Array, addressof, c_double
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from multibn.layer.types import PARAMETER_TYPE
from multibn.memory import LENT, take

from . import formulas, nonfinite, recompute
from .formulas import How, Moving

_CPU = torch.device("cpu")  # named, since there may be another default

PARAMETER = {getattr(torch, x): getattr(torch, parameter) for x, parameter in PARAMETER_TYPE.items()}
"""Type of the input -> type of gamma, beta and the moving statistics (BN-10)."""

Statistics = Array[c_double] | Tensor
"""The statistics that normalised, (2, C) float64: on a CPU in memory of their own, since a tensor takes longer to make."""


def by_kernel(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: How, layer: nonfinite.Named | None = None,
    rectify: bool = False,
) -> Tensor:  # fmt: skip
    """y, on CPU or CUDA tensors, without copying them; the moving statistics are updated in place (BN-05).

    Bits as BN-15 fixes them, accuracy as BN-16 says. The layer is named where the batch is poisoned. rectify: y is max(y, 0).
    """
    y: Tensor
    refused: list[Tensor] = []
    x = _alive(x)  # it may have been taken out of a transform, in a shell that has no memory
    if torch.is_grad_enabled():
        y = _apply(x, gamma, beta, (moving, how, refused, rectify))
        if recompute.active() and y.grad_fn is not None and x.is_cpu and not x.is_inference():
            again = partial(kernel_again, statistics=y.grad_fn.kept[0], rectify=rectify)  # type: ignore[attr-defined]
            recompute.remember(y, again, x, gamma, beta)
    else:
        y, _ = kernel_forward(x, gamma, beta, moving, how, refused, rectify)
    if refused and layer is not None:
        nonfinite.tell(layer, x)
    return y


def transformed() -> bool:
    """Whether forward-mode differentiation or another transform of ``torch.func`` is active."""
    return forward_ad._current_level >= 0 or bool(torch._C._are_functorch_transforms_active())


def looked_through(dy: Tensor) -> bool:
    """Whether a gradient is to be differentiated again, or mapped over (also by ``is_grads_batched``)."""
    return torch.is_grad_enabled() or transformed() or bool(torch._C._functorch.is_legacy_batchedtensor(dy))


def recomputed() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing runs it a second time (BN-05)."""
    return bool(torch._C._current_graph_task_id() != -1)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, call: tuple[Moving, How, list[Tensor], bool]
    ) -> Tensor:
        moving, how, refused, rectify = call
        y, statistics = kernel_forward(x, gamma, beta, moving, how, refused, rectify)
        ctx.save_for_backward(x, gamma, beta if rectify else None)
        ctx.kept = statistics, how, beta is not None, rectify
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma, beta = ctx.saved_tensors
        statistics, (eps, _, _, through, _), has_beta, rectify = ctx.kept
        if looked_through(dy):
            known = as_tensor(statistics)
            if rectify:
                dy = dy * formulas.positive(x, gamma, beta, known)
            dx, dgamma, dbeta = formulas.gradients(dy, x, gamma, known, eps, through)
        else:
            dx, dgamma, dbeta = kernel_backward(dy, x, gamma, statistics, through, beta, rectify)
        return dx, None if gamma is None else dgamma, dbeta if has_beta else None, None


_kernel: Any = _Kernel
_alive: Any = torch._C._functorch.unwrap_if_dead
# PyTorch asks in each call, forward and backward, which kind of a function this is, for longer than a small batch takes; and for
# transforms, which ``ways`` has sent elsewhere.
_apply: Any = super(torch.autograd.Function, _kernel).apply
_kernel._backward_cls.apply = _kernel.backward


def run_as_written(function: Any) -> None:
    """Tell a compiler that meets the function, as compiled autograd does, to run it and all it calls; else it warns of each step.

    ``torch.compiler.disable`` says the same by a function around it, at each call.
    """
    function._torchdynamo_disable = True
    frames: Any = torch._C._dynamo.eval_frame
    with suppress(AttributeError):  # in older ones, which warn
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


run_as_written(_kernel.backward)


def kernel_forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Moving, how: How, refused: list[Tensor] | None = None,
    rectify: bool = False,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """y (for rectify max(y, 0)) and, for ``kernel_backward``, the statistics that normalised, (2, C).

    x is put into ``refused`` where the moving statistics of a channel do not take it in (BN-11).

    Raises:
        RuntimeError: x is neither on a CPU nor on a CUDA device, or there is no Triton for that.
    """
    if not x.is_cpu:
        return _elsewhere(x).kernel_forward(  # type: ignore[no-any-return]
            x, gamma, beta, moving, how, refused, rectify
        )
    eps, old, unbiased, use_batch, update = how
    mean, var, batches = moving
    if old is None:
        n = int(batches)  # type: ignore[arg-type]
        old = n / (n + 1)
    kind = _kind(x.dtype, x.shape[1])
    statistics = kind.statistics()  # a tensor takes many times as long to make
    x, size, shape = laid_out(x)
    y = output_like(x)
    gamma, beta, whole_mean, whole_var = whole(gamma, beta, mean, var)
    if size:
        one, zero = kind.one, kind.zero
        left = kind.kernel.forward_at(
            kind.kernel.team(kind.forward, size, torch.get_num_threads()), shape, x.data_ptr(), y.data_ptr(),
            one if gamma is None else gamma.data_ptr(), zero if beta is None else beta.data_ptr(),
            zero if whole_mean is None else whole_mean.data_ptr(), one if whole_var is None else whole_var.data_ptr(),
            addressof(statistics), 0 if batches is None else batches.data_ptr(), eps, old, unbiased, use_batch, update, rectify,
        )  # fmt: skip
        if left and refused is not None:
            refused.append(x)
    if update:
        if mean is not whole_mean:
            mean.copy_(whole_mean)  # type: ignore[union-attr, arg-type]
        if var is not whole_var:
            var.copy_(whole_var)  # type: ignore[union-attr, arg-type]
    return y, statistics


def kernel_backward(
    dy: Tensor, x: Tensor, gamma: Tensor | None, statistics: Statistics, through: bool, beta: Tensor | None = None,
    rectify: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dgamma and dbeta of ``kernel_forward``, with the statistics that it returned.

    through: whether it used batch statistics (BN-08).
    """
    if not x.is_cpu:
        return _elsewhere(x).kernel_backward(  # type: ignore[no-any-return]
            dy, x, gamma, statistics, through, beta, rectify
        )
    kind = _kind(x.dtype, x.shape[1])
    x, size, shape = laid_out(x)
    dx = output_like(x)
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    if size == 0:
        return dx, torch.zeros_like(kind.parameter), torch.zeros_like(kind.parameter)
    dgamma, dbeta = torch.empty_like(kind.parameter), torch.empty_like(kind.parameter)
    gamma, beta = whole(gamma, beta)
    kind.kernel.backward_at(
        kind.kernel.team(kind.backward, size, torch.get_num_threads()), shape, x.data_ptr(), dy.data_ptr(),
        dx.data_ptr(), kind.one if gamma is None else gamma.data_ptr(), kind.zero if beta is None else beta.data_ptr(),
        statistics.data_ptr() if isinstance(statistics, Tensor) else addressof(statistics), dgamma.data_ptr(),
        dbeta.data_ptr(), through, rectify,
    )  # fmt: skip
    return dx, dgamma, dbeta


def kernel_again(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, *, statistics: Array[c_double], rectify: bool
) -> Tensor:  # fmt: skip
    """y of ``kernel_forward``, bit for bit, by its last pass alone, on a CPU; statistics: as returned by it."""
    kind = _kind(x.dtype, x.shape[1])
    x, size, shape = laid_out(x)
    y = output_like(x)
    if size:
        scale = as_tensor(statistics)[1]
        scale = scale if gamma is None else scale * gamma.detach()
        (beta,) = whole(beta)
        kind.kernel.normalise_at(
            kind.kernel.team(kind.forward, size, torch.get_num_threads()), shape, x.data_ptr(), y.data_ptr(),
            kind.zero if beta is None else beta.data_ptr(), addressof(statistics), scale.numpy(), rectify,
        )  # fmt: skip
    return y


class _Kind(NamedTuple):
    """The kernel for a type of input and so many channels."""

    kernel: Any
    forward: int
    backward: int
    one: int
    """Where ones stand, for a gamma that there is not."""
    zero: int
    parameter: Tensor
    """Like gamma."""
    statistics: type[Array[c_double]]
    kept: Any


@lru_cache(maxsize=256)
def _kind(dtype: torch.dtype, channels: int) -> _Kind:
    from multibn.kernel import entry as kernel  # Numba is loaded when it is first needed

    bodies = kernel.prepare({torch.float16: "int16", torch.bfloat16: "uint16"}.get(dtype) or str(dtype).removeprefix("torch."))
    one = torch.ones(channels, dtype=PARAMETER[dtype], device=_CPU)
    zero = torch.zeros_like(one)
    addresses = bodies.forward.address, bodies.backward.address, one.data_ptr(), zero.data_ptr()
    return _Kind(kernel, *addresses, zero, c_double * (2 * channels), (bodies, one))


def _elsewhere(x: Tensor) -> Any:
    """The module that computes on x's device."""
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
    """What ``kernel_forward`` returned, where it lies."""
    if isinstance(statistics, Tensor):
        return statistics
    return torch.frombuffer(statistics, dtype=torch.float64).view(2, -1)


def dense(x: Tensor) -> Tensor:
    """x itself where its memory is NC... or channels-last, else a copy in NC... order."""
    return laid_out(x)[0]


def laid_out(x: Tensor) -> tuple[Tensor, int, tuple[int, int, int]]:
    """``dense``, how many values it has, and (N, C, S) for the kernel; S is 1 for channels-last memory."""
    shape, size = x.shape, x.numel()
    n, channels = shape[0], shape[1]
    if not x.is_contiguous():
        if x.movedim(1, -1).is_contiguous():
            return x, size, (size // channels, channels, 1)
        x = x.contiguous()
    return x, size, (n, channels, size and size // (n * channels))


def whole(*ts: Tensor | None) -> list[Tensor | None]:
    """Each with one value per channel, side by side in memory: itself unless it is a slice or expanded."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in ts]


def output_like(x: Tensor) -> Tensor:
    """An output of x's shape, type and layout; a large one in memory that was used before."""
    if x.nbytes < LENT:
        return torch.empty_like(x)
    return torch.frombuffer(take(x.nbytes), dtype=x.dtype).as_strided_(x.shape, x.stride())
