"""Programs that outlive their process: exported ones, and those in JAX's compilation cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX has an environment of its own: make test-jax")

import jax.numpy as jnp
from jax import export

from multibn_jax import EXPORT_CHECKS, How, batch_norm

TRAINING = How(1e-5, 0.9, False, True, True, 1)
P = np.full(3, 1.5, np.float32)


def step(x: Any) -> Any:
    y, *moving = batch_norm(x, P, P, P, P, 0, TRAINING)
    return y, moving, jax.grad(lambda x: (batch_norm(x, P, P, P, P, 0, TRAINING)[0] ** 3).sum())(x)


def same(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def x_of(n: int) -> Any:
    return np.random.default_rng(n).standard_normal((n, 3, 4, 4)).astype(np.float32)


def exported(shape: str, **options: Any) -> Any:
    given = jax.ShapeDtypeStruct(export.symbolic_shape(shape), np.float32)
    return export.export(jax.jit(step), disabled_checks=EXPORT_CHECKS, **options)(given)


def test_an_exported_program_takes_any_batch() -> None:
    program = export.deserialize(exported("n, 3, 4, 4").serialize())
    for n in (1, 2, 7):
        same(program.call(x_of(n)), jax.jit(step)(x_of(n)))


def test_a_program_from_elsewhere_needs_nothing_but_the_import(tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(exported("n, 3, 4, 4").serialize())
    np.save(tmp_path / "x.npy", x_of(5))
    program = (
        "import sys, numpy as np, multibn_jax; from jax import export\n"
        "program = export.deserialize(bytearray(open('program', 'rb').read()))\n"
        "np.save('y.npy', program.call(np.load('x.npy'))[0])"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=300)
    same(np.load(tmp_path / "y.npy"), jax.jit(step)(x_of(5))[0])


def test_a_symbolic_batch_that_may_be_one_value_is_refused() -> None:
    given = jax.ShapeDtypeStruct(export.symbolic_shape("n, 3"), np.float32)
    with pytest.raises(Exception, match="inconclusive"):
        export.export(jax.jit(step), disabled_checks=EXPORT_CHECKS)(given)
    two = jax.ShapeDtypeStruct(export.symbolic_shape("n, 3", constraints=["n >= 2"]), np.float32)
    program = export.export(jax.jit(step), disabled_checks=EXPORT_CHECKS)(two)
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    same(program.call(x), jax.jit(step)(x))
    with pytest.raises(ValueError, match="n >= 2"):
        program.call(x[:1])


def test_accelerators_get_jaxs_own_operators() -> None:
    program = exported("n, 3, 4, 4", platforms=["cpu", "cuda"])
    assert "multibn_forward" in program.mlir_module()
    same(program.call(x_of(4)), jax.jit(step)(x_of(4)))
    alone = export.export(jax.jit(step), platforms=["cuda"])(x_of(4))
    assert "custom_call" not in alone.mlir_module()


def test_a_program_in_the_compilation_cache_is_run_by_another_process(tmp_path: Path) -> None:
    program = (
        "import sys, jax, numpy as np, multibn_jax; from multibn_jax import How, batch_norm\n"
        "jax.config.update('jax_compilation_cache_dir', 'cache')\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)\n"
        "events = []; jax.monitoring.register_event_listener(lambda name, **_: events.append(name))\n"
        "p = np.full(3, 1.5, 'f'); how = How(1e-5, 0.9, False, True, True, 1)\n"
        "f = lambda x: (batch_norm(x, p, p, p, p, 0, how)[0] ** 3).sum()\n"
        "print(np.asarray(jax.jit(jax.grad(f))(np.load('x.npy'))).tobytes().hex())\n"
        "print(events.count('/jax/compilation_cache/cache_hits'))"
    )
    np.save(tmp_path / "x.npy", x_of(3))
    said = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=300, text=True, capture_output=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert said[0][0] == said[1][0]
    assert (int(said[0][1]), int(said[1][1])) == (0, 1)


def test_the_handlers_refuse_a_frame_that_they_do_not_know() -> None:
    wrong = jax.ffi.ffi_call("multibn_backward", jax.ShapeDtypeStruct((2, 3, 4), np.float32))
    with pytest.raises(Exception, match="differs from the one that multibn_jax knows"):
        wrong(jnp.zeros((2, 3, 4)), settings=np.zeros(1))
