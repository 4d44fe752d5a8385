"""multibn: one BatchNorm that means the same everywhere. Importing it loads NumPy and no framework."""

from .spec import BLOCK as BLOCK
from .spec import CLAUSES as CLAUSES
from .spec import LANES as LANES
from .spec import BatchNormSpec as BatchNormSpec
from .whitening import WhiteningSpec as WhiteningSpec
from .whitening_layer import Whitening as Whitening

__version__ = "0.1.0"
