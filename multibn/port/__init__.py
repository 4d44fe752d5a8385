"""Read, check and describe MXNet checkpoints with NumPy only. ``multibn port`` converts them to PyTorch."""

from .errors import PortError as PortError
from .params import Params as Params
from .params import ParamsError as ParamsError
from .params import load_params as load_params
from .params import save_params as save_params
