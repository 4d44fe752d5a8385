"""BatchNorm over many processes: statistics whose bits do not depend on how the batch is split (SY-01 to SY-11)."""

from .group import Alone as Alone
from .group import Group as Group
from .group import PeersMissing as PeersMissing
from .group import SyncError as SyncError
from .mpi import MpiGroup as MpiGroup
