"""The GPU kernel in Triton's interpreter, against the CPU kernel, bit for bit.

Run by test_gpu_interpreted.py in a process of its own: TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

assert os.environ["TRITON_INTERPRET"] == "1"

from rounding import rounded, ties

from multibn import kernel
from multibn.layer.types import PARAMETER_TYPE, Array
from multibn_torch import triton_kernel
from multibn_torch.triton_kernel import passes, plan

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes with NumPy

TYPES = ("float16", "bfloat16", "float32", "float64")
NAMES = ("y", "saved", "moving_mean", "moving_var", "batches", "dx", "dgamma", "dbeta")


class Call(NamedTuple):
    """One forward and its backward."""

    shape: tuple[int, int, int]
    dtype: str
    eps: float = 1e-5
    old: float | None = 0.9
    unbiased: bool = True
    use_batch: bool = True
    update: bool = True
    rectify: bool = False
    affine: bool = True
    batches: int = 3
    scale: float = 2.0
    shift: float = 3.0
    special: tuple[float, ...] = ()
    """The first values of x."""
    seed: int = 0


def data(call: Call) -> tuple[Any, ...]:
    """x, dy, gamma, beta, moving_mean and moving_var."""
    torch.manual_seed(call.seed)
    channels, kind, parameter = call.shape[1], getattr(torch, call.dtype), getattr(torch, PARAMETER_TYPE[call.dtype])
    x = torch.randn(call.shape, dtype=torch.float64) * call.scale + call.shift
    x.flatten()[: len(call.special)] = torch.tensor(call.special, dtype=torch.float64)[: x.numel()]
    dy = torch.randn(call.shape, dtype=torch.float64)
    gamma, beta, mean, var = (torch.randn(channels, dtype=parameter) for _ in range(4))
    return x.to(kind), dy.to(kind), gamma, beta, mean, var.abs() + 0.1


def on_gpu(call: Call) -> list[Any]:
    """Return the results of the GPU kernel."""
    x, dy, gamma, beta, mean, var = data(call)
    if not call.affine:
        gamma = beta = None
    batches, saved = torch.tensor(call.batches), torch.full((2, call.shape[1]), 7.0, dtype=torch.float64)
    y, dx, dgamma, dbeta = torch.full_like(x, 7), torch.full_like(x, 7), torch.full_like(mean, 7), torch.full_like(mean, 7)
    triton_kernel.run_forward(
        x, y, gamma, beta, mean, var, saved, call.eps, call.old, call.unbiased, call.use_batch, call.update,
        batches=batches, rectify=call.rectify,
    )  # fmt: skip
    triton_kernel.run_backward(x, dy, dx, gamma, saved, dgamma, dbeta, call.use_batch, beta=beta, rectify=call.rectify)
    again = torch.full_like(y, 7)
    triton_kernel.run_normalise(x, again, gamma, beta, saved, rectify=call.rectify)
    assert torch.equal(bits(again), bits(y))
    return [y, saved, mean, var, batches, dx, dgamma, dbeta]


def array(t: Any) -> Array:
    """Return a view of a tensor for the CPU kernel."""
    if t.dtype == torch.float16:
        return t.view(torch.int16).numpy()  # type: ignore[no-any-return]
    return t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()  # type: ignore[no-any-return]


def on_cpu(call: Call) -> list[Any]:
    """Return the results of the CPU kernel; a ReLU is applied to its output, and to dy."""
    x, dy, gamma, beta, mean, var = data(call)
    if not call.affine:
        gamma, beta = torch.ones_like(gamma), torch.zeros_like(beta)
    batches, saved = torch.tensor(call.batches), torch.full((2, call.shape[1]), 7.0, dtype=torch.float64)
    y, dx, dgamma, dbeta = torch.full_like(x, 7), torch.full_like(x, 7), torch.full_like(mean, 7), torch.full_like(mean, 7)
    old = call.batches / (call.batches + 1) if call.old is None else call.old
    arrays = [array(t) for t in (x, y, gamma, beta, mean, var, saved)]
    run_forward: Any = kernel.run_forward
    run_forward(*arrays, call.eps, old, call.unbiased, call.use_batch, call.update)
    batches += call.update and x.numel() > 0
    if call.rectify:
        dy = torch.where(y <= 0, torch.zeros_like(dy), dy)
        y = torch.where(y <= 0, torch.zeros_like(y), y)
    kernel.run_backward(array(x), array(dy), array(dx), arrays[2], arrays[6], array(dgamma), array(dbeta), call.use_batch)
    return [y, saved, mean, var, batches, dx, dgamma, dbeta]


def bits(t: Any) -> Any:
    """Return the bits of a tensor, with all NaNs equal."""
    if not t.is_floating_point():
        return t
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize]
    return torch.where(t.isnan(), torch.full_like(t, torch.nan), t).view(whole)


def same(call: Call) -> None:
    for name, got, wanted in zip(NAMES, on_gpu(call), on_cpu(call), strict=True):
        differ = bits(got) != bits(wanted)
        at = differ.nonzero()[:1].flatten().tolist()
        assert not differ.any(), f"{call}: {name}{at}: {int(differ.sum())} of {differ.numel()} differ"


SHAPES = {
    "one chunk for many channels": (5, 7, 3),
    "two blocks of joined samples": (1100, 2, 1),
    "joined samples, the last ones fewer": (100, 3, 2),
    "a row in uneven pieces": (3, 2, 2601),
    "channels-last": (130, 40, 1),
    "more channels than a tile": (3, 130, 1),
    "the widest rows that are joined": (20, 3, 300),
    "two blocks": (65, 2, 1030),
    "one value of a channel in a row": (9, 1030, 1),
    "one value": (2, 1, 1),
}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: Any) -> Iterator[None]:
    """The interpreter takes milliseconds for each program."""
    monkeypatch.setattr(plan, "ELEMENTS", 1 << 15)
    monkeypatch.setattr(plan, "FEWEST", 1 << 11)
    triton_kernel._plan.cache_clear()
    yield
    triton_kernel._plan.cache_clear()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, dtype: str) -> None:
    same(Call(SHAPES[name], dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"use_batch": False},
        {"use_batch": False, "update": False},
        {"update": False},
        {"old": 0.0},
        {"old": None},
        {"old": None, "batches": 0},
        {"unbiased": False, "eps": 1e-12},
        {"affine": False},
        {"rectify": True},
        {"rectify": True, "affine": False, "use_batch": False},
        {"special": (float("nan"), 1.0)},
        {"special": (float("inf"), -1.0), "rectify": True},
        {"special": (float("-inf"), float("inf"))},
        {"scale": 1e-40, "shift": 0.0},
        {"scale": 1e-310, "shift": 0.0, "eps": 1e-300},
        {"scale": 1e-6, "shift": 1.0, "rectify": True},
        {"scale": 3e4, "shift": 6e4},  # float16 overflows
        {"scale": 0.0, "shift": -0.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], dtype: str) -> None:
    same(Call((9, 3, 30), dtype, **options))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_empty_input_changes_nothing_and_has_zero_gradients(shape: Any) -> None:
    call = Call(shape, "float32")
    _, saved, mean, var, batches, _, dgamma, dbeta = on_gpu(call)
    before = data(call)
    assert torch.equal(mean, before[4])
    assert torch.equal(var, before[5])
    assert (batches, saved.min(), dgamma.abs().sum(), dbeta.abs().sum()) == (3, 7, 0, 0)


@pytest.mark.parametrize("shape", [(70, 9, 30), (300, 9, 1)])
def test_no_bit_depends_on_the_tiles(shape: Any, monkeypatch: Any) -> None:
    for name, value in {"FEWEST": 32, "ACROSS": 4, "ELEMENTS": 256}.items():
        monkeypatch.setattr(plan, name, value)
    same(Call(shape, "float32", rectify=True))


def fold(a: Array) -> Array:
    """Sum over the first axis in the order of BN-15."""
    while len(a) > 1:
        half = (len(a) + 1) // 2
        low = a[:half].copy()
        low[: len(a) - half] += a[half:]
        a = low
    total: Array = a[0]
    return total


@pytest.mark.parametrize("folded", [2, 1024])
def test_many_blocks(folded: int, monkeypatch: Any) -> None:
    """More than are folded in registers, and fewer: so many that folding halves is not folding neighbours."""
    monkeypatch.setattr(plan, "FOLDED", folded)
    n, channels, s = 64 * 4 + 10, 3, 1030
    cut, _, tile, _ = plan.plan_of(n, channels, s)
    assert cut.blocks == 5
    sums = torch.randn(4, 5, channels, dtype=torch.float64)
    sums[2] = sums[2].abs() * 1e5
    count = np.array([64 * s] * 4 + [10 * s], dtype=np.float64)[:, None]
    pivot, sum1, sum2, _ = sums.numpy()
    sums[3] = torch.from_numpy(pivot * count + sum1)
    mean = fold(sums[3].numpy()) / (n * s)
    shift = pivot - mean
    missed = fold(sum1 + count * shift) / (n * s)
    var = fold(sum2 + 2 * shift * sum1 + count * shift * shift) / (n * s) - missed * missed
    wanted = np.stack([mean + missed, 1 / np.sqrt(var + 1e-5)])
    saved, unread = torch.empty(2, channels, dtype=torch.float64), torch.zeros(channels)
    passes.statistics[(tile.programs,)](
        sums.clone(), unread, unread, unread, saved, triton_kernel._float64_bits(1e-5), 0, *cut, B=tile.blocks, Q=tile.q,
        MANY=tile.many, UNBIASED=False, USE_BATCH=True, UPDATE=False, AVERAGE=False,
    )  # fmt: skip
    np.testing.assert_array_equal(saved.numpy(), wanted)

    means, gradients = torch.empty_like(saved), torch.empty_like(saved)
    two = sums[:2].clone()
    passes.gradients[(tile.programs,)](two, saved, means, gradients[0], gradients[1], n, channels, s, 5, B=tile.blocks, Q=tile.q)
    dgamma, dbeta = fold(sum1) * wanted[1], fold(pivot)
    np.testing.assert_array_equal(gradients.numpy(), [dgamma, dbeta])
    np.testing.assert_array_equal(means.numpy(), [dbeta / (n * s), wanted[1] * (dgamma / (n * s))])


special = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-310, 6e-8, 65504.0, 3e38, float("nan"), float("inf"), float("-inf")])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(
        Call,
        st.tuples(st.integers(1, 40), st.integers(1, 9), st.sampled_from([1, 1, 2, 3, 7, 49, 257, 2049])).filter(
            lambda shape: shape[0] * shape[2] > 1 and shape[0] * shape[1] * shape[2] < 40000
        ),
        st.sampled_from(TYPES),
        eps=st.sampled_from([1e-300, 1e-12, 1e-5, 1e-3]),
        old=st.none() | st.floats(0, 0.999),
        unbiased=st.booleans(),
        use_batch=st.booleans(),
        update=st.booleans(),
        rectify=st.booleans(),
        affine=st.booleans(),
        batches=st.integers(0, 10**6),
        scale=st.sampled_from([1e-40, 1e-6, 1.0, 100.0]),
        shift=st.sampled_from([0.0, 1.0, -1e4]),
        special=st.lists(special, max_size=5).map(tuple),
        seed=st.integers(0, 10**6),
    )
)
def test_random_cases(call: Call) -> None:
    same(call)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_results_are_rounded_once(dtype: str) -> None:
    """Ties, and the adjacent float64: conversion through another type would round some of them twice."""
    values = ties(dtype)
    saved = torch.stack([torch.from_numpy(-values), torch.ones(len(values), dtype=torch.float64)])
    x = torch.zeros((1, len(values), 1), dtype=getattr(torch, dtype))
    y = torch.empty_like(x)
    triton_kernel.run_normalise(x, y, None, None, saved)
    got = y.to(torch.float64).flatten().numpy()
    np.testing.assert_array_equal(got, rounded(values, dtype))


def arguments() -> dict[str, Any]:
    x, _, gamma, beta, mean, var = data(Call((4, 3, 2), "float32"))
    saved = torch.empty((2, 3), dtype=torch.float64)
    tensors = {"x": x, "y": torch.empty_like(x), "gamma": gamma, "beta": beta, "moving_mean": mean, "moving_var": var}
    numbers = {"eps": 1e-5, "old": 0.9, "unbiased": True, "use_batch": True, "update": True}
    return {**tensors, "saved": saved, **numbers}


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            {"x": torch.zeros((4, 3, 2), dtype=torch.int32)},
            TypeError,
            "expected x of type torch.float16, torch.bfloat16, torch.float32, torch.float64, got torch.int32 (BN-10). "
            "Convert it to float32 first.",
        ),
        (
            {"x": torch.zeros((4, 2, 3)).transpose(1, 2)},
            ValueError,
            "expected x of shape (N, C, S), contiguous, got shape (4, 3, 2), strides (6, 1, 3). Reshape it; channels-last memory "
            "is (N*S, C, 1).",
        ),
        (
            {"gamma": torch.zeros(3, dtype=torch.float64)},
            TypeError,
            "expected gamma of type torch.float32, got torch.float64 (BN-10). Convert it.",
        ),
        ({"beta": torch.zeros(2)}, ValueError, "expected beta of shape (3,), contiguous, got shape (2,), strides (1,) (BN-01)."),
        (
            {"moving_mean": torch.zeros(3, device="meta")},
            RuntimeError,
            "expected moving_mean on cpu, where x is, got it on meta. Move one of them.",
        ),
        (
            {"x": torch.zeros((4, 3, 2), device="meta")},
            RuntimeError,
            "the Triton kernel takes tensors on cpu, since TRITON_INTERPRET=1 is set, got x on meta. Move the tensors.",
        ),
        (
            {"moving_var": None},
            ValueError,
            "moving_mean and moving_var are needed to normalise with or to update, got None. Give both.",
        ),
        (
            {"old": None},
            ValueError,
            "batches is needed where old is None, for the equal-weight average (BN-05), got None. Give the counter.",
        ),
    ],
)
def test_refuses(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    given_ = arguments() | wrong
    with pytest.raises(kind) as raised:
        triton_kernel.run_forward(**given_)
    assert str(raised.value) == message
    mean, var = arguments()["moving_mean"], arguments()["moving_var"]
    assert given_["moving_mean"] is None or given_["moving_mean"].is_meta or torch.equal(given_["moving_mean"], mean)
    assert given_["moving_var"] is None or torch.equal(given_["moving_var"], var)
