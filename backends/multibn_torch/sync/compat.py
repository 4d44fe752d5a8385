"""What synchronised layers need of private parts of PyTorch.

DistributedDataParallel on CPU refuses models with a ``torch.nn.SyncBatchNorm``, also with ours, which computes there. A process
group's store, timeout and device have no public names.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.nn.parallel import DistributedDataParallel


def store_of(process_group: Any, prefix: str) -> Any:
    """A part of the store through which the ranks of a process group found each other."""
    return PrefixStore(prefix, dist.distributed_c10d._get_process_group_store(process_group))


def part_of(store: Any, prefix: str) -> Any:
    """A part of a store."""
    return PrefixStore(prefix, store)


def timeout_of(process_group: Any) -> timedelta:
    """How long its gloo connections wait."""
    timeout: timedelta = process_group._get_backend(torch.device("cpu")).options._timeout
    return timeout


def device_of(process_group: Any) -> torch.device:
    """Where its engine takes tensors."""
    return dist.distributed_c10d._get_pg_default_device(process_group)


def admit(ours: type[torch.nn.Module]) -> None:
    """Let DistributedDataParallel look for other SyncBatchNorms than ``ours`` alone."""
    its: Any = DistributedDataParallel
    look = getattr(its, "_passing_sync_batchnorm_handle", None)  # where a later PyTorch has none, it has nothing to refuse by

    def look_for_others(self: Any, module: torch.nn.Module) -> None:
        if any(isinstance(each, torch.nn.SyncBatchNorm) and not isinstance(each, ours) for each in module.modules()):
            look(self, module)  # type: ignore[misc]

    if look is not None:
        its._passing_sync_batchnorm_handle = look_for_others
