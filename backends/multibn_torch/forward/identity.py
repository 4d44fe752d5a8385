"""``init="identity"`` for the PyTorch layers; see ``multibn.identity``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multibn.identity import parameters, untouched

from . import masked


def begin(layer: Any, x: Tensor, mask: Tensor | None = None) -> None:
    """If the layer is still in its initial state, set gamma and beta so that the layer is the identity on x.

    The state is checked only once, because the check synchronises with the GPU; ``load_state_dict`` and ``reset_parameters``
    request a new check.

    Raises:
        RuntimeError: the program is being compiled.
    """
    if layer._began or x.numel() == 0 or x.is_meta:
        return
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "init='identity' sets gamma and beta from the first training batch, which a compiled program cannot do. "
            "Train one batch before torch.compile."
        )
    if mask is not None:
        masked.check_mask(mask, x)
        x = masked.pack(x, mask)
        masked.check_count(x)
        if x.numel() == 0:
            return
    layer._began = True
    names = ("weight", "bias", "running_mean", "running_var")
    state: Any = [None if t is None else t.detach().cpu().numpy() for t in (getattr(layer, name) for name in names)]
    if untouched(*state):
        gamma, beta = parameters(x.detach().to("cpu", torch.float64).numpy(), layer.eps, state[0].dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(gamma))
            layer.bias.copy_(torch.from_numpy(beta))
