"""The habits of MXNet's operator."""

from __future__ import annotations

import mxnet as mx
import numpy as np
from mxnet import autograd, nd

X = nd.array(np.random.default_rng(0).normal(3, 2, (6, 3, 4, 5)))


def defaults() -> object:
    """Defaults, in its own words."""
    return _numbers(nd.BatchNorm.__doc__, "eps", "momentum", "fix_gamma", "axis")


def _numbers(text: str, *names: str) -> str:
    told = {name: text.split(name + " : ")[1].split("default=")[1].split("\n")[0] for name in names}
    return ", ".join(
        f"{name} {float(np.float32(value)):g}" if "." in value else f"{name} {value}" for name, value in told.items()
    )


def defaults_of_others() -> object:
    """The same of BatchNorm_v1 and contrib.SyncBatchNorm."""
    return "; ".join(
        _numbers(each.__doc__, "eps", "momentum", "fix_gamma") for each in (nd.BatchNorm_v1, nd.contrib.SyncBatchNorm)
    )


def defaults_np() -> object:
    """npx.batch_norm with its defaults, gamma 2, a variance of 1e-3 in inference: the output over the input; gamma after it."""
    with mx.util.np_shape(True), mx.util.np_array(True):
        x, gamma, zeros = mx.np.ones((2, 3)), mx.np.full(3, 2.0), mx.np.zeros(3)
        y = mx.npx.batch_norm(x, gamma, zeros, zeros, mx.np.full(3, 1e-3))
        return f"{float(y[0, 0]):.5g} (1/sqrt(1e-3 + 1e-3) is {1 / np.sqrt(2e-3):.5g}); {float(gamma[0]):g}"


def names() -> object:
    """Names of the arguments and of the auxiliary states of mx.sym.BatchNorm, name="bn"."""
    made = mx.sym.BatchNorm(mx.sym.Variable("data"), name="bn")
    return f"{', '.join(made.list_arguments()[1:])}; {', '.join(made.list_auxiliary_states())}"


def gamma_overwritten() -> object:
    """fix_gamma as it is by default, gamma 2 passed in: gamma after it."""
    gamma = nd.full(3, 2)
    nd.BatchNorm(X, gamma, nd.zeros(3), nd.zeros(3), nd.ones(3)).asnumpy()
    return float(gamma.asnumpy()[0])


def third_output() -> object:
    """output_mean_var=True: the third output times sqrt(var + eps)."""
    with autograd.train_mode():
        out = nd.BatchNorm(X, nd.ones(3), nd.zeros(3), nd.zeros(3), nd.ones(3), output_mean_var=True, eps=1e-3)
    return float((out[2].asnumpy() * np.sqrt(X.asnumpy().astype(np.float64).var((0, 2, 3)) + 1e-3)).mean())
