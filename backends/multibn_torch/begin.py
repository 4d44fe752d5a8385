"""``init="identity"`` in PyTorch: see ``multibn.identity``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multibn.identity import parameters, untouched


def begin(layer: Any, x: Tensor) -> None:
    """Make a layer the identity on x if it is as it was made. Asked once, for to ask a GPU is to wait for it; again after
    ``load_state_dict`` and ``reset_parameters``.
    """
    if layer._began or x.numel() == 0:
        return
    layer._began = True
    names = ("weight", "bias", "running_mean", "running_var")
    state: Any = [None if t is None else t.detach().cpu().numpy() for t in (getattr(layer, name) for name in names)]
    if untouched(*state):
        gamma, beta = parameters(x.detach().to("cpu", torch.float64).numpy(), layer.eps, state[0].dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(gamma))
            layer.bias.copy_(torch.from_numpy(beta))
