"""BatchNorm over many processes, in PyTorch."""

from . import compat
from .group import TorchGroup as TorchGroup
from .layer import SyncBatchNorm as SyncBatchNorm

compat.admit(SyncBatchNorm)
