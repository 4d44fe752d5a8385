"""On CPU the bits are the kernel's, for every type and layout, and denormals too (BN-15)."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX has an environment of its own: make test-jax")

import jax.numpy as jnp

from multibn import BatchNormSpec, kernel
from multibn_jax import How, batch_norm

SPECS = {
    "usual": BatchNormSpec(),
    "article": BatchNormSpec.article(average=True),
    "tiny eps": BatchNormSpec(eps=1e-300, momentum=0.0),
}
LAYOUTS = {"NCHW": ((4, 3, 5, 6), 1), "NHWC": ((8, 7, 7, 40), -1), "(N, C)": ((64, 16), 1), "axis 2": ((4, 3, 5, 6), 2)}
NAMES = ("y", "mean", "var", "dx", "dgamma", "dbeta")


def of_kernel(x: Any, dy: Any, state: Any, how: How, old: float) -> tuple[Any, ...]:
    """The kernel on NumPy arrays of any type, halves as their bits."""
    gamma, beta, mean, var = (a.copy() for a in state)
    axis = how.channel_axis % x.ndim
    n, s = int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis + 1 :]))

    def bits(a: Any) -> Any:
        kind = {"float16": np.int16, "bfloat16": np.uint16}.get(a.dtype.name)
        return (a if kind is None else a.view(kind)).reshape(n, -1, s).copy()

    values, y, dx = bits(x), bits(x), bits(x)
    saved, dgamma, dbeta = np.empty((2, len(mean))), np.empty_like(gamma), np.empty_like(gamma)
    kernel.run_forward(values, y, gamma, beta, mean, var, saved, how.eps, old, how.unbiased, how.use_batch, how.update)
    kernel.run_backward(values, bits(dy), dx, gamma, saved, dgamma, dbeta, how.use_batch)
    return y.view(x.dtype).reshape(x.shape), mean, var, dx.view(x.dtype).reshape(x.shape), dgamma, dbeta


@pytest.mark.parametrize("scale", [1.0, 1e-41], ids=["usual", "denormal"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_bits_are_the_kernels(dtype: str, layout: str, scale: float) -> None:
    shape, axis = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        parameter = np.float64 if dtype == "float64" else np.float32
        x, dy = (np.asarray(jnp.asarray((rng.standard_normal(shape) * 2 + 3) * scale, dtype)) for _ in range(2))
        state = [(rng.standard_normal(shape[axis]) ** 2 + 0.1).astype(parameter) for _ in range(4)]
        for spec in SPECS.values():
            for training in (True, False):
                how = How.of(spec, training, axis)

                @jax.jit
                def step(x: Any, dy: Any, gamma: Any, beta: Any, mean: Any, var: Any, how: How = how) -> Any:
                    def run(x: Any, gamma: Any, beta: Any) -> Any:
                        y, *moving = batch_norm(x, gamma, beta, mean, var, 2, how)
                        return y, moving

                    y, pull, moving = jax.vjp(run, x, gamma, beta, has_aux=True)
                    return y, *moving, *pull(dy)

                got, want = step(x, dy, *state), of_kernel(x, dy, state, how, spec.weight_of_old(2))
                for name, a, b in zip(NAMES, got, want, strict=True):
                    a = np.asarray(a)
                    assert a.dtype == b.dtype
                    assert a.tobytes() == b.tobytes(), f"{name} of {spec}, training={training}"


def test_xla_goes_on_flushing_denormals_after_a_call() -> None:
    """The handler gives the thread its arithmetic back: a program's other operators compute what they did without it."""
    denormal = jnp.full(8, 1e-40, jnp.float32)
    how = How(1e-5, 0.9, False, True, True, -1)
    one = jnp.ones(8)

    def run(d: Any) -> Any:
        y, _, _ = batch_norm(jnp.stack([d, one]), one, one, one, one, 0, how)
        return (d * 0.5) + 0 * y.sum()

    assert float(jax.jit(run)(denormal)[0]) == float(jax.jit(lambda d: d * 0.5)(denormal)[0])


def test_any_number_of_threads_gives_the_same_bits() -> None:
    program = (
        "import jax, hashlib, numpy as np; from multibn_jax import How, batch_norm\nrng = np.random.default_rng(0)\n"
        "x, p = rng.standard_normal((32, 64, 28, 28)).astype('f'), np.ones(64, 'f')\nhow = How(1e-5, 0.9, False, True, True, 1)\n"
        "f = jax.jit(lambda x: batch_norm(x, p, p, p, p, 0, how))\n"
        "out = [*f(x), jax.grad(lambda x: (f(x)[0] ** 2).sum())(x)]\n"
        "print(hashlib.sha256(b''.join(np.asarray(a).tobytes() for a in out)).hexdigest())"
    )
    command = [sys.executable, "-c", program]
    digests = [
        subprocess.run(command, env={**os.environ, "NUMBA_NUM_THREADS": n}, text=True, capture_output=True, check=True).stdout
        for n in ("1", "2")
    ]
    assert len(digests[0]) == 65
    assert digests[0] == digests[1]
