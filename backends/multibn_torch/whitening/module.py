"""Whitening as a PyTorch module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from multibn.whitening.arguments import layer_text, problem, resolved
from multibn.whitening.matrix import without_variance
from multibn.whitening.spec import Kind, WhiteningSpec
from multibn_torch.forward.eager import PARAMETER
from multibn_torch.forward.gate import check_can_be_saved, check_can_be_updated, check_memory, is_plain
from multibn_torch.layers import ERRORS, Implementation, type_name

from .function import Whiten

Matrix = tuple[Tensor, Tensor]


class Whitening(torch.nn.Module):
    """Whiten the channels of a batch: mean 0, variance 1, no correlation (WH-01 to WH-10).

    Args:
        num_features: C, the size of the channel axis.
        num_dims: rank of the input: 2 for fully connected layers (N, C), 4 for convolutions (N, C, H, W); 3 and 5 too.
        kind: "zca", "pca" or "newton"; None for the spec's.
        groups: number of channel groups, each whitened separately; None for the spec's.
        spec: what the layer computes.
        implementation: "kernel" (the CPU kernel), "framework" (PyTorch's own operators, any device, in the input's type), or
            "auto": the kernel on CPU, the operators elsewhere.
        device, dtype: of the state; float32, or float64 for float64 input (WH-09).

    The state has PyTorch's names: weight (gamma, ones), bias (beta, zeros), running_mean (C,), zeros, running_covariance
    (groups, d, d), identities, num_batches_tracked. ``gamma``, ``beta``, ``moving_mean`` and ``moving_covariance`` are the
    article's names for the same tensors.

    Raises:
        ValueError, TypeError: an invalid argument (WH-01, WH-03).
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_covariance: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_dims: int,
        kind: Kind | None = None,
        groups: int | None = None,
        spec: WhiteningSpec | None = None,
        *,
        implementation: Implementation = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.spec = spec = resolved(num_features, num_dims, kind, groups, spec)
        if implementation not in get_args(Implementation):
            raise ValueError(
                f"implementation must be {' or '.join(map(repr, get_args(Implementation)))}, got {implementation!r}."
            )
        self.num_features, self.num_dims, self.implementation = num_features, num_dims, implementation
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_parameter("weight", torch.nn.Parameter(torch.ones(num_features, **place)) if spec.scale else None)
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(num_features, **place)) if spec.center else None)
        self.register_buffer("running_mean", torch.zeros(num_features, **place))
        covariance = torch.eye(spec.group_size(num_features), **place).repeat(spec.groups, 1, 1)
        self.register_buffer("running_covariance", covariance)
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """Return y for x of shape (N, C, ...), in the layer's mode.

        Raises:
            ValueError: wrong rank, or one value per channel in training.
            RuntimeError: wrong number of channels, or parameters of the wrong type.
            NotImplementedError: the input's type is not floating point.
        """
        training = self.training
        gamma, beta, mean, covariance = self.weight, self.bias, self.running_mean, self.running_covariance
        state = {"weight": gamma, "bias": beta, "running_mean": mean}
        its = {name: (tuple(t.shape), type_name(t)) for name, t in state.items() if t is not None}
        wrong = problem(tuple(input.shape), type_name(input), self.num_features, self.num_dims, training, its)
        if wrong is not None:
            raise ERRORS[wrong.kind](wrong.message)
        batches = int(self.num_batches_tracked) if self.spec.momentum is None else 0
        on_kernel = input.is_cpu if self.implementation == "auto" else self.implementation == "kernel"
        if not torch.compiler.is_compiling():
            on_kernel = self._check(input, gamma, beta, mean, covariance) and on_kernel
        by = Whiten.apply if on_kernel else by_framework
        y: Tensor = by(input, gamma, beta, (mean, covariance), self.spec, training, batches)
        if training and input.numel():
            self.num_batches_tracked.add_(1)
        return y

    def _check(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, covariance: Tensor) -> bool:
        """Whether all tensors are plain CPU memory, so that the kernel may have their addresses.

        Raises:
            RuntimeError: one of them has another type or shape than the layer needs, or a storage that is too small.
        """
        groups, d, kind = self.spec.groups, self.spec.group_size(self.num_features), PARAMETER[x.dtype]
        channels = torch.Size((self.num_features,))
        named = {"weight": (gamma, channels), "bias": (beta, channels), "running_mean": (mean, channels)}
        named["running_covariance"] = covariance, torch.Size((groups, d, d))
        device, all_plain, origin = x.device, True, f"input of type {x.dtype} needs"
        for name, (t, shape) in named.items():
            if t is None:
                continue
            if t.device != device:
                raise RuntimeError(
                    f"expected {name} on {device}, where the input is, got it on {t.device}. Move the layer or the input."
                )
            if is_plain(t):
                check_memory(t, kind, shape, name, origin)
            else:
                all_plain = False
        if not is_plain(x):
            return False
        check_memory(x, x.dtype, x.shape, "the input")
        if torch.is_grad_enabled() and (x.is_inference() or (gamma is not None and gamma.is_inference())):
            check_can_be_saved(x, gamma, beta)
        return all_plain

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return layer_text(self.num_features, self.num_dims, self.spec)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply fn, but keep statistics and parameters in float32 when the model is cast to half precision (WH-09)."""

        def keep(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device, torch.float32) if new.dtype in (torch.float16, torch.bfloat16) else new

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]

    gamma = property(lambda self: self.weight, doc="The article's name for weight.")
    beta = property(lambda self: self.bias, doc="The article's name for bias.")
    moving_mean = property(lambda self: self.running_mean, doc="The article's name for running_mean.")
    moving_covariance = property(lambda self: self.running_covariance, doc="The article's name for running_covariance.")


def by_framework(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, moving: Matrix, spec: WhiteningSpec, training: bool, batches: int
) -> Tensor:
    """Whiten x by PyTorch's own operators, in the type of the statistics; PyTorch differentiates all but the matrix."""
    mean, covariance = moving
    groups, d = covariance.shape[:2]
    values = x.transpose(0, 1).reshape(groups, d, x.numel() // (groups * d)).to(mean.dtype)
    m = values.shape[2]
    its_mean, its_covariance = mean.view(groups, d, 1).clone(), covariance.clone()
    if training and m > 0:
        its_mean = values.mean(2, keepdim=True)
        centred = values - its_mean
        its_covariance = centred @ centred.mT / m
    w = whitening_matrix(its_covariance, spec)
    y = w @ (values - its_mean)
    y = y if gamma is None else y * gamma.view(groups, d, 1)
    y = y if beta is None else y + beta.view(groups, d, 1)
    if training and m > 0:  # when nothing can fail any more
        check_can_be_updated(mean, covariance, None)
        with torch.no_grad():
            _update(mean.view(groups, d), covariance, its_mean[..., 0], its_covariance, spec.weight_of_old(batches))
    return y.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1).to(x.dtype)


def _update(mean: Tensor, covariance: Tensor, batch_mean: Tensor, batch_covariance: Tensor, old: float) -> None:
    new_mean = mean * old + batch_mean * (1 - old) if old else batch_mean
    new_covariance = covariance * old + batch_covariance * (1 - old) if old else batch_covariance
    made = new_mean.isfinite().all(1) & new_covariance.isfinite().all(2).all(1)  # WH-08
    mean.copy_(torch.where(made[:, None], new_mean, mean))
    covariance.copy_(torch.where(made[:, None, None], new_covariance, covariance))


def whitening_matrix(covariance: Tensor, spec: WhiteningSpec) -> Tensor:
    """Return the whitening matrix W of (groups, d, d) covariances, differentiable once (WH-03, WH-07)."""
    if spec.kind != "newton":
        return _Eigen.apply(covariance, spec)  # type: ignore[no-any-return, no-untyped-call]
    one = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    s = covariance + spec.eps * one
    trace = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    p, normalised = one.expand_as(s), s / trace
    for _ in range(spec.steps):
        p = 1.5 * p - 0.5 * p @ p @ p @ normalised
    return p / trace.sqrt()


class _Eigen(torch.autograd.Function):
    """W by ``torch.linalg.eigh`` in float64, with the gradient that ``multibn.whitening.matrix`` describes.

    PyTorch's own gradient of ``eigh`` divides by the differences of the eigenvalues.
    """

    @staticmethod
    def forward(ctx: Any, covariance: Tensor, spec: WhiteningSpec) -> Tensor:
        finite = covariance.isfinite().all(2).all(1)[:, None, None]
        eigenvalues, vectors = torch.linalg.eigh(torch.where(finite, covariance, 0.0).double())
        eigenvalues, vectors = eigenvalues.flip(1).clamp_min(0), vectors.flip(2)
        sizes = vectors.abs()
        order = torch.arange(sizes.shape[1], 0, -1, device=sizes.device)[:, None]  # so that argmax picks the first
        first = (order * (sizes >= sizes.amax(1, keepdim=True) / 2)).argmax(1, keepdim=True)
        vectors = vectors * torch.where(torch.gather(vectors, 1, first) < 0, -1.0, 1.0)
        ctx.save_for_backward(eigenvalues, vectors)
        ctx.spec = spec
        w = vectors.mT / (eigenvalues + spec.eps).sqrt()[..., None]
        w = w if spec.kind == "pca" else vectors @ w
        return torch.where(finite, w, torch.nan).to(covariance.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, owed: Tensor) -> Any:
        eigenvalues, vectors = ctx.saved_tensors
        root, kind = (eigenvalues + ctx.spec.eps).sqrt(), owed.dtype
        owed = owed.double()
        if ctx.spec.kind == "zca":
            a, b = root[..., :, None], root[..., None, :]
            inner = vectors.mT @ owed @ vectors / -(a * b * (a + b))
        else:
            inner = _pca_inner(eigenvalues, root, owed @ vectors, torch.finfo(kind).eps)
        result = vectors @ inner @ vectors.mT
        return ((result + result.mT) / 2).to(kind), None


def _pca_inner(eigenvalues: Tensor, root: Tensor, owed: Tensor, unit: float) -> Tensor:
    """``multibn.whitening.matrix._pca_inner`` on the tensors' device."""
    null = without_variance(eigenvalues.cpu().numpy(), unit)
    gaps = eigenvalues[..., :, None] - eigenvalues[..., None, :]
    held = torch.from_numpy(null[..., :, None] & null[..., None, :]).to(gaps.device)
    held = held | torch.eye(gaps.shape[-1], dtype=torch.bool, device=gaps.device)
    inner = owed / (root[..., :, None] * torch.where(held, torch.inf, gaps))
    return inner + torch.diag_embed(owed.diagonal(dim1=1, dim2=2) / (-2 * root**3))
