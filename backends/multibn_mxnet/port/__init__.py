"""Parts of a port that need MXNet: running a checkpoint (``run``), and filling a Gluon network from a PyTorch model."""

from .from_torch import from_torch as from_torch
