"""Gluon's large outputs are in reused memory that no other array uses."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")

from multibn.memory import LENT
from multibn_mxnet import GluonBatchNorm
from multibn_mxnet.direct import output_memory

SIDE = 512  # of a square of float32 that is large enough to be lent
assert 4 * SIDE**2 >= LENT


def square(dtype: Any = np.float32, context: Any = None) -> Any:
    return output_memory.empty((SIDE, SIDE), context or mx.cpu(), dtype)


def places() -> list[int]:
    """Return the addresses of all buffers in use."""
    return [memory.ctypes.data for _, memory in output_memory._out]


def given_back() -> None:
    mx.nd.waitall()
    output_memory.take_back()


@pytest.mark.parametrize("use", [lambda y: y, lambda y: y.reshape((-1,)), lambda y: y[3:5], lambda y: y.as_np_ndarray()])
def test_memory_is_lent_again_when_its_last_user_has_gone(use: Any) -> None:
    y = square()
    place = places()[-1]
    used = use(y)
    del y
    other = square()
    assert places()[-1] != place
    del used
    given_back()
    assert place not in places()
    again = square()
    assert places()[-1] == place
    del other, again


def test_pending_operators_keep_the_memory() -> None:
    """MXNet's operators read an array after the caller has freed it."""
    expected = []
    found = []
    for i in range(20):
        y = square()
        y[:] = i
        found.append(mx.nd.dot(y, y)[0, 0])
        expected.append(float(SIDE * i * i))
        del y
    assert [float(each.asscalar()) for each in found] == expected


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_lent_arrays_are_like_others(dtype: str) -> None:
    y = square(dtype)
    y[:] = 2
    assert (y.shape, y.dtype, y.context) == ((SIDE, SIDE), np.dtype(dtype), mx.cpu())
    assert y.asnumpy().tobytes() == np.full((SIDE, SIDE), 2, dtype).tobytes()
    assert places()[-1] % 64 == 0


@pytest.mark.parametrize(
    ("shape", "context", "dtype"),
    [((SIDE, SIDE - 1), mx.cpu(), "float32"), ((SIDE, SIDE), mx.cpu(1), "float32"), ((SIDE, SIDE), mx.cpu(), "int32")],
    ids=["small", "another context", "another type"],
)
def test_not_everything_is_lent(shape: tuple[int, int], context: Any, dtype: str) -> None:
    given_back()
    before = places()
    y = output_memory.empty(shape, context, dtype)
    assert (y.shape, y.context, y.dtype) == (shape, context, np.dtype(dtype))
    assert places() == before


@pytest.mark.parametrize("hold", [True, False], ids=["y is kept", "the graph alone keeps y"])
def test_outputs_and_gradients_of_several_forwards_do_not_mix(hold: bool) -> None:
    rng = np.random.default_rng(0)
    xs = [mx.nd.array(rng.normal(i, 1, (16, 32, 32, 32)), dtype="float32") for i in range(3)]
    results = []
    for together in (False, True):
        block = GluonBatchNorm(in_channels=32)
        block.initialize()
        held, losses = [], []
        for x in xs:
            x.attach_grad()
            with mx.autograd.record():
                y = block(x)
                assert np.frombuffer(output_memory._out[-1][1], np.float32).tobytes() == y.asnumpy().tobytes(), "y is lent"
                losses.append((y * y * x).sum())
            if hold:
                held.append(y)
            del y
            if not together:
                losses.pop().backward()
        if together:
            mx.autograd.backward(losses)
        results.append([each.asnumpy() for each in (*held, *(x.grad for x in xs))])
    for a, b in zip(*results, strict=True):
        assert a.tobytes() == b.tobytes()


def test_several_threads_at_once() -> None:
    def fill(value: int) -> bool:
        found = []
        for _ in range(20):
            y = square()
            y[:] = value
            found.append(bool((y.asnumpy() == value).all()))
        return all(found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(8)))


def test_a_process_may_end_while_something_is_lent() -> None:
    code = (
        "import mxnet as mx, numpy as np; from multibn_mxnet.direct import output_memory; "
        f"kept = [output_memory.empty(({SIDE}, {SIDE}), mx.cpu(), np.float32) for _ in range(3)]; kept[0][:] = 1; "
        "kept[1] = mx.nd.dot(kept[0], kept[0]); del kept[0]"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_has_a_lock_of_its_own() -> None:
    with output_memory._lending:
        before = output_memory._lending
        output_memory._forget()
        assert output_memory._lending is not before
        assert not output_memory._lending.locked()
