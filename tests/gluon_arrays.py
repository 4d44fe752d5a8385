"""What the tests of Gluon blocks share: both interfaces of MXNet's arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mxnet as mx
import pytest

from multibn.layer.types import Array


@pytest.fixture(params=[False, True], ids=["nd", "np"])
def numpy_mode(request: Any) -> Iterator[bool]:
    """Whether arrays are ``mx.np``'s."""
    if request.param:
        mx.npx.set_np()
    yield request.param
    mx.npx.reset_np()


def array(values: Array) -> Any:
    """An array of the interface that is in use."""
    make = mx.np.array if mx.util.is_np_array() else mx.nd.array
    return make(values, dtype=values.dtype)
