"""BatchNorm for MXNet Gluon, after the specification of multibn. Exported models need this import before they are loaded."""

from .backend import BACKEND as BACKEND
from .block import BatchNorm as BatchNorm
from .block import GluonBatchNorm as GluonBatchNorm
from .block import GluonBatchNormReLU as GluonBatchNormReLU
from .recalibrate import recalibrate as recalibrate
from .swap import swap as swap
from .whitening.block import Whitening as Whitening
