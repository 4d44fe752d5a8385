"""BatchNorm for MXNet Gluon, as multibn specifies it. Import this package before loading an exported model."""

from importlib.util import find_spec

if find_spec("mxnet") is None:
    raise ModuleNotFoundError("multibn_mxnet needs MXNet, which is not installed: pip install 'multibn[mxnet]'", name="mxnet")

from .backend import BACKEND as BACKEND
from .block import BatchNorm as BatchNorm
from .block import GluonBatchNorm as GluonBatchNorm
from .block import GluonBatchNormReLU as GluonBatchNormReLU
from .recalibrate import recalibrate as recalibrate
from .swap import swap as swap
from .swap import unswap as unswap
from .sync import SyncBatchNorm as SyncBatchNorm
from .whitening.block import Whitening as Whitening
