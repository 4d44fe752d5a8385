"""BatchNorm for PyTorch, after the specification of multibn."""

from .backend import BACKEND as BACKEND
from .layers import BatchNorm as BatchNorm
from .layers import BatchNorm1d as BatchNorm1d
from .layers import BatchNorm2d as BatchNorm2d
from .layers import BatchNorm3d as BatchNorm3d
from .recalibrate import recalibrate as recalibrate
from .swap import swap as swap
from .switches import freeze_affine as freeze_affine
from .switches import freeze_statistics as freeze_statistics
from .switches import use_moving_statistics as use_moving_statistics
from .whitening.module import Whitening as Whitening
