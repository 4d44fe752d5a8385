"""Helpers for the tests of Gluon blocks: both interfaces of MXNet's arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mxnet as mx
import pytest

from multibn.layer.types import Array


@pytest.fixture(params=[False, True], ids=["nd", "np"])
def numpy_mode(request: Any) -> Iterator[bool]:
    """Return whether arrays are those of ``mx.np``."""
    if request.param:
        mx.npx.set_np()
    yield request.param
    mx.npx.reset_np()


def array(values: Array) -> Any:
    """Make an array of the active interface."""
    make = mx.np.array if mx.util.is_np_array() else mx.nd.array
    return make(values, dtype=values.dtype)
