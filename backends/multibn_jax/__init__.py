"""BatchNorm for JAX and Flax, after the specification of multibn."""

from importlib.util import find_spec

if find_spec("flax") is None:
    raise ModuleNotFoundError("multibn_jax needs JAX and Flax, which are not installed: pip install 'multibn[jax]'", name="flax")

from .backend import BACKEND as BACKEND
from .formulas import How as How
from .function import EXPORT_CHECKS as EXPORT_CHECKS
from .function import batch_norm as batch_norm
from .layer import BatchNorm as BatchNorm
from .swap import swap as swap
