"""Convert MXNet checkpoints to PyTorch, and back."""

from .importer import from_mxnet as from_mxnet
from .match import fill as fill
from .match import match as match
from .match import to_mxnet as to_mxnet
