"""The Gluon blocks: the same bits as the reference in every mode of MXNet, and Gluon's conventions."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")

from gluon_arrays import array
from gluon_arrays import numpy_mode as numpy_mode

import multibn_mxnet
from multibn import BatchNormSpec, reference
from multibn.kernel import run_backward, run_forward
from multibn.layer.types import Array
from multibn_mxnet.compat import ADD, NULL
from multibn_mxnet.operator import by_kernel

WAYS: dict[str, dict[str, bool] | None] = {
    "imperative": None,
    "hybridized": {},
    "static_alloc": {"static_alloc": True},
    "static_shape": {"static_alloc": True, "static_shape": True},
}
SPECS = [
    BatchNormSpec.article(),
    BatchNormSpec(momentum=None, moving_variance="unbiased"),
    BatchNormSpec(momentum=0.0),
    BatchNormSpec(scale=False),
    BatchNormSpec(center=False),
    BatchNormSpec(scale=False, center=False, momentum=None),
    BatchNormSpec(normalize_with="moving"),
    BatchNormSpec(update_statistics=False),
    BatchNormSpec(learn_affine=False),
]
NATIVE, THREADED = (6, 3, 5, 2), (16, 4, 26, 26)  # done natively, and by threads


def random(*shape: int, seed: int = 0, dtype: str = "float32") -> Array:
    return np.random.RandomState(seed).normal(1, 2, shape).astype(dtype)


def train(block: Any, x: Array, dy: Array) -> tuple[Array, Array]:
    """Return y and dx of one step."""
    given: Any = array(x)
    given.attach_grad()
    with mx.autograd.record():
        y = block(given)
    y.backward(array(dy))
    return y.asnumpy(), given.grad.asnumpy()


def expect(
    spec: BatchNormSpec, steps: int, shape: tuple[int, ...], dtype: str = "float32", axis: int = 1
) -> tuple[reference.Forward, reference.Backward]:
    """Return the last of this many training steps on ``random``, from the initial state."""
    kind = "float64" if dtype == "float64" else "float32"
    channels = shape[axis]
    mean, var, ones, zeros = (f(channels, kind) for f in (np.zeros, np.ones, np.ones, np.zeros))
    for step in range(steps):
        x, dy = random(*shape, seed=step, dtype=dtype), random(*shape, seed=100 + step, dtype=dtype)
        done = reference.forward(x, ones, zeros, mean, var, spec, True, axis, step)
        mean, var = done.moving_mean, done.moving_var
    return done, reference.backward(dy, done.saved)


def gradient(block: Any, name: str) -> Array | None:
    parameter = getattr(block, name, None)
    return None if parameter is None or parameter.grad_req == "null" else parameter.grad().asnumpy()


def same(a: Array | None, b: Array | None) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [NATIVE, THREADED], ids=["small", "large"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_way_gives_the_bits_of_the_reference(
    spec: BatchNormSpec, way: str, shape: tuple[int, ...], numpy_mode: bool
) -> None:
    block = multibn_mxnet.BatchNorm(shape[1], 4, spec)
    block.initialize()
    if (options := WAYS[way]) is not None:
        block.hybridize(**options)
    for step in range(3):
        y, dx = train(block, random(*shape, seed=step), random(*shape, seed=100 + step))
    done, gradients = expect(spec, 3, shape)
    same(y, done.y)
    same(dx, gradients.dx)
    same(gradient(block, "gamma"), gradients.dgamma)
    same(gradient(block, "beta"), gradients.dbeta)
    same(block.moving_mean.data().asnumpy(), done.moving_mean)
    same(block.moving_var.data().asnumpy(), done.moving_var)
    x = random(*shape, seed=7)
    ones, zeros = np.ones(shape[1], "f"), np.zeros(shape[1], "f")
    inferred = reference.forward(x, ones, zeros, done.moving_mean, done.moving_var, spec, False)
    same(block(array(x)).asnumpy(), inferred.y)
    same(block.moving_mean.data().asnumpy(), done.moving_mean)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), NATIVE, (2, 3, 4, 2, 2), THREADED], ids=str)
def test_types_and_ranks(shape: tuple[int, ...], dtype: str) -> None:
    block = multibn_mxnet.BatchNorm(shape[1], len(shape))
    block.initialize()
    block.cast(dtype)
    y, dx = train(block, random(*shape, dtype=dtype), random(*shape, seed=100, dtype=dtype))
    done, gradients = expect(BatchNormSpec(), 1, shape, dtype)
    same(y, done.y)
    same(dx, gradients.dx)
    same(gradient(block, "gamma"), gradients.dgamma)
    same(block.running_var.data().asnumpy(), done.moving_var)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("hybrid", [False, True])
def test_gluon_takes_any_axis_and_defers(axis: int, hybrid: bool, numpy_mode: bool) -> None:
    block = multibn_mxnet.GluonBatchNorm(axis=axis)
    block.initialize()
    if hybrid:
        block.hybridize()
    y, dx = train(block, random(6, 4, 5), random(6, 4, 5, seed=100))
    done, gradients = expect(BatchNormSpec(), 1, (6, 4, 5), axis=axis)
    same(y, done.y)
    same(dx, gradients.dx)
    same(block.running_var.data().asnumpy(), done.moving_var)


@pytest.mark.parametrize("way", WAYS)
def test_inside_a_parent_it_defers_and_trains(way: str, numpy_mode: bool) -> None:
    net = mx.gluon.nn.HybridSequential()
    net.add(
        mx.gluon.nn.HybridLambda(lambda F, x: x * 1), multibn_mxnet.GluonBatchNorm(), mx.gluon.nn.HybridLambda(lambda F, x: x * 1)
    )
    net.initialize()
    if (options := WAYS[way]) is not None:
        net.hybridize(**options)
    for step in range(2):
        y, dx = train(net, random(*NATIVE, seed=step), random(*NATIVE, seed=100 + step))
    done, gradients = expect(BatchNormSpec(), 2, NATIVE)
    same(y, done.y)
    same(dx, gradients.dx)
    same(net[1].running_mean.data().asnumpy(), done.moving_mean)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("shape", [NATIVE, THREADED], ids=["small", "large"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_grad_req_write_add_null(dtype: str, shape: tuple[int, ...], hybrid: bool) -> None:
    requests = ("write", "add", "null")
    x, dy = random(*shape, dtype=dtype), random(*shape, seed=100, dtype=dtype)
    _, once = expect(BatchNormSpec(), 1, shape, dtype)
    for of_x, of_gamma, of_beta in [
        *zip(requests, requests, requests, strict=True),
        ("null", "write", "add"),
        ("add", "null", "write"),
    ]:
        block = multibn_mxnet.BatchNorm(shape[1], 4)
        block.gamma.grad_req, block.beta.grad_req = of_gamma, of_beta
        block.initialize()
        block.cast(dtype)
        if hybrid:
            block.hybridize()
        its_x = array(x)
        its_x.attach_grad(of_x)
        for _ in range(2):
            with mx.autograd.record():
                y = block(its_x)
            if (of_x, of_gamma, of_beta) != ("null", "null", "null"):
                y.backward(array(dy))
        for request, holder, expected in (
            (of_x, its_x, once.dx),
            (of_gamma, block.gamma, once.dgamma),
            (of_beta, block.beta, once.dbeta),
        ):
            if request != "null" and expected is not None:
                its = holder.grad if holder is its_x else holder.grad()
                same(its.asnumpy(), expected + expected if request == "add" else expected)


def test_two_forwards_before_one_backward_and_a_shared_block() -> None:
    for hybrid in (False, True):
        block = multibn_mxnet.BatchNorm(3, 4)
        block.initialize()
        if hybrid:
            block.hybridize(static_alloc=True)
        first, second = array(random(*NATIVE)), array(random(*NATIVE, seed=1))
        first.attach_grad()
        second.attach_grad()
        with mx.autograd.record():
            a = block(first)
            b = block(second)
        for y, seed in (
            (a, 100),
            (b, 101),
            (a, 100),
        ):  # without retain_graph, MXNet forgets the parameters that both graphs share
            y.backward(array(random(*NATIVE, seed=seed)), retain_graph=True)
        done, gradients = expect(BatchNormSpec(), 2, NATIVE)
        same(second.grad.asnumpy(), gradients.dx)
        same(first.grad.asnumpy(), expect(BatchNormSpec(), 1, NATIVE)[1].dx)
        same(block.running_mean.data().asnumpy(), done.moving_mean)  # two forwards, three backwards


def test_a_block_used_twice_in_one_graph_updates_twice() -> None:
    class Twice(mx.gluon.HybridBlock):  # type: ignore[misc,name-defined]
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.block = block

        def hybrid_forward(self, F: Any, x: Any) -> Any:
            return self.block(self.block(x))

    moving = []
    for hybrid in (False, True):
        net = Twice(multibn_mxnet.BatchNorm(3, 4))
        net.initialize()
        if hybrid:
            net.hybridize()
        train(net, random(*NATIVE), random(*NATIVE, seed=100))
        moving.append(net.block.running_mean.data().asnumpy())
    one = expect(BatchNormSpec(), 1, NATIVE)[0]
    zeros, ones = np.zeros(3, "f"), np.ones(3, "f")
    two = reference.forward(one.y, ones, zeros, one.moving_mean, one.moving_var, BatchNormSpec(), True)
    same(moving[0], two.moving_mean)
    same(moving[1], two.moving_mean)


@pytest.mark.parametrize("backward_mode", [False, True])
@pytest.mark.parametrize("implementation", ["kernel", "framework", "composed"])
def test_the_gradient_is_that_of_the_forward_whatever_mode_backward_is_in(backward_mode: bool, implementation: str) -> None:
    x, dy = np.ones((4, 2), "f") * [[1], [2], [3], [4]], np.ones((4, 2), "f")
    for training, expected in ((True, 0.0), (False, 1 / np.sqrt(2))):
        block = multibn_mxnet.BatchNorm(2, 2, BatchNormSpec(eps=1.0), implementation=implementation)
        block.initialize()
        its = array(x.astype("f"))
        its.attach_grad()
        with mx.autograd.record(train_mode=training):
            y = block(its)
        y.backward(array(dy), train_mode=backward_mode)
        same(its.grad.asnumpy(), np.full((4, 2), expected, "f"))


def test_no_update_without_training_mode_and_one_without_recording() -> None:
    block = multibn_mxnet.BatchNorm(3, 4)
    block.initialize()
    with mx.autograd.record(train_mode=False):
        block(array(random(*NATIVE)))
    same(block.running_mean.data().asnumpy(), np.zeros(3, "f"))
    with mx.autograd.train_mode():
        block(array(random(*NATIVE)))
    same(block.running_mean.data().asnumpy(), expect(BatchNormSpec(), 1, NATIVE)[0].moving_mean)


def test_trainer_learns_what_the_gradient_says() -> None:
    block = multibn_mxnet.BatchNorm(3, 4)
    block.initialize()
    trainer = mx.gluon.Trainer(block.collect_params(), "sgd", {"learning_rate": 1.0, "momentum": 0.0})
    train(block, random(*NATIVE), random(*NATIVE, seed=100))
    trainer.step(1)
    gradients = expect(BatchNormSpec(), 1, NATIVE)[1]
    assert gradients.dgamma is not None
    same(block.gamma.data().asnumpy(), np.ones(3, "f") - gradients.dgamma)


def test_scale_and_center_false_count_for_nothing_and_are_not_overwritten(tmp_path: Path) -> None:
    for hybrid in (False, True):
        block = multibn_mxnet.GluonBatchNorm(
            scale=False, center=False, gamma_initializer="zeros", beta_initializer="ones", in_channels=3
        )
        block.initialize()
        if hybrid:
            block.hybridize()
        y, _ = train(block, random(*NATIVE), random(*NATIVE, seed=100))
        same(y, expect(BatchNormSpec(), 1, NATIVE)[0].y)
        same(block.gamma.data().asnumpy(), np.zeros(3, "f"))
        same(block.beta.data().asnumpy(), np.ones(3, "f"))
    assert block.spec == BatchNormSpec(scale=False, center=False)
    block.export(str(tmp_path / "model"))
    with pytest.warns(UserWarning, match="Cannot decide type for the following arguments"):
        loaded = mx.gluon.SymbolBlock.imports(str(tmp_path / "model-symbol.json"), ["data"], str(tmp_path / "model-0000.params"))
    for shape in (NATIVE, (16, 3, 40, 40)):  # there they have gradients
        train(loaded, random(*shape), random(*shape, seed=100))
        for name in ("gamma", "beta"):
            same(loaded.collect_params()[block.prefix + name].grad().asnumpy(), np.zeros(3, "f"))


def test_use_global_stats_leaves_them() -> None:
    block = multibn_mxnet.GluonBatchNorm(use_global_stats=True, in_channels=3)
    block.initialize()
    y, _ = train(block, random(*NATIVE), random(*NATIVE, seed=100))
    same(y, expect(BatchNormSpec(normalize_with="moving"), 1, NATIVE)[0].y)
    same(block.running_mean.data().asnumpy(), np.zeros(3, "f"))


def test_checkpoints_go_both_ways_with_gluon(tmp_path: Path) -> None:
    gluon, ours = mx.gluon.nn.BatchNorm(in_channels=3), multibn_mxnet.GluonBatchNorm(in_channels=3)
    gluon.initialize(mx.init.Uniform())
    for parameter in gluon.collect_params().values():
        parameter.set_data(mx.nd.random.uniform(1, 2, shape=(3,)))
    for a, b in itertools.permutations((gluon, ours, multibn_mxnet.BatchNorm(3, 4)), 2):
        if a is not gluon and a.gamma._data is None:
            a.initialize()
        a.save_parameters(str(tmp_path / "p"))
        b.load_parameters(str(tmp_path / "p"))
        for name in ("gamma", "beta", "running_mean", "running_var"):
            same(getattr(a, name).data().asnumpy(), getattr(b, name).data().asnumpy())


@pytest.mark.parametrize("momentum", [0.9, None])
def test_export_and_import_keep_state_and_training(momentum: float | None, tmp_path: Path, numpy_mode: bool) -> None:
    spec = BatchNormSpec(momentum=momentum)
    block = multibn_mxnet.BatchNorm(3, 4, spec)
    block.initialize()
    block.hybridize()
    train(block, random(*NATIVE), random(*NATIVE, seed=100))
    block.export(str(tmp_path / "model"))
    with pytest.warns(UserWarning, match="Cannot decide type for the following arguments"):  # so it does with Gluon's own
        loaded = mx.gluon.SymbolBlock.imports(str(tmp_path / "model-symbol.json"), ["data"], str(tmp_path / "model-0000.params"))
    y, dx = train(loaded, random(*NATIVE, seed=1), random(*NATIVE, seed=101))
    done, gradients = expect(spec, 2, NATIVE)
    same(y, done.y)
    same(dx, gradients.dx)
    values = {name.split("_", 1)[1]: p.data().asnumpy() for name, p in loaded.collect_params().items()}
    same(values["running_mean"], done.moving_mean)
    assert ("num_batches_tracked" in values) == (momentum is None)
    assert momentum is not None or values["num_batches_tracked"].tolist() == [2]


def test_state_follows_cast_and_context() -> None:
    block = multibn_mxnet.BatchNorm(3, 4, BatchNormSpec(momentum=None))
    block.initialize()
    train(block, random(*NATIVE), random(*NATIVE, seed=100))
    block.cast("float16")
    assert {p.data().dtype for p in block.collect_params().values()} == {np.float32, np.int64}
    block.cast("float64")
    assert {p.data().dtype for p in block.collect_params().values()} == {np.float64, np.int64}
    assert block.num_batches_tracked.data().asnumpy().tolist() == [1]
    block.cast("float32")
    block.collect_params().reset_ctx(mx.cpu(1))
    y = block(array(random(*NATIVE)).as_in_context(mx.cpu(1)))
    assert y.context == mx.cpu(1)


def test_relu_stays_with_the_normalization(numpy_mode: bool) -> None:
    for hybrid in (False, True):
        block = multibn_mxnet.GluonBatchNormReLU(in_channels=3)
        block.initialize()
        if hybrid:
            block.hybridize()
        y, _ = train(block, random(*NATIVE), random(*NATIVE, seed=100))
        same(y, np.maximum(expect(BatchNormSpec(), 1, NATIVE)[0].y, 0))


@pytest.mark.parametrize("implementation", ["kernel", "framework", "composed"])
@pytest.mark.parametrize("hybrid", [False, True])
def test_no_values_no_update(implementation: str, hybrid: bool) -> None:
    with mx.util.np_shape(True):
        block = multibn_mxnet.BatchNorm(3, 4, BatchNormSpec(momentum=None), implementation=implementation)
        block.initialize()
        if hybrid:
            block.hybridize()
        y, dx = train(block, np.zeros((0, 3, 2, 2), "f"), np.zeros((0, 3, 2, 2), "f"))
        assert y.shape == dx.shape == (0, 3, 2, 2)
        same(gradient(block, "gamma"), np.zeros(3, "f"))
        same(gradient(block, "beta"), np.zeros(3, "f"))
        same(block.running_mean.data().asnumpy(), np.zeros(3, "f"))
        assert block.num_batches_tracked.data().asnumpy().tolist() == [0]


@pytest.mark.parametrize("momentum", [0.9, None])
def test_many_channels(momentum: float | None) -> None:
    spec = BatchNormSpec(momentum=momentum)
    block = multibn_mxnet.BatchNorm(1 << 16, 2, spec)
    block.initialize()
    y, _ = train(block, random(2, 1 << 16), random(2, 1 << 16, seed=100))
    same(y, expect(spec, 1, (2, 1 << 16))[0].y)


def test_bfloat16_gives_the_bits_of_the_kernel() -> None:
    x, dy = (mx.nd.amp_cast(array(random(6, 3, seed=seed)), dtype=np.dtype([("bfloat16", np.uint16)])) for seed in (0, 100))
    bits, dy_bits = (by_kernel.view("x", a, "bfloat16", (6, 3, 1)).copy() for a in (x, dy) if a.wait_to_read() is None)
    ones, zeros, mean, var = (f(3, np.float32) for f in (np.ones, np.zeros, np.zeros, np.ones))
    y, dx, saved = np.empty_like(bits), np.empty_like(bits), np.empty((2, 3))
    run_forward(bits, y, ones, zeros, mean, var, saved, 1e-5, 0.9, False, True, True)
    run_backward(bits, dy_bits, dx, ones, saved, np.empty(3, "f"), np.empty(3, "f"), True)
    block = multibn_mxnet.BatchNorm(3, 2)
    block.initialize()
    x.attach_grad("add")
    for _ in range(2):
        with mx.autograd.record():
            its_y = block(x)
        its_y.backward(dy)
    mx.nd.waitall()
    same(by_kernel.view("y", its_y, "bfloat16", (6, 3, 1)), y)
    twice = mx.nd.amp_cast(x.grad, dtype="float32").asnumpy()
    same(twice, 2 * (dx[:, :, 0].astype(np.uint32) << 16).view(np.float32))


def test_an_output_may_be_added_to() -> None:
    x, y, saved = (array(a) for a in (np.array([[-1], [1]], "f"), np.array([[1], [1]], "f"), np.zeros((3, 1))))
    states = [array(np.array([value], "f")) for value in (0, 1)]
    mx.nd.waitall()
    layer = multibn_mxnet.BatchNorm(1, 2, BatchNormSpec(eps=3.0)).layer
    by_kernel.forward(layer, x, {}, states, y, saved, [ADD, NULL], False)
    same(y.asnumpy(), np.array([[0.5], [1.5]], "f"))


def test_callbacks_compile_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import types
    from numba.core.ccallback import CFunc

    from multibn_mxnet.operator import native

    def nowhere(_: CFunc) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(CFunc, "enable_caching", nowhere)
    assert native._callback(types.int32(types.int32), lambda number: number + 1).ctypes(2) == 3


class Slow(mx.operator.CustomOp):  # type: ignore[misc,name-defined]
    def forward(self, is_train: bool, req: Any, in_data: Any, out_data: Any, aux: Any) -> None:
        time.sleep(0.3)
        self.assign(out_data[0], req[0], in_data[0])


@mx.operator.register("multibn_test_slowly")
class SlowProp(mx.operator.CustomOpProp):  # type: ignore[misc,name-defined]
    def create_operator(self, *_: Any) -> Slow:
        return Slow()


def slowly(values: Any) -> Any:
    """Return a copy that is computed asynchronously and takes a while, during which MXNet runs other operators."""
    return mx.nd.Custom(values, op_type="multibn_test_slowly")


@pytest.mark.parametrize("shape", [NATIVE, THREADED], ids=["small", "large"])
def test_x_and_gamma_may_be_overwritten_at_once(shape: tuple[int, ...]) -> None:
    block = multibn_mxnet.BatchNorm(shape[1], 4)
    block.initialize()
    block(array(random(*shape)))  # the first call may take longer than what is slow
    x, late = array(random(*shape)), slowly(array(random(*shape, seed=100)))
    x.attach_grad()
    with mx.autograd.record():
        y = block(x)
    y.backward(late)
    x[:] = 0
    block.gamma.set_data(mx.nd.zeros(shape[1]))
    done, gradients = expect(BatchNormSpec(), 1, shape)
    same(y.asnumpy(), done.y)
    same(x.grad.asnumpy(), gradients.dx)
    same(x.asnumpy(), np.zeros(shape, "f"))


@pytest.mark.parametrize("shape", [NATIVE, THREADED], ids=["small", "large"])
def test_what_is_still_to_be_written_or_read_comes_first(shape: tuple[int, ...]) -> None:
    block = multibn_mxnet.BatchNorm(shape[1], 4)
    block.initialize()
    before = np.full(shape[1], 3, "f")
    block(array(random(*shape)))
    mean = block.running_mean.data()
    mean[:] = slowly(array(before))
    snapshot = slowly(mean)
    train(block, random(*shape), random(*shape, seed=100))
    ones, zeros = np.ones(shape[1], "f"), np.zeros(shape[1], "f")
    done = reference.forward(random(*shape), ones, zeros, before, ones, BatchNormSpec(), True)
    same(snapshot.asnumpy(), before)
    same(mean.asnumpy(), done.moving_mean)


@pytest.mark.parametrize("shape", [NATIVE, THREADED], ids=["small", "large"])
def test_gradients_that_are_asked_for_by_name(shape: tuple[int, ...]) -> None:
    block = multibn_mxnet.BatchNorm(shape[1], 4)
    block.initialize()
    x, dy = array(random(*shape)), array(random(*shape, seed=100))
    x.attach_grad()
    with mx.autograd.record():
        y = block(x)
    same(mx.autograd.grad(y, x, dy)[0].asnumpy(), expect(BatchNormSpec(), 1, shape)[1].dx)
    same(x.asnumpy(), random(*shape))


@pytest.mark.parametrize("shape", [NATIVE, THREADED], ids=["small", "large"])
def test_an_error_of_the_kernel_or_of_x_is_raised_and_leaves_the_state(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no memory")

    block = multibn_mxnet.BatchNorm(shape[1], 4)
    block.initialize()
    with pytest.raises(mx.MXNetError, match="scale parameter in gaussian has to be positive"):
        block(mx.nd.random.normal(0, -1, shape=shape))
    block.cast("float64")  # which Python does
    monkeypatch.setattr(by_kernel, "forward", fail)
    with pytest.raises(MemoryError) as caught, mx.autograd.record():
        block(array(random(*shape)).astype("float64"))
    assert str(caught.value) == "no memory"
    same(block.running_mean.data().asnumpy(), np.zeros(shape[1]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", [8, 40])
def test_between_convolutions_whose_memory_has_a_layout_of_its_own(side: int, way: str) -> None:
    # MXNet frees what it makes of such memory for a Custom operator too early, which shows now and then.
    x, dy, weight = random(8, 16, side, side), random(8, 16, side, side, seed=100), random(16, 16, 3, 3, seed=7) - np.float32(1)
    convolve = {"num_filter": 16, "kernel": (3, 3), "pad": (1, 1), "no_bias": True}
    before = mx.nd.Convolution(array(x), array(weight), **convolve)
    head = array(np.zeros_like(x))
    head.attach_grad()
    with mx.autograd.record():
        last = mx.nd.Convolution(head, array(weight), **convolve)
    last.backward(array(dy))
    ones, zeros = np.ones(16, "f"), np.zeros(16, "f")
    done = reference.forward(before.asnumpy(), ones, zeros, zeros, ones, BatchNormSpec(), True)
    gradients = reference.backward(head.grad.asnumpy(), done.saved)
    for _ in range(10):
        net = mx.gluon.nn.HybridSequential()
        block = multibn_mxnet.GluonBatchNorm(in_channels=16)
        first, second = (mx.gluon.nn.Conv2D(16, 3, padding=1, in_channels=16, use_bias=False) for _ in range(2))
        net.add(first, block, second)
        net.initialize()
        for convolution in (first, second):
            convolution.weight.set_data(array(weight))
        if (options := WAYS[way]) is not None:
            net.hybridize(**options)
        train(net, x, dy)
        same(gradient(block, "gamma"), gradients.dgamma)
        same(gradient(block, "beta"), gradients.dbeta)
        same(block.running_var.data().asnumpy(), done.moving_var)


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_added_to_that_of_a_convolution(way: str) -> None:
    class Fork(mx.gluon.HybridBlock):  # type: ignore[misc,name-defined]
        def __init__(self, block: Any) -> None:
            super().__init__()
            with self.name_scope():
                self.head, self.left, self.right = (
                    mx.gluon.nn.Conv2D(16, 3, padding=1, in_channels=16, use_bias=False) for _ in range(3)
                )
            self.block = block

        def hybrid_forward(self, F: Any, x: Any) -> Any:
            x = self.head(x)
            return self.left(x) + self.block(x) + self.right(x)

    def run(block: Any, way: str) -> tuple[Array, Array]:
        net = Fork(block)
        net.initialize()
        for seed, parameter in enumerate(net.collect_params(".*weight").values()):
            parameter.set_data(array(random(*parameter.shape, seed=seed)))
        if (options := WAYS[way]) is not None:
            net.hybridize(**options)
        return train(net, random(4, 16, 20, 20), random(4, 16, 20, 20, seed=100) - np.float32(1))

    expected = run(multibn_mxnet.BatchNorm(16, 4, implementation="framework"), "imperative")
    for _ in range(3):
        for ours, its in zip(run(multibn_mxnet.GluonBatchNorm(in_channels=16), way), expected, strict=True):
            np.testing.assert_allclose(ours, its, rtol=0, atol=1e-5 * np.abs(its).max())


def test_text() -> None:
    spec = BatchNormSpec(eps=1e-12, scale=False)
    assert repr(multibn_mxnet.BatchNorm(3, 4, spec)) == "BatchNorm(3, 4, eps=1e-12, momentum=0.9, scale=False)"
    assert repr(multibn_mxnet.GluonBatchNorm()).startswith("GluonBatchNorm(axis=1, eps=1e-05, momentum=0.9")


@pytest.mark.parametrize("request_", ["write", "add"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("implementation", "hybrid"), [("framework", False), ("framework", True), ("composed", False)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_frameworks_operators_where_nothing_rounds(
    spec: BatchNormSpec, implementation: str, hybrid: bool, dtype: str, request_: str
) -> None:
    # Mean 0 and variance 1 with eps 3 make 1/sqrt(var+eps) 1/2; halves and few integers are exact in every type.
    spec = replace(spec, eps=3.0, momentum=None if spec.momentum is None else 0.5, moving_variance="biased")
    kind = "float64" if dtype == "float64" else "float32"
    x = np.array([-1, 1], dtype).repeat(16).reshape(8, 2, 2).transpose(2, 1, 0).copy()
    x[1] = -x[0]
    dy = np.arange(x.size, dtype=dtype).reshape(x.shape)
    mean, var, ones, zeros = (f(2, kind) for f in (np.zeros, np.ones, np.ones, np.zeros))
    block = multibn_mxnet.BatchNorm(2, 3, spec, implementation=implementation)
    for name in ("gamma", "beta"):
        if hasattr(block, name) and spec.learn_affine:
            getattr(block, name).grad_req = request_
    block.initialize()
    block.cast(dtype)
    if hybrid:
        block.hybridize()
    its = array(x)
    its.attach_grad(request_)
    for step in range(2):
        done = reference.forward(x, ones, zeros, mean, var, spec, True, batches=step)
        mean, var = done.moving_mean, done.moving_var
        with mx.autograd.record():
            y = block(its)
        y.backward(array(dy))
    once, times = reference.backward(dy, done.saved), 2 if request_ == "add" else 1
    same(y.asnumpy(), done.y)
    same(its.grad.asnumpy(), (once.dx * times).astype(dtype))
    same(gradient(block, "gamma"), None if once.dgamma is None else times * once.dgamma)
    same(gradient(block, "beta"), None if once.dbeta is None else times * once.dbeta)
    same(block.running_mean.data().asnumpy(), mean)
    same(block.running_var.data().asnumpy(), var)
    same(block(its).asnumpy(), reference.forward(x, ones, zeros, mean, var, spec, False).y)


@pytest.mark.filterwarnings("ignore::multibn.layer.PoisonedBatch")
@pytest.mark.parametrize("implementation", ["kernel", "framework", "composed"])
def test_what_is_not_finite_stays_in_its_channel(implementation: str) -> None:
    block = multibn_mxnet.BatchNorm(3, 2, implementation=implementation)
    block.initialize()
    x = random(8, 3)
    x[0, 1], x[0, 2] = np.inf, np.nan
    y, dx = train(block, x, random(8, 3, seed=100))
    assert np.isfinite(y).all(axis=0).tolist() == [True, False, False]
    assert np.isfinite(dx).all(axis=0).tolist() == [True, False, False]
    assert block.running_mean.data().asnumpy()[1:].tolist() == [0, 0]
    assert block.running_var.data().asnumpy()[1:].tolist() == [1, 1]
    assert block.running_mean.data().asnumpy()[0] != 0


def test_a_forked_child_gives_the_same_bits() -> None:
    block = multibn_mxnet.BatchNorm(4, 4)
    block.initialize()
    steps = [(random(*shape), random(*shape, seed=100)) for shape in ((6, 4, 5, 2), THREADED)]
    expected = [train(block, *step) for step in steps]
    child = os.fork()
    if child == 0:  # pragma: no cover - in the child
        equal = all(
            np.array_equal(a, b)
            for step, pair in zip(steps, expected, strict=True)
            for a, b in zip(train(block, *step), pair, strict=True)
        )
        os._exit(0 if equal else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif("MXNET_ENGINE_TYPE" in os.environ, reason="is what this test runs")
def test_all_of_it_with_the_engine_that_runs_operators_at_the_call() -> None:
    # It has no threads of its own, so coverage sees the callbacks too.
    others = (
        "test_mxnet_refusals.py",
        "test_identity.py::test_gluon_in_every_way_that_mxnet_runs_a_block",
        "test_whitening_frameworks.py::test_every_home_gives_the_same",
    )
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in others)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env={**os.environ, "MXNET_ENGINE_TYPE": "NaiveEngine"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
