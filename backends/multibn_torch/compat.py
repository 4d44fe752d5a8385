"""The private parts of PyTorch that this package uses; no other module accesses them, so a missing part raises here.

``PARTS`` lists each part with what stops working without it. Required parts are looked up at import, or when used if only
``SyncBatchNorm`` or ``multibn port`` needs them. An optional part is ``None`` if PyTorch lacks it; the caller works without it.
"""

from __future__ import annotations

from datetime import timedelta
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel


class Part(NamedTuple):
    """A private name of PyTorch."""

    path: str
    """Dotted path, relative to ``torch``."""
    use: str
    """What stops working without it."""
    required: bool = True


PARTS = {
    "dispatch_keys": Part("_C._dispatch_keys", "telling plain CPU tensors from those without memory of their own"),
    "graph_task": Part("_C._current_graph_task_id", "updating the moving statistics once under activation checkpointing"),
    "exporting": Part("compiler._is_exporting_flag", "exported programs that run without multibn", required=False),
    "tracing_state": Part("_C._get_tracing_state", "torch.jit.trace and the TorchScript ONNX exporter"),
    "transforms_active": Part("_C._are_functorch_transforms_active", "the transforms of torch.func"),
    "dispatch_modes": Part("_C._len_torch_dispatch_stack", "programs that run under a TorchDispatchMode"),
    "is_batched": Part("_C._functorch.is_batchedtensor", "masks under torch.func.vmap"),
    "is_legacy_batched": Part("_C._functorch.is_legacy_batchedtensor", "torch.autograd.grad with is_grads_batched=True"),
    "unwrap_if_dead": Part("_C._functorch.unwrap_if_dead", "tensors that outlive a transform of torch.func"),
    "is_zero": Part("Tensor._is_zerotensor", "telling zero tensors, which have no memory"),
    "BatchNormBase": Part("nn.modules.batchnorm._BatchNorm", "the layers, which are subclasses of it"),
    "impl_index": Part("ops.aten._batch_norm_impl_index", "implementation='framework' with gradients"),
    "impl_index_backward": Part("ops.aten._batch_norm_impl_index_backward", "implementation='framework' with gradients"),
    "fuser_methods": Part(
        "ao.quantization.fuser_method_mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD",
        "the message of torch.ao.quantization.fuse_modules that names unswap",
        required=False,
    ),
    "schema": Part("ops.aten.add.Tensor._schema", "multibn port --into"),
    "store": Part("distributed.distributed_c10d._get_process_group_store", "SyncBatchNorm over torch.distributed"),
    "group_device": Part("distributed.distributed_c10d._get_pg_default_device", "SyncBatchNorm over nccl and mpi"),
    "backend_of_group": Part("distributed.ProcessGroup._get_backend", "SyncBatchNorm over gloo"),
    "timeout": Part("distributed.ProcessGroupGloo._Options._timeout", "SyncBatchNorm over gloo"),
    "ddp_check": Part(
        "nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle",
        "SyncBatchNorm on CPU in DistributedDataParallel, if it refuses every torch.nn.SyncBatchNorm there",
        required=False,
    ),
    "eval_frame": Part("_C._dynamo.eval_frame", "suppressing warnings of compiled autograd in a backward", required=False),
    "profiler_enabled": Part("autograd._profiler_enabled", "the profiler's name of a forward without gradients", required=False),
}


def lookup(name: str) -> Any:
    """Return the private part with this name in ``PARTS``.

    Raises:
        ImportError: the part is required and this release of PyTorch lacks it.
    """
    part = PARTS[name]
    try:
        return attrgetter(part.path)(torch)
    except AttributeError:
        if not part.required:
            return None
        raise ImportError(
            f"multibn_torch needs torch.{part.path}, which PyTorch {torch.__version__} lacks; without it, this stops working: "
            f"{part.use}. Install a release of PyTorch that has it (2.4 to 2.13 do), or a newer multibn."
        ) from None


dispatch_keys = lookup("dispatch_keys")
graph_task = lookup("graph_task")
tracing_state = lookup("tracing_state")
transforms_active = lookup("transforms_active")
dispatch_modes = lookup("dispatch_modes")
is_batched = lookup("is_batched")
is_legacy_batched = lookup("is_legacy_batched")
unwrap_if_dead = lookup("unwrap_if_dead")
impl_index = lookup("impl_index")
impl_index_backward = lookup("impl_index_backward")
is_zero = lookup("is_zero")
fuser_methods = lookup("fuser_methods")
profiler_enabled = lookup("profiler_enabled") or bool
lookup("BatchNormBase")
from torch.nn.modules import batchnorm  # noqa: E402

BatchNormBase = batchnorm._BatchNorm


def exporting() -> bool:
    """Return whether ``torch.export`` records the program. The flag is read in each call, since it changes.

    ``torch.compiler.is_exporting()`` is not called: in PyTorch 2.11, it is True in every program that ``torch.compile`` compiles.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def transformed() -> bool:
    """Return whether forward-mode differentiation or another ``torch.func`` transform is active."""
    return forward_ad._current_level >= 0 or bool(transforms_active())


def recomputed() -> bool:
    """Return whether this forward runs inside a backward, as activation checkpointing recomputes it (BN-05)."""
    return bool(graph_task() != -1)


def run_as_written(function: Any) -> None:
    """Exclude a function, and all that it calls, from Dynamo; else compiled autograd traces into it and warns repeatedly.

    ``torch.compiler.disable`` does the same with a wrapper, which costs time in each call. Older releases of PyTorch lack this
    private part, and warn.
    """
    function._torchdynamo_disable = True
    frames = lookup("eval_frame")
    if frames is not None and hasattr(frames, "_FrameAction"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


def direct_apply(function: Any) -> Any:
    """Return ``apply`` of a ``torch.autograd.Function``, for calls that are never under a ``torch.func`` transform.

    In each call, forward and backward, PyTorch's own ``apply`` checks the kind of the function, which takes longer than a small
    batch.
    """
    function._backward_cls.apply = function.backward
    return super(torch.autograd.Function, function).apply


def show_as(function: Any, name: str) -> None:
    """Name a ``torch.autograd.Function`` for the profiler and for ``grad_fn``."""
    function.__name__ = name
    function._backward_cls.__name__ = f"{name}_backward"


def operator_arguments(operator: Any) -> Any:
    """Return the arguments that an operator of ``torch.ops`` declares; none for another function."""
    lookup("schema")
    return operator._schema.arguments if hasattr(operator, "_schema") else ()


def store_of(process_group: Any) -> Any:
    """Return the store through which the ranks of a process group found each other."""
    return lookup("store")(process_group)


def timeout_of(process_group: Any) -> timedelta:
    """Return how long the gloo connections of a process group wait."""
    lookup("timeout")
    options: Any = lookup("backend_of_group")(process_group, torch.device("cpu")).options
    timeout: timedelta = options._timeout
    return timeout


def device_of(process_group: Any) -> torch.device:
    """Return the device on which the communication backend of a process group takes tensors."""
    device: torch.device = lookup("group_device")(process_group)
    return device


def accept_in_ddp(ours: type[torch.nn.Module]) -> None:
    """Let DistributedDataParallel accept ``ours``, subclasses of ``torch.nn.SyncBatchNorm``, on CPU, where ours compute."""
    check = lookup("ddp_check")
    if check is None:
        return

    def check_others(self: Any, module: torch.nn.Module) -> None:
        if any(isinstance(each, torch.nn.SyncBatchNorm) and not isinstance(each, ours) for each in module.modules()):
            check(self, module)

    DistributedDataParallel._passing_sync_batchnorm_handle = check_others  # type: ignore[method-assign]
