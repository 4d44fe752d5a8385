"""One BatchNorm that means the same everywhere. Importing multibn loads NumPy, but no framework and no Numba."""

from .spec.batchnorm import BatchNormSpec as BatchNormSpec
from .spec.clauses import BLOCK as BLOCK
from .spec.clauses import CLAUSES as CLAUSES
from .spec.clauses import LANES as LANES
from .whitening.layer import Whitening as Whitening
from .whitening.spec import WhiteningSpec as WhiteningSpec

__version__ = "0.1.0"
