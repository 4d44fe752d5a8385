"""PyTorch's habits."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn

X = torch.from_numpy(np.random.default_rng(0).normal(3, 2, (6, 3, 4, 5)).astype(np.float32))


def _updates(layer: Any) -> float:
    """How often the moving mean moved, of ones that began at 0 with momentum 0.1."""
    rest = 1 - layer.running_mean / X.mean((0, 2, 3))
    return abs(round(float(torch.log(rest).mean() / np.log(0.9)), 3))


def defaults() -> object:
    """Defaults, in its own words."""
    layer = nn.BatchNorm2d(3)
    known = inspect.signature(nn.BatchNorm2d).parameters
    switches = ", ".join(f"{name} {known[name].default}" for name in ("affine", "bias", "track_running_stats"))
    return f"eps {layer.eps:g}, momentum {layer.momentum:g}, axis 1, {switches}"


def updates_under_no_grad() -> object:
    """Updates in one training forward under no_grad()."""
    layer = nn.BatchNorm2d(3)
    with torch.no_grad():
        layer(X)
    return f"{_updates(layer):g}"


def updates_under_inference_mode() -> object:
    """Updates in one training forward under inference_mode()."""
    layer = nn.BatchNorm2d(3)
    with torch.inference_mode():
        layer(X)
    return f"{_updates(layer):g}"


def updates_with_checkpointing() -> object:
    """Updates in one training step with activation checkpointing."""
    from torch.utils.checkpoint import checkpoint

    layer = nn.BatchNorm2d(3)
    checkpoint(layer, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    return f"{_updates(layer):g}"


def updates_when_frozen() -> object:
    """Updates in one training forward after requires_grad_(False)."""
    layer = nn.BatchNorm2d(3).requires_grad_(False)
    layer(X)
    return f"{_updates(layer):g}"


def gradients_in_eval() -> object:
    """In eval(), whether gamma gets a gradient."""
    layer = nn.BatchNorm2d(3).eval()
    (layer(X) ** 2).sum().backward()
    return layer.weight.grad is not None and bool((layer.weight.grad != 0).all())


def momentum_none() -> object:
    """momentum=None: whether the moving mean of 3 batches is their plain average."""
    layer: Any = nn.BatchNorm2d(3, momentum=None)
    for k in range(3):
        layer(X * (k + 1))
    return torch.allclose(layer.running_mean, 2 * X.mean((0, 2, 3)))


def eps_zero() -> object:
    """eps=0 in training."""
    nn.BatchNorm2d(3, eps=0.0)(X)
    return "accepted"


def eps_zero_in_eval() -> object:
    """eps=0 in eval()."""
    nn.BatchNorm2d(3, eps=0.0).eval()(X)
    return "accepted"


def eps_negative_in_eval() -> object:
    """eps=-1e-6 in eval()."""
    nn.BatchNorm2d(3, eps=-1e-6).eval()(X)
    return "accepted"


def eps_negative_raw() -> object:
    """eps=-1e-6 given to torch.batch_norm itself."""
    torch.batch_norm(X, None, None, None, None, True, 0.1, -1e-6, False)
    return "accepted"


def no_tracking_in_eval() -> object:
    """track_running_stats=False: whether eval(), too, normalises with the batch."""
    layer = nn.BatchNorm2d(3, track_running_stats=False)
    return torch.equal(layer(X), layer.eval()(X))


def no_tracking_afterwards() -> object:
    """.track_running_stats = False set after construction: updates in training; what eval() normalises with."""
    layer = nn.BatchNorm2d(3)
    layer.track_running_stats = False
    layer(X)
    moved = _updates(layer)
    y = layer.eval()(X)
    return f"{moved:g}; {'the moving statistics' if torch.allclose(y, X / (1 + 1e-5) ** 0.5) else 'the batch'}"


def empty_batch_is_counted() -> object:
    """num_batches_tracked after one empty batch."""
    layer: Any = nn.BatchNorm2d(3)
    layer(X[:0])
    return int(layer.num_batches_tracked)


def gradient_of_an_empty_batch() -> object:
    """The gradient of gamma after an empty batch in training."""
    layer: Any = nn.BatchNorm2d(3)
    layer(X[:0]).sum().backward()
    return ", ".join(f"{each:g}" for each in layer.weight.grad)


def one_value_raw() -> object:
    """One value per channel given to torch.batch_norm itself: the moving variance after it."""
    var = torch.ones(3)
    torch.batch_norm(torch.ones(1, 3), None, None, torch.zeros(3), var, True, 0.1, 1e-5, False)
    return float(var[0])


def half() -> object:
    """half(): type of the moving statistics."""
    layer: Any = nn.BatchNorm2d(3).half()
    return str(layer.running_var.dtype)


def bfloat16() -> object:
    """bfloat16(): type of the moving statistics."""
    layer: Any = nn.BatchNorm2d(3).bfloat16()
    return str(layer.running_var.dtype)


def bfloat16_input() -> object:
    """bfloat16 input to a float32 layer: types of output and moving statistics."""
    layer: Any = nn.BatchNorm2d(3)
    return f"{layer(X.bfloat16()).dtype}, {layer.running_mean.dtype}"


def integers() -> object:
    """int64 input."""
    return nn.BatchNorm2d(3)(X.long()).dtype


def ranks() -> object:
    """Ranks that BatchNorm1d, 2d, 3d, SyncBatchNorm (on CPU, without a process group) and functional.batch_norm take."""
    taken: dict[str, list[int]] = {}
    layers: dict[str, Any] = {"1d": nn.BatchNorm1d(3), "2d": nn.BatchNorm2d(3), "3d": nn.BatchNorm3d(3)}
    for name, call in {**layers, "Sync": nn.SyncBatchNorm(3), "functional": None}.items():
        taken[name] = []
        for rank in range(1, 7):
            x = torch.randn((4, 3, 2, 2, 2, 2)[:rank])
            try:
                call(x) if call else nn.functional.batch_norm(x, None, None, training=True)
                taken[name].append(rank)
            except (ValueError, RuntimeError, IndexError):
                pass
    return "; ".join(f"{name}: {', '.join(map(str, its))}" for name, its in taken.items())


def names() -> object:
    """Names in a checkpoint."""
    return ", ".join(nn.BatchNorm2d(3).state_dict())


def count() -> object:
    """num_batches_tracked: its type and shape."""
    count: Any = nn.BatchNorm2d(3).num_batches_tracked
    return f"{count.dtype}, {tuple(count.shape)}"


def names_without_affine() -> object:
    """Names in a checkpoint with affine=False and track_running_stats=False."""
    return ", ".join(nn.BatchNorm2d(3, affine=False, track_running_stats=False).state_dict()) or "none"


def count_missing() -> object:
    """A plain dict without num_batches_tracked: load_state_dict."""
    layer = nn.BatchNorm2d(3)
    layer.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "num_batches_tracked"})
    return "accepted"


def count_missing_from_a_version_2() -> object:
    """The same for a state_dict() that still says its version."""
    layer = nn.BatchNorm2d(3)
    state = layer.state_dict()
    del state["num_batches_tracked"]
    layer.load_state_dict(state)
    return "accepted"


def beta_alone_is_left_out() -> object:
    """bias=False: names in a checkpoint."""
    return ", ".join(nn.BatchNorm2d(3, bias=False).state_dict())


def double_input() -> object:
    """float64 input to a float32 layer."""
    return nn.BatchNorm2d(3)(X.double()).dtype


def rank_two() -> object:
    """BatchNorm1d(3) for input of shape (3, 7), channels first without a batch."""
    return nn.BatchNorm1d(3)(X.reshape(-1)[:21].reshape(3, 7)).shape


def second_derivative() -> object:
    """Whether the gradient of the gradient is right (gradgradcheck)."""
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 2), (2,), (2,)))
    return torch.autograd.gradgradcheck(
        lambda *a: nn.functional.batch_norm(a[0], None, None, a[1], a[2], True), (x, weight, bias)
    )


def sync_in_a_group() -> object:
    """SyncBatchNorm in training on CPU, in a gloo group of one."""
    return _in_a_group(lambda: nn.SyncBatchNorm(3)(X).dtype)


def sync_in_a_group_in_eval() -> object:
    """The same in eval(): whether it is BatchNorm2d."""
    return _in_a_group(lambda: torch.equal(nn.SyncBatchNorm(3).eval()(X), nn.BatchNorm2d(3).eval()(X)))


def _in_a_group(call: Any) -> object:
    import os
    import tempfile
    from pathlib import Path

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine need not know its own name
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=(Path(folder) / "a").as_uri(), rank=0, world_size=1)
        try:
            return call()
        finally:
            torch.distributed.destroy_process_group()


def sync_on_cpu() -> object:
    """SyncBatchNorm on CPU without a process group: whether it is BatchNorm2d."""
    torch.manual_seed(0)
    return torch.equal(nn.SyncBatchNorm(3)(X), nn.BatchNorm2d(3)(X))
