"""Checks of every tensor whose address is passed to the kernel.

A tensor is plain if its dispatch keys are exactly those of a dense, strided CPU tensor. These are not plain: a tensor of another
device or layout (sparse, mkldnn, nested, quantized), a subclass with ``__torch_dispatch__`` (such as DTensor and FakeTensor), a
``torch.func`` wrapper, a functionalised tensor, a ZeroTensor, or a view with the negative or conjugate bit. The type and size
must be as required, and the storage must be allocated up to the last value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multibn_torch.compat import dispatch_keys, is_zero, unwrap_if_dead

_CPU = torch.device("cpu")
with torch.inference_mode():
    _INFERENCE = torch.empty(0, device=_CPU)
PLAIN = frozenset(dispatch_keys(t).raw_repr() for t in (torch.empty(0, device=_CPU), _INFERENCE))
"""Dispatch keys of plain tensors: ordinary ones, and those created in inference mode."""


TYPES = frozenset((Tensor, torch.nn.Parameter))


class NotPlainError(RuntimeError):
    """The kernel cannot use a tensor; no state has changed."""


def is_plain(t: Tensor) -> bool:
    """Return whether a tensor is plain."""
    return (t.is_cpu and known_address(t, 0) != 0) or dispatch_keys(t).raw_repr() in PLAIN


def address(t: Tensor, dtype: torch.dtype, nbytes: int, name: str) -> int:
    """Check a tensor and return the address of its first value. The caller guarantees that it is dense (no gaps between values).

    Args:
        dtype: the required type.
        nbytes: the required size of all values.
        name: the tensor's name, for the message.

    Raises:
        NotPlainError: the tensor is not plain, or has another type or size.
        RuntimeError: the tensor's storage is not allocated.
    """
    if t.dtype is dtype and t.is_cpu:
        at = known_address(t, nbytes) or known_address(t, nbytes, is_plain(t))
        if at and t.nbytes == nbytes:
            return at
    raise refusal(t, dtype, name)


def known_address(t: Tensor, nbytes: int, plain: bool = False) -> int:
    """Return the address of a CPU tensor of ``nbytes`` bytes if it is plain and its storage is allocated up to the last, else 0.

    In a small batch, a method that nothing else calls takes several times as long as in a loop, so this calls few.

    Args:
        plain: the tensor is known to be plain; False if not.
    """
    if plain or (type(t) in TYPES and not t.is_neg()):
        try:
            offset, storage = t.storage_offset(), t.untyped_storage()
            if offset:
                offset = offset * t.itemsize if storage.data_ptr() else len(storage)
            return t.data_ptr() if offset + nbytes <= len(storage) else 0
        except RuntimeError:  # sparse, zero and functional tensors and torch.func wrappers have no storage
            return 0
    return 0


def place(t: Tensor, name: str) -> int:
    """Check a dense tensor on an accelerator, whose type and shape are checked elsewhere; return the address of its first value.

    Raises:
        NotPlainError: the values are not what lies at an address: a negative view, a ZeroTensor, a subclass such as DTensor.
        RuntimeError: the tensor's storage is not allocated.
    """
    plain = type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ and not (t.is_neg() or is_zero(t))
    at = known_address(t, t.nbytes, plain)
    if at or not t.numel():
        return at
    try:
        t.untyped_storage()
    except RuntimeError:
        plain = False
    if plain:
        raise _unallocated(t, name)
    raise NotPlainError(
        f"the GPU kernel needs {name} in plain memory of the device, got a {type(t).__name__} with {dispatch_keys(t)}. "
        "Convert it to a plain tensor, or use implementation='framework'."
    )


Places = tuple[int, int, int, int, int]
"""Addresses of gamma, beta, the moving mean and variance, and the counter of batches; 0 for a missing one. The last
is 0 in a forward without an update, too."""


def forward_again(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None, batches: Tensor | None, update: bool
) -> Places | None:
    """Return where the state is if nothing but a comparison with the addresses that passed before is left to check, else None.

    The layer has checked type and size, and a storage that was freed or resized has another address.
    """
    if (
        (gamma is None or (type(gamma) in TYPES and not gamma.is_neg() and gamma.is_contiguous()))
        and (beta is None or (type(beta) in TYPES and not beta.is_neg() and beta.is_contiguous()))
        and (mean is None or (type(mean) in TYPES and not mean.is_neg() and mean.is_contiguous()))
        and (var is None or (type(var) in TYPES and not var.is_neg() and var.is_contiguous()))
        and (not update or (batches is not None and batches.dtype is torch.int64))
    ):
        try:
            return (
                0 if gamma is None else gamma.data_ptr(), 0 if beta is None else beta.data_ptr(),
                0 if mean is None else mean.data_ptr(), 0 if var is None else var.data_ptr(),
                batches.data_ptr() if update and batches is not None else 0,
            )  # fmt: skip
        except RuntimeError:  # a tensor without storage has no address
            return None
    return None


def backward_again(x: Tensor, x_at: int, gamma: Tensor | None, gamma_at: int, dtype: torch.dtype, nbytes: int) -> bool:
    """Return whether x and gamma are still plain where forward saw them."""
    return (
        type(x) in TYPES and not x.is_neg() and x_at != 0 and x.data_ptr() == x_at
        and (gamma is None or (
            gamma.dtype is dtype and gamma.nbytes == nbytes and gamma.dim() == 1 and type(gamma) in TYPES and not gamma.is_neg()
            and gamma.is_contiguous() and gamma.data_ptr() == gamma_at
        ))
    )  # fmt: skip


def refusal(t: Tensor, dtype: torch.dtype, name: str) -> RuntimeError:
    """Return the exception for a tensor that the kernel cannot use."""
    if not is_plain(t):
        return NotPlainError(
            f"the CPU kernel needs {name} in plain CPU memory, got a {type(t).__name__} with {dispatch_keys(t)}. Convert it to a "
            "plain CPU tensor, or use implementation='framework'."
        )
    if _needed(t) > t.untyped_storage().nbytes():  # PyTorch's operators crash on some of these
        return _unallocated(t, name)
    return NotPlainError(
        f"the CPU kernel needs {name} of type {dtype}, one value for each channel, got shape {tuple(t.shape)} of type {t.dtype}. "
        "Give one of the right type and size."
    )


def _needed(t: Tensor) -> int:
    """Return the bytes of storage up to the last value of a dense tensor."""
    return int(t.nbytes + t.storage_offset() * t.itemsize)


def _unallocated(t: Tensor, name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} needs a storage of at least {_needed(t)} bytes, got one of {t.untyped_storage().nbytes()}. Allocate the storage "
        "before the layer is called."
    )


def check_memory(t: Tensor, dtype: torch.dtype, shape: torch.Size, name: str, origin: str = "the layer was made with") -> None:
    """Check that NumPy can safely read a plain tensor's values, contiguous or strided.

    Args:
        origin: where the required type and shape come from, for the message.

    Raises:
        RuntimeError: the tensor has another type or shape, or its storage is too small for its values.
    """
    if t.dtype is not dtype or t.shape != shape:
        raise RuntimeError(
            f"{name} must have the shape {tuple(shape)} and type {dtype} that {origin}, got shape {tuple(t.shape)} of type "
            f"{t.dtype}. Give one of the right type and shape."
        )
    if t.is_contiguous() and known_address(t, t.nbytes):
        return
    needed = (t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1) * t.itemsize
    if t.numel() and t.untyped_storage().nbytes() < needed:
        raise RuntimeError(
            f"{name} needs a storage of at least {needed} bytes, got one of {t.untyped_storage().nbytes()}. Allocate the storage "
            "before the layer is called."
        )


def check_apart(mean: Tensor | None, var: Tensor | None, addresses: tuple[int, int, int, int], nbytes: int) -> None:
    """Raise unless the kernel may write to the moving statistics.

    Args:
        mean, var: the layer's moving statistics.
        addresses: addresses of gamma and beta (which the kernel reads while it writes the moving statistics), moving mean and
            moving variance, in this order.
        nbytes: size of each.

    Raises:
        NotPlainError: a moving statistic shares memory with gamma or beta; PyTorch's operators support that, since they read
            gamma and beta first.
        RuntimeError: mean or var is missing or expanded from fewer values, or the two share memory.
    """
    if mean is None or var is None:
        raise RuntimeError(
            "an update of the moving statistics needs running_mean and running_var, got "
            f"{'neither' if mean is None and var is None else 'only one of them'} (BN-05). Give both, or set both to None."
        )
    for t, name in ((mean, "running_mean"), (var, "running_var")):
        if not t.is_contiguous() and 0 in t.stride():
            raise RuntimeError(
                f"{name} must have memory for each channel, since it is written to, got fewer values expanded to shape "
                f"{tuple(t.shape)}. Call .clone() on it."
            )
    gamma_at, beta_at, mean_at, var_at = addresses
    if abs(mean_at - var_at) < nbytes:
        raise RuntimeError("running_mean and running_var must not share memory, since both are written to. Call .clone() on one.")
    if any(abs(a - b) < nbytes for a in (gamma_at, beta_at) for b in (mean_at, var_at)):
        raise NotPlainError(
            "the CPU kernel needs moving statistics that share no memory with weight and bias. Call .clone() on them."
        )


def check_can_be_saved(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> None:
    """Raise RuntimeError if backward would need a tensor created in inference mode; PyTorch would raise only after forward."""
    if any(t is not None and t.requires_grad for t in (x, gamma, beta)):
        raise RuntimeError(
            "inference tensors cannot be saved for backward, got one as the input or as weight while gradients are recorded. "
            "Call .clone() on it, or run the layer in torch.no_grad()."
        )


def check_can_be_updated(mean: Tensor | None, var: Tensor | None, batches: Tensor | None) -> None:
    """Raise PyTorch's exception if a tensor is not writable, before any tensor has changed: multiply by 1 or add 0 in place."""
    with torch.no_grad():
        for t in (mean, var):
            if t is not None:
                t.mul_(1)
        if batches is not None:
            batches.add_(0)


def resolved(t: Tensor | None) -> Tensor | None:
    """Resolve the negative bit, dead ``torch.func`` wrappers and zero tensors, differentiably; return other tensors unchanged."""
    if t is None or dispatch_keys(t).raw_repr() in PLAIN:
        return t
    t = unwrap_if_dead(t)
    if t.is_neg():
        return t.resolve_neg()
    return t.clone() if is_zero(t) else t
