"""Paddle's habits."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import paddle
from paddle import nn

X = paddle.to_tensor(np.random.default_rng(0).normal(3, 2, (6, 3, 4, 5)).astype(np.float32))


def _updates(layer: Any) -> str:
    """How often the moving mean moved, of one that began at 0 with momentum 0.9."""
    rest = 1 - layer._mean.numpy() / X.numpy().mean((0, 2, 3))
    return f"{abs(round(float(np.log(rest).mean() / np.log(0.9)), 3)):g}"


def defaults() -> object:
    """Defaults, in its own words."""
    known = inspect.signature(nn.BatchNorm2D).parameters
    return ", ".join(
        f"{name} {known[name].default}"
        for name in ("epsilon", "momentum", "data_format", "weight_attr", "bias_attr", "use_global_stats")
    )


def updates_under_no_grad() -> object:
    """Updates in one training forward under no_grad()."""
    layer = nn.BatchNorm2D(3)
    with paddle.no_grad():
        layer(X)
    return _updates(layer)


def global_stats_false() -> object:
    """use_global_stats=False in eval(): updates; what it normalises with."""
    layer = nn.BatchNorm2D(3, use_global_stats=False)
    layer.eval()
    y = layer(X).numpy()
    return f"{_updates(layer)}; {'the batch' if abs(y.mean()) < 1e-4 else 'the moving statistics'}"


def global_stats_true() -> object:
    """use_global_stats=True in train(): updates."""
    layer = nn.BatchNorm2D(3, use_global_stats=True)
    layer.train()
    layer(X)
    return _updates(layer)


def trainable_statistics() -> object:
    """The older nn.BatchNorm, trainable_statistics=True, in eval(): updates; what it normalises with."""
    layer = nn.BatchNorm(3, trainable_statistics=True)
    layer.eval()
    y = layer(X).numpy()
    return f"{_updates(layer)}; {'the batch' if abs(y.mean()) < 1e-4 else 'the moving statistics'}"


def one_value() -> object:
    """One value per channel, gamma 2, in training: whether the output is the input; dx for dy 3; updates."""
    layer = nn.BatchNorm1D(3)
    layer.weight.set_value(np.full(3, 2, np.float32))
    x = paddle.to_tensor(np.array([[5.0, 6.0, 7.0]], np.float32), stop_gradient=False)
    y = layer(x)
    y.backward(paddle.full_like(y, 3))
    return f"{'yes' if (y.numpy() == x.numpy()).all() else 'no'}; {x.grad.numpy()[0, 0]:g}; {_updates(layer)}"


def gamma_alone() -> object:
    """bias_attr=False: whether gamma gets a gradient."""
    layer = nn.BatchNorm2D(3, bias_attr=False)
    (layer(X) ** 3).sum().backward()
    return layer.weight.grad is not None


def beta_alone() -> object:
    """weight_attr=False: whether beta gets a gradient."""
    layer = nn.BatchNorm2D(3, weight_attr=False)
    (layer(X) ** 3).sum().backward()
    return layer.bias.grad is not None


def eps_zero() -> object:
    """epsilon 0 in training."""
    nn.BatchNorm2D(3, epsilon=0.0)(X)
    return "accepted"


def integers() -> object:
    """int64 input."""
    nn.BatchNorm2D(3)(X.astype("int64"))
    return "accepted"


def double_input() -> object:
    """float64 input to float32 parameters."""
    return nn.BatchNorm2D(3)(X.astype("float64")).dtype


def double_input_and_parameters() -> object:
    """float64 input to float64 parameters: type of the output."""
    layer = nn.BatchNorm2D(3)
    layer.to(dtype="float64")
    return layer(X.astype("float64")).dtype


def half_input() -> object:
    """float16 input."""
    return nn.BatchNorm2D(3)(X.astype("float16")).dtype


def bfloat16_input() -> object:
    """bfloat16 input."""
    return nn.BatchNorm2D(3)(X.astype("bfloat16")).dtype


def channels_last() -> object:
    """data_format="NHWC"."""
    nn.BatchNorm2D(5, data_format="NHWC")(X)
    return "accepted"


def ranks() -> object:
    """Ranks that BatchNorm1D, 2D and 3D take."""
    taken: dict[str, list[int]] = {}
    for name, kind in (("1D", nn.BatchNorm1D), ("2D", nn.BatchNorm2D), ("3D", nn.BatchNorm3D)):
        taken[name] = []
        for rank in range(1, 7):
            try:
                kind(3)(paddle.ones((4, 3, 2, 2, 2, 2)[:rank]))
                taken[name].append(rank)
            except (ValueError, RuntimeError, IndexError):
                pass
    return "; ".join(f"{name}: {', '.join(map(str, its))}" for name, its in taken.items())


def names() -> object:
    """Names in a checkpoint."""
    return ", ".join(nn.BatchNorm2D(3).state_dict())


def second_derivative() -> object:
    """The gradient of the gradient."""
    x = paddle.to_tensor(X.numpy(), stop_gradient=False)
    (dx,) = paddle.grad((nn.BatchNorm2D(3)(x) ** 3).sum(), x, create_graph=True)
    (dx**2).sum().backward()
    return "given" if x.grad is not None else "none"


def sync_on_cpu() -> object:
    """SyncBatchNorm on CPU."""
    nn.SyncBatchNorm(3)(X)
    return "accepted"
