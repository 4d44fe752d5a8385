"""BN-15: the same bits in NumPy, PyTorch and MXNet, for every number of threads, in every run; those of golden_bits.json."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import golden_bits as golden
import numpy as np
import pytest

from multibn import BLOCK, LANES, BatchNormSpec, reference
from multibn.kernel import arrays, schedule, threads
from multibn.kernel import entry as kernel
from multibn.kernel import plan as loops
from multibn.layer.types import PARAMETER_TYPE, Array

KEPT = json.loads(golden.FILE.read_text())
HOMES = ["numpy:reference", "numpy:kernel", "torch:kernel", "mxnet:kernel"]
MODULES = {"numpy": "multibn.numpy_backend", "torch": "multibn_torch", "mxnet": "multibn_mxnet"}


@pytest.fixture
def home(request: pytest.FixtureRequest) -> Callable[[int, BatchNormSpec], Any]:
    backend, implementation = request.param.split(":")
    if backend != "numpy":
        pytest.importorskip(backend, reason=f"{backend} is not installed")
    make = importlib.import_module(MODULES[backend]).BACKEND.make
    return lambda channels, spec: make(channels, spec, "cpu", implementation)


@pytest.fixture(params=[1, 2, 3, 4])
def thread_count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Set the number of threads in every way."""
    monkeypatch.setattr(threads, "limit", lambda: request.param)
    monkeypatch.setattr(kernel, "CREATING", kernel.SERIAL)
    try:
        import torch
    except ImportError:
        yield request.param
        return
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("home", HOMES, indirect=True)
@pytest.mark.parametrize("dtype", list(KEPT))
def test_golden_bits_after_ten_steps(home: Callable[[int, BatchNormSpec], Any], dtype: str) -> None:
    assert golden.golden(home, [dtype], golden.SHAPES)[dtype] == KEPT[dtype]


@pytest.mark.parametrize("home", HOMES[1:], indirect=True)
@pytest.mark.parametrize("shape", ["many groups", "staged"])
def test_golden_bits_for_every_number_of_threads(
    home: Callable[[int, BatchNormSpec], Any], shape: str, thread_count: int
) -> None:
    found = golden.golden(home, ["float32"], {shape: golden.SHAPES[shape]})
    assert found["float32"][shape] == KEPT["float32"][shape]


def test_shapes_of_the_golden_bits_take_every_path() -> None:
    """Serial; groups shared among threads; passes shared among threads; one and several blocks, chunks and groups."""
    paths = set()
    for shape in golden.SHAPES.values():
        rows = arrays.by_channel(np.zeros(shape, np.float32), 1)
        plan = loops.plan_of(rows.shape)
        how = "serial" if rows.size < kernel.SERIAL else "groups" if plan.groups >= schedule.GROUPS * 2 else "staged"
        paths |= {how, f"together {plan.together > 1}", f"blocks {plan.blocks > 1}", f"pieces {plan.chunks > shape[0]}"}
        paths |= {f"last group full {shape[1] % plan.together == 0}"}
    assert paths == {
        "serial", "groups", "staged", "together True", "together False", "blocks True", "blocks False", "pieces True",
        "pieces False", "last group full True", "last group full False",
    }  # fmt: skip


@pytest.mark.parametrize("s", [1, 2, 4, 9, 49, 196, 784, LANES - 1, LANES, LANES + 1, 12544])
@pytest.mark.parametrize("channels", [1, 3, 5, 64, 130, 512, 2048])
def test_a_group_fits_into_a_chunk(channels: int, s: int) -> None:
    plan = loops.plan_of((16, channels, s))
    assert plan.joined * plan.together * plan.width <= LANES
    assert (plan.groups - 1) * plan.together < channels <= plan.groups * plan.together


@pytest.mark.parametrize(
    ("shape", "together"), [((32, 512, 4), 128), ((16, 512, 9), 128), ((16, 128, 49), 32), ((8, 2048, 1), 2048)]
)
def test_threads_have_equal_groups(shape: tuple[int, int, int], together: int) -> None:
    """Unless S is 1."""
    plan = loops.plan_of(shape)
    assert (plan.together, plan.groups) == (together, shape[1] // together)


def both(
    x: Array, dy: Array, spec: BatchNormSpec, *, training: bool = True, channel_axis: int = 1, batches: int = 0
) -> tuple[list[Any], list[Any]]:
    """Return (y, dx, dgamma, dbeta, moving_mean, moving_var) of the reference and of the kernel."""
    channels, kind = x.shape[channel_axis], PARAMETER_TYPE[x.dtype.name]
    rng = np.random.default_rng(5)
    gamma, beta, mean, var = (rng.uniform(0.5, 2, channels).astype(kind) for _ in range(4))
    by_reference = reference.forward(x, gamma, beta, mean, var, spec, training, channel_axis, batches)
    gradients = reference.backward(dy, by_reference.saved)
    y, saved = arrays.forward(x, gamma, beta, mean, var, spec, training, channel_axis, batches)
    return [by_reference.y, *gradients, by_reference.moving_mean, by_reference.moving_var], [
        y, *arrays.backward(dy, saved), mean, var,
    ]  # fmt: skip


def assert_same_bits(pair: tuple[list[Any], list[Any]]) -> None:
    for name, a, b in zip(golden.NAMES, *pair, strict=True):
        assert (name, a.shape, a.dtype) == (name, b.shape, b.dtype)
        assert (name, a.tobytes()) == (name, np.ascontiguousarray(b).tobytes())


def random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(3, 2, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "shape",
    [(2, 1), (64, 1000), (3, 5, LANES - 1), (3, 5, LANES), (3, 5, LANES + 1), (2, 2, 2 * LANES + 1), (BLOCK - 1, 2), (BLOCK, 2),
     (BLOCK + 1, 2), (700, 130), (1030, 1, 7), (2, 40, 900), (1, 1, 300_007), (40_000, 1), (600, 70, 1)],
    ids=str,
)  # fmt: skip
def test_reference_and_kernel_agree(shape: tuple[int, ...], dtype: str, thread_count: int) -> None:
    assert_same_bits(both(random(shape, dtype), random(shape, dtype, 1), BatchNormSpec()))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "shape",
    [(4, 16, 1), (5, 16, 61), (70, 16, 37), (9, 16, 317), (6, 16, LANES + 1), (6, 48, 301), (300, 64), (34, 32, 7), (8, 3, 5)],
    ids=str,
)  # fmt: skip
def test_reference_and_kernel_agree_past_the_cache(
    shape: tuple[int, ...], dtype: str, thread_count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that chunks share; rows joined, the last ones fewer; rows in pieces; the last shape's rows begin anywhere."""
    for bound in ("LARGE", "SERIAL", "CREATING"):
        monkeypatch.setattr(kernel, bound, 0)
    assert_same_bits(both(random(shape, dtype), random(shape, dtype, 1), BatchNormSpec()))


def test_large_output_is_written_past_the_cache_in_every_place_of_a_line() -> None:
    """Above LARGE as it is, from memory that begins anywhere; nothing is written beside the output."""
    shape = (36, 16, 61 * 63)
    x, dy = random(shape, "float32"), random(shape, "float32", 1)
    assert x.nbytes >= kernel.LARGE
    expected, _ = both(x, dy, BatchNormSpec())
    gamma, beta, mean, var = (np.random.default_rng(5).uniform(0.5, 2, (4, 16))).astype(np.float32)
    for offset in (1, 4, 28, 60):  # bytes; 1: values that begin nowhere of their own
        rooms = [np.full(x.nbytes + 128, 7, np.uint8) for _ in range(2)]
        outs: list[Array] = [np.ndarray(shape, np.float32, room.data, offset) for room in rooms]
        y, dx = outs
        saved, dgamma, dbeta = np.empty((2, 16)), gamma.copy(), gamma.copy()
        spec = BatchNormSpec()
        kernel.run_forward(x, y, gamma, beta, mean.copy(), var.copy(), saved, spec.eps, 0.9, False, True, True)
        kernel.run_backward(x, dy, dx, gamma, saved, dgamma, dbeta, True)
        assert (y.tobytes(), dx.tobytes()) == (expected[0].tobytes(), expected[1].tobytes())
        for room in rooms:
            assert np.array_equal(np.delete(room, slice(offset, offset + x.nbytes)), np.full(128, 7, np.uint8))


@pytest.mark.parametrize(
    "spec",
    [BatchNormSpec.article(), BatchNormSpec(scale=False), BatchNormSpec(center=False), BatchNormSpec(moving_variance="unbiased"),
     BatchNormSpec(momentum=None), BatchNormSpec(momentum=0.0), BatchNormSpec(normalize_with="moving"),
     BatchNormSpec(update_statistics=False), BatchNormSpec(normalize_with="moving", update_statistics=False)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5), (70, 3, 200)], ids=["serial", "staged"])
def test_reference_and_kernel_agree_on_every_switch(spec: BatchNormSpec, training: bool, shape: tuple[int, ...]) -> None:
    x, dy = random(shape, "float32"), random(shape, "float32", 1)
    by_reference, by_kernel = both(x, dy, spec, training=training, batches=3)
    for i, there in ((2, spec.scale), (3, spec.center)):
        if not there:  # the kernel always gives both, a layer leaves out what it has not
            assert by_reference[i] is None
            by_reference[i] = by_kernel[i]
    assert_same_bits((by_reference, by_kernel))


@pytest.mark.parametrize("channel_axis", [0, 1, 2, -1])
def test_reference_and_kernel_agree_on_every_channel_axis(channel_axis: int) -> None:
    x, dy = random((6, 5, 7), "float32"), random((6, 5, 7), "float32", 1)
    assert_same_bits(both(x, dy, BatchNormSpec(), channel_axis=channel_axis))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0)])
def test_reference_and_kernel_agree_on_nothing(shape: tuple[int, ...]) -> None:
    assert_same_bits(both(random(shape, "float32"), random(shape, "float32", 1), BatchNormSpec()))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 3, 5), (70, 3, 200)], ids=["serial", "staged"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_poisoned_channel_poisons_no_other(value: float, shape: tuple[int, ...], dtype: str) -> None:
    """BN-11. The bits of a NaN are not specified, so the poisoned channel is compared by value."""
    x, dy = random(shape, dtype), random(shape, dtype, 1)
    x[1, 1, 2] = value
    by_reference, by_kernel = both(x, dy, BatchNormSpec())
    for a, b in zip(by_reference, by_kernel, strict=True):
        np.testing.assert_array_equal(a, b)
    y, _, _, _, mean, var = by_kernel
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()
    assert np.isfinite(mean).all()
    assert np.isfinite(var).all()


MEMORY: dict[str, Callable[[Array], Array]] = {
    "channels last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "every second": lambda a: np.repeat(a, 2, axis=0)[::2],
    "backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


@pytest.mark.parametrize("layout", MEMORY)
def test_memory_layout_of_x_does_not_change_the_meaning(layout: str) -> None:
    """BN-14. Integers, whose sums and means are exact, so that the order of summation does not matter."""
    x = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4) % 8
    dy = random(x.shape, "float32")
    assert both(MEMORY[layout](x), dy, BatchNormSpec())[1][0].tobytes() == both(x, dy, BatchNormSpec())[1][0].tobytes()


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("layout_of_dy", MEMORY)
def test_memory_layout_of_dy_does_not_change_the_bits(layout: str, layout_of_dy: str) -> None:
    x, dy = MEMORY[layout](random((2, 3, 4, 5), "float32")), random((2, 3, 4, 5), "float32", 1)
    assert_same_bits((both(x, dy, BatchNormSpec())[1], both(x, MEMORY[layout_of_dy](dy), BatchNormSpec())[1]))
