"""BatchNorm for JAX and Flax, after the specification of multibn."""

from .backend import BACKEND as BACKEND
from .formulas import How as How
from .function import EXPORT_CHECKS as EXPORT_CHECKS
from .function import batch_norm as batch_norm
from .layer import BatchNorm as BatchNorm
from .swap import swap as swap
