"""BatchNorm for PyTorch, as multibn's specification defines it."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("torch") is None:
    raise ModuleNotFoundError("multibn_torch needs PyTorch, which is not installed: pip install 'multibn[torch]'", name="torch")

from .backend import BACKEND as BACKEND
from .forward.recompute import recompute as recompute
from .layers import BatchNorm as BatchNorm
from .layers import BatchNorm1d as BatchNorm1d
from .layers import BatchNorm2d as BatchNorm2d
from .layers import BatchNorm3d as BatchNorm3d
from .port import from_mxnet as from_mxnet
from .recalibrate import recalibrate as recalibrate
from .swap import Swapped as Swapped
from .swap import swap as swap
from .swap import unswap as unswap
from .switches import freeze_affine as freeze_affine
from .switches import freeze_statistics as freeze_statistics
from .switches import use_moving_statistics as use_moving_statistics
from .whitening.module import Whitening as Whitening

if TYPE_CHECKING:
    from .sync import SyncBatchNorm as SyncBatchNorm
    from .sync import TorchGroup as TorchGroup


def __getattr__(name: str) -> Any:
    """Load what needs Numba when it is first used."""
    if name in ("SyncBatchNorm", "TorchGroup"):
        return getattr(import_module(".sync", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
