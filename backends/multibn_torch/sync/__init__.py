"""BatchNorm over many processes, in PyTorch."""

from multibn_torch import compat

from .group import TorchGroup as TorchGroup
from .layer import SyncBatchNorm as SyncBatchNorm

compat.accept_in_ddp(SyncBatchNorm)
