"""The specification: its clauses, the constants of BN-15, and ``BatchNormSpec``."""

from .batchnorm import BatchNormSpec as BatchNormSpec
from .clauses import BLOCK as BLOCK
from .clauses import CLAUSES as CLAUSES
from .clauses import JOINED as JOINED
from .clauses import LANES as LANES
from .clauses import PIVOT as PIVOT
