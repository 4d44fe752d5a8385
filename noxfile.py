"""Run the tests with other versions than those of constraints.txt: ``make versions``.

``tests-3.N`` runs what needs no framework on each Python that the machine has, with the newest NumPy and Numba there;
``torch`` runs PyTorch's tests with them, and ``jax`` JAX's with another version of it, on this Python. A Python that is absent
is skipped by name.
"""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

PLAIN = ["tests/test_array.py", "tests/test_dialects.py", "tests/test_layer_messages.py", "tests/test_memory.py"]
PLAIN += ["tests/test_reference.py", "tests/test_spec.py", "tests/test_threads.py", "tests/test_port_params.py"]
TORCH = ["tests/test_torch_layers.py", "tests/test_torch_switches.py", "tests/test_torch_relu.py", "tests/test_kernel_exact.py"]
TORCH += ["tests/test_port_match.py"]
JAX = ["tests/with_jax/test_transformations.py", "tests/with_jax/test_layer.py"]
TOOLS = ["pytest", "hypothesis", "mpmath", "pytest-xdist"]


def _report(session: nox.Session) -> None:
    session.run("python", "-c", "import numpy, numba, sys; print(sys.version.split()[0], numpy.__version__, numba.__version__)")


@nox.session(python=["3.10", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """What needs no framework, with the newest NumPy and Numba."""
    session.install(".", "jinja2", *TOOLS)
    _report(session)
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *PLAIN, *session.posargs)


@nox.session(python="3.11")
def torch(session: nox.Session) -> None:
    """PyTorch's tests with the newest NumPy and Numba."""
    session.install(".", "torch==2.13.0", "expecttest", "jinja2", *TOOLS)
    _report(session)
    session.run("python", "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *TORCH, *session.posargs)


@nox.session(python="3.11")
def jax(session: nox.Session) -> None:
    """JAX's tests with the minor version of JAX before that of constraints-jax.txt."""
    session.install("-e", ".[dev-jax]", "jax==0.9.*")
    session.run("python", "-c", "import jax, flax, numpy; print(jax.__version__, flax.__version__, numpy.__version__)")
    session.run("python", "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *JAX, *session.posargs)
