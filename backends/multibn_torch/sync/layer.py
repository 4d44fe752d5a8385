"""``SyncBatchNorm``: BatchNorm over the processes of a group, on CPU and on accelerators."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Proxy

from multibn.layer.inputs import objection
from multibn.layer.nonfinite import PoisonedBatch, poisoned
from multibn.sync import passes
from multibn.sync.exchange import Exchange, open_channel
from multibn.sync.passes import Peers, SyncSettings
from multibn_torch.compat import BatchNormBase, tracing_state
from multibn_torch.forward import masked
from multibn_torch.forward.dispatch import again, normalise
from multibn_torch.forward.eager import recomputed, run_as_written, transformed
from multibn_torch.forward.formulas import Moving
from multibn_torch.layers import (
    ERRORS,
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Layer,
    as_leaf,
    check_layer,
    keep_single,
    type_name,
)

from .function import Job, Update, synchronised
from .group import shared_exchange

_Module = TypeVar("_Module", bound=torch.nn.Module)

_made: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""SyncSettings many layers were made for a process group."""


class SyncBatchNorm(Layer, torch.nn.SyncBatchNorm):
    """Takes the place of ``torch.nn.SyncBatchNorm``: its arguments, its checkpoints, input of any rank >= 2; on CPU too.

    In training the statistics are those of all ranks' samples, with the same bits for every split of the batch (SY-01 to SY-11).
    Inference, and a group of one, exchange nothing.

    Args:
        num_features, eps, momentum, affine, track_running_stats: PyTorch's.
        process_group: of ``torch.distributed``, None for all ranks; or a ``multibn.sync.Group``, of which the layer takes a
            channel of its own, so that all ranks must make their layers in the same order.
        device, dtype, newer: PyTorch's, as far as the installed one has them (``bias``).

    ``name`` tells layers apart, which ranks must not confuse; ``convert_sync_batchnorm`` sets it. Layers without a name go by the
    order in which the process made them.

    Raises:
        ValueError: a parameter that ``BatchNormSpec`` does not allow, or init="identity".
    """

    ranks = tuple(range(2, 65))
    _number = 0

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, process_group: Any = None, device: Any = None, dtype: Any = None, **newer: Any,
    ) -> None:  # fmt: skip
        if "init" in newer:
            raise ValueError(_NO_IDENTITY)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, **newer)
        _register(self)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """y for x of shape (N, C, ...), in the layer's mode; in training, with statistics of all ranks.

        Args:
            input: x; N may be 0 (SY-03).
            mask: (N, ...), boolean: only values where it is True count, and y is 0 elsewhere.

        Raises:
            ValueError, RuntimeError, NotImplementedError, TypeError: as ``BatchNorm2d``; the other ranks raise SyncError (SY-08).
            ValueError: one value per channel on all ranks together (SY-04).
            multibn.sync.SyncError: the ranks disagree, or do not answer (SY-07 to SY-09).
        """
        if isinstance(input, Proxy):
            return as_leaf(self, input, mask)
        mean = self.running_mean
        update = self.training and mean is not None and self.track_running_stats and self.update_statistics
        use_batch = mean is None or (self.training and self.normalize_with == "batch")
        if update or use_batch:
            return _in_training(self, input, mask, update, use_batch)
        self._refuse(input, False)
        how, moving = _how(self, False, False), _moving(self)
        y = normalise(input, self.weight, self.bias, moving, how, input.is_cpu, mask, self)  # type: ignore[arg-type]
        return torch.relu(y) if self.fuse_relu and not self.fused_in else y

    def extra_repr(self) -> str:
        """PyTorch's text, and what differs from PyTorch."""
        return super().extra_repr() + ("" if self.moving_variance == "unbiased" else ", moving_variance='biased'")

    @classmethod
    def convert_sync_batchnorm(cls, module: _Module, process_group: Any = None) -> _Module:
        """Make every BatchNorm of a model synchronised, in place, and return the model.

        Each layer stays the same object with the very same parameters, statistics, hooks and ``requires_grad``; only its class
        changes. Converted are PyTorch's BatchNorm1d/2d/3d and SyncBatchNorm, and those of multibn. Subclasses of them may compute
        something else: they are left alone, and a warning names them.

        Args:
            module: a model, or one layer.
            process_group: see the class.

        Raises:
            ValueError: a layer has parameters that the specification does not allow, such as eps 0, or init="identity" and
                no batch yet; none is converted then.

        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> SyncBatchNorm.convert_sync_batchnorm(model)[1]
        SyncBatchNorm(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, by=multibn)
        """
        modules = {name: each for name, each in module.named_modules() if isinstance(each, BatchNormBase)}
        found = {name: each for name, each in modules.items() if type(each) in _CONVERTED}
        left = [
            f"{name} ({type(each).__name__})" for name, each in modules.items() if name not in found and type(each) is not cls
        ]
        for name, each in found.items():
            try:
                check_layer(each)
                if getattr(each, "init", "standard") != "standard" and not each._began:
                    raise ValueError(_NO_IDENTITY)
            except ValueError as error:
                raise ValueError(f"{name or 'the model'}: {error}") from None
        for name, each in found.items():
            each.__class__ = cls
            layer: Any = each
            layer.process_group, layer.name = process_group, name or layer.__dict__.get("name", "")
            keep_single(layer)
            _register(layer)
        if left:
            warnings.warn(
                f"convert_sync_batchnorm left these layers as they are, since their classes may compute something else: "
                f"{', '.join(left)}. They use the statistics of each rank's own samples.",
                stacklevel=2,
            )
        return module

    def _old(self) -> float | None:
        given = self.__dict__.get("_given")  # of a ``BatchNorm`` that was converted
        return super()._old() if given is None or self.momentum != given[0] else given[1]

    def _refuse(self, x: Tensor, needs_batch: bool) -> None:
        """Say what is wrong with x, if something is; one value may be enough, for the other ranks have some."""
        state = {name: t for name in _STATE if (t := getattr(self, name)) is not None}
        problem = objection(
            tuple(x.shape), type_name(x), num_features=self.num_features,
            parameters={name: (tuple(t.shape), type_name(t)) for name, t in state.items()},
        )  # fmt: skip
        if problem is not None:
            raise ERRORS[problem.kind](problem.message)
        for name, t in state.items():
            if t.device != x.device:
                raise RuntimeError(
                    f"expected {name} on {x.device}, where the input is, got it on {t.device}. Move the layer or the input."
                )


_NO_IDENTITY = (
    "init='identity' begins with the statistics of one process's first batch, which SyncBatchNorm does not use. Train one batch "
    "before conversion, or leave init out."
)

_STATE = ("weight", "bias", "running_mean", "running_var")

_CONVERTED = (
    torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm,
    BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d,
)  # fmt: skip


def _in_training(layer: SyncBatchNorm, x: Tensor, mask: Tensor | None, update: bool, use_batch: bool) -> Tensor:
    """A forward that needs the batch of all ranks. It talks to other processes, so a compiled program is left for it."""
    peers = _peers(layer)
    how = _how(layer, update, use_batch)
    which = "forward of a recomputation" if recomputed() else "forward"
    try:
        values = _checked(layer, x, mask, how)
        state = Update(layer.running_mean, layer.running_var, layer.num_batches_tracked) if update else None  # type: ignore[arg-type]
        moving = None if use_batch else (layer.running_mean, layer.running_var)
    except BaseException as error:
        passes.refuse(peers, layer.num_features, type_name(x) if isinstance(x, Tensor) else "float32", error, how, which)
        raise
    poisoned_channels: list[int] = []
    y = synchronised(values, layer.weight, layer.bias, Job(peers, how, moving, state, poisoned_channels))  # type: ignore[arg-type]
    if poisoned_channels:
        _tell(layer, poisoned_channels)
    y = y if mask is None else masked.unpack(y, mask, x)
    return torch.relu(y) if layer.fuse_relu and not layer.fused_in else y


run_as_written(_in_training)


def _checked(layer: SyncBatchNorm, x: Tensor, mask: Tensor | None, how: SyncSettings) -> Tensor:
    """The values that count, or an error."""
    layer._refuse(x, False)
    if transformed() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or tracing_state() is not None:
        raise RuntimeError(
            "SyncBatchNorm in training takes plain tensors, outside of transforms of torch.func and of tracers: its statistics "
            "come from other processes. Use inference, or BatchNorm2d, with statistics of this process's own samples."
        )
    if layer.implementation == "kernel" and not x.is_cpu:
        raise RuntimeError(f"implementation='kernel' computes on cpu, got input on {x.device}. Move the input, or use 'auto'.")
    if recomputed() and how.update and not how.use_batch:
        again(how)  # type: ignore[arg-type]
    if mask is None:
        return x
    masked.check_mask(mask, x)
    return masked.pack(x, mask)


def _how(layer: SyncBatchNorm, update: bool, use_batch: bool) -> SyncSettings:
    old = layer._old() if update else 0.0
    if old is None:
        batches = int(layer.num_batches_tracked)  # type: ignore[arg-type]
        old = batches / (batches + 1)
    return SyncSettings(layer.eps, old, layer.moving_variance == "unbiased", use_batch, update)


def _moving(layer: SyncBatchNorm) -> Any:
    return Moving(layer.running_mean, layer.running_var, layer.num_batches_tracked)


_channels: WeakKeyDictionary[torch.nn.Module, tuple[Exchange | None, str]] = WeakKeyDictionary()
"""Of layers that were given a ``multibn.sync.Group``. A copy of such a layer has none, and opens one at its first forward."""


def _register(layer: SyncBatchNorm) -> None:
    """Give the layer the next number of its process group, or a channel of its group."""
    group: Any = layer.process_group
    if hasattr(group, "channel"):
        _channels[layer] = open_channel(group)
    else:
        key = SyncBatchNorm if group is None else group
        layer._number = _made[key] = _made.get(key, 0) + 1


def _peers(layer: SyncBatchNorm) -> Peers:
    group: Any = layer.process_group
    if hasattr(group, "channel"):
        if layer not in _channels:
            _register(layer)
        return Peers(*_channels[layer])
    text = layer.name or f"{type(layer).__name__} number {layer._number} of its process group"
    if not (dist.is_available() and dist.is_initialized()):
        return Peers(None, text)
    return Peers(shared_exchange(group), text)


_told: WeakKeyDictionary[torch.nn.Module, None] = WeakKeyDictionary()


def _tell(layer: SyncBatchNorm, channels: list[int]) -> None:
    """Warn with ``PoisonedBatch``, once for each layer (BN-11, SY-11)."""
    if layer not in _told:
        _told[layer] = None
        text = f"{type(layer).__name__}({layer.num_features})"
        warnings.warn(poisoned(f"{layer.name}, {text}" if layer.name else text, channels), PoisonedBatch, stacklevel=4)
