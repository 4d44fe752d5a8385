"""Every private part of JAX and Flax that is used is named, and its absence says what to do."""

from __future__ import annotations

import re

import pytest

jax = pytest.importorskip("jax", reason="JAX has an environment of its own: make test-jax")

import flax

from multibn_jax import compat


def test_every_part_is_there() -> None:
    for place in compat.PARTS:
        assert compat.part(place) is not None


def test_a_part_that_is_missing_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat.PARTS, "jax.interpreters.ad:Gone", "differentiate")
    wanted = (
        f"jax {jax.__version__} with flax {flax.__version__} has no jax.interpreters.ad.Gone, without which multibn_jax cannot "
        "differentiate. Install releases that multibn was tested with: pip install 'jax<=0.10.2' 'flax<=0.12.8'."
    )
    with pytest.raises(ImportError, match=f"^{re.escape(wanted)}$"):
        compat.part("jax.interpreters.ad:Gone")
