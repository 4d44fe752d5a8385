"""Every network of Gluon's model zoo that has BatchNorm trains and infers after ``swap`` as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")

from mxnet.gluon.model_zoo import vision

import multibn_mxnet
from multibn.layer.types import Array

NAMES = [
    *(f"resnet{depth}_v{version}" for version in (1, 2) for depth in (18, 34, 50, 101, 152)),
    *(f"vgg{depth}_bn" for depth in (11, 13, 16, 19)),
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"mobilenet{width}" for width in ("1_0", "0_75", "0_5", "0_25")),
    *(f"mobilenet_v2_{width}" for width in ("1_0", "0_75", "0_5", "0_25")),
    "inception_v3",
]
WITHOUT = {"alexnet", "squeezenet1_0", "squeezenet1_1", *(f"vgg{depth}" for depth in (11, 13, 16, 19))}
ONE_OF_EACH_KIND = ["resnet18_v2", "densenet121", "mobilenet_v2_0_25"]


def test_these_are_all_there_are() -> None:
    its = {name for name, make in vars(vision).items() if name[0].islower() and callable(make) and getattr(make, "__doc__", None)}
    helpers = {"get_model", "get_resnet", "get_vgg", "get_mobilenet", "get_mobilenet_v2"}
    assert its - helpers - WITHOUT == set(NAMES)


def network(name: str, dtype: str = "float32") -> Any:
    """Make a network of the zoo with fixed weights, adapted to small images and few classes."""
    net = getattr(vision, name)(classes=4)
    blocks = net.features._children
    for key, block in list(blocks.items()):
        if isinstance(block, mx.gluon.nn.AvgPool2D) and int(key) > len(blocks) - 4:
            blocks[key] = mx.gluon.nn.GlobalAvgPool2D()
        elif isinstance(block, mx.gluon.nn.Dense):  # of VGG: 4096 units
            blocks[key] = mx.gluon.nn.Dense(32, activation="relu")
    mx.random.seed(7)
    net.initialize(mx.init.Xavier())
    net.cast(dtype)
    return net


def images(name: str, dtype: str = "float32", seed: int = 0) -> Array:
    side = 75 if name == "inception_v3" else 32
    return np.random.RandomState(seed).normal(0, 1, (4, 3, side, side)).astype(dtype)


def array(values: Array) -> Any:
    make = mx.np.array if mx.util.is_np_array() else mx.nd.array
    return make(values, dtype=values.dtype)


def step(net: Any, name: str, dtype: str = "float32") -> dict[str, Array]:
    """Return all results of a training step and an inference."""
    x = array(images(name, dtype))
    x.attach_grad()
    mx.random.seed(3)
    with mx.autograd.record():
        y = net(x)
        loss = (y * array(np.arange(16, dtype=dtype).reshape(4, 4))).sum()
    loss.backward()
    its = {"y": y, "dx": x.grad}
    for key, parameter in net._collect_params_with_prefix().items():
        if parameter.grad_req != "null":
            its["d " + key] = parameter.grad()
        elif "running" in key:
            its[key] = parameter.data()
    its["inferred"] = net(array(images(name, dtype, seed=1)))
    return {key: value.asnumpy() for key, value in its.items()}


def swap_all(net: Any) -> None:
    swapped = multibn_mxnet.swap(net)
    blocks: list[Any] = []
    net.apply(blocks.append)
    its = [block for block in blocks if isinstance(block, mx.gluon.nn.BatchNorm)]
    assert len(swapped) == len(its) > 7
    assert all(isinstance(block, multibn_mxnet.GluonBatchNorm) for block in its)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_swaps_infers_and_trains(name: str) -> None:
    net, x = network(name), array(images(name)[:2])
    own = net(x).asnumpy()
    swap_all(net)
    np.testing.assert_allclose(net(x).asnumpy(), own, rtol=0, atol=1e-5 * np.abs(own).max())
    net.hybridize()
    before = {key: p.data().asnumpy() for key, p in net.collect_params(".*running_var").items()}
    with mx.autograd.record():
        y = net(x)
    y.backward()
    assert np.isfinite(y.asnumpy()).all()
    for key, parameter in net.collect_params(".*running_var").items():
        assert (parameter.data().asnumpy() != before[key]).any(), key
    learned = [p for p in net.collect_params(".*(gamma|beta)").values() if p.grad_req != "null"]
    assert all(np.isfinite(p.grad().asnumpy()).all() for p in learned)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_a_step_after_swap_is_the_step_before(name: str) -> None:
    # In float64: in float32 a step of a deep network on a few images is chaos, with MXNet's own BatchNorm off by many ulp.
    net = network(name, "float64")
    net(array(images(name, "float64")))
    state = {key: p.data().copy() for key, p in net._collect_params_with_prefix().items()}
    own = step(net, name, "float64")
    swap_all(net)
    for hybrid in (False, True):
        for key, parameter in net._collect_params_with_prefix().items():
            parameter.set_data(state[key])
        net.hybridize(hybrid)
        for key, value in step(net, name, "float64").items():
            if np.abs(own[key]).max() > 1e-6:  # what is 0 but for rounding says nothing
                np.testing.assert_allclose(value, own[key], rtol=0, atol=1e-6 * np.abs(own[key]).max(), err_msg=key)


@pytest.mark.parametrize("name", ["resnet18_v2", "mobilenet_v2_0_25"])
def test_exported_imported_and_in_a_module(name: str, tmp_path: Path) -> None:
    net = network(name)
    x, more = array(images(name)), array(images(name, seed=1))
    net(x)
    swap_all(net)
    net.hybridize()
    with mx.autograd.record():
        y = net(x)
    y.backward()
    expected = net(more).asnumpy()
    net.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params")
    with pytest.warns(UserWarning, match="Cannot decide type for the following arguments"):  # so it does with Gluon's own
        loaded = mx.gluon.SymbolBlock.imports(files[0], ["data"], files[1])
    np.testing.assert_array_equal(loaded(more).asnumpy(), expected)

    symbol, arguments, states = mx.model.load_checkpoint(str(tmp_path / "net"), 0)
    module = mx.mod.Module(symbol, data_names=["data"], label_names=None, context=mx.cpu())
    module.bind([("data", x.shape)], for_training=True)
    module.set_params(arguments, states)
    module.forward(mx.io.DataBatch([more]), is_train=False)
    np.testing.assert_array_equal(module.get_outputs()[0].asnumpy(), expected)
    with mx.autograd.record():
        y = loaded(x)
    y.backward()
    module.forward(mx.io.DataBatch([x]), is_train=True)
    module.backward([mx.nd.ones_like(y)])
    module.init_optimizer(optimizer_params={"learning_rate": 0.0})
    module.update()
    np.testing.assert_array_equal(module.get_outputs()[0].asnumpy(), y.asnumpy())
    _, trained = module.get_params()
    for key, parameter in loaded.collect_params(".*running").items():
        np.testing.assert_array_equal(trained[key].asnumpy(), parameter.data().asnumpy())
        assert (trained[key].asnumpy() != states[key].asnumpy()).any()


def test_under_numpy_semantics() -> None:
    x = images("resnet18_v2")
    mx.npx.set_np()
    try:
        net = network("resnet18_v2")
        own = net(array(x)).asnumpy()
        swap_all(net)
        for hybrid in (False, True):
            net.hybridize(hybrid)
            np.testing.assert_allclose(net(array(x)).asnumpy(), own, rtol=0, atol=1e-5 * np.abs(own).max())
        assert np.isfinite(step(net, "resnet18_v2")["dx"]).all()
    finally:
        mx.npx.reset_np()


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_batch_that_is_split_over_contexts(hybrid: bool) -> None:
    contexts = [mx.cpu(0), mx.cpu(1)]
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Conv2D(4, 3, in_channels=3), mx.gluon.nn.BatchNorm(in_channels=4), mx.gluon.nn.Dense(2))
    net.initialize(ctx=contexts)
    multibn_mxnet.swap(net)
    net.hybridize(hybrid)
    trainer = mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
    parts = mx.gluon.utils.split_and_load(images("small"), contexts)
    with mx.autograd.record():
        losses = [net(part).square().sum() for part in parts]
    mx.autograd.backward(losses)
    means = [net[1].running_mean.data(context).asnumpy() for context in contexts]
    assert (means[0] != means[1]).any()  # each context has statistics of its own, as with Gluon's own
    assert (means[0] != 0).all()
    assert (means[1] != 0).all()
    trainer.step(4)
    gammas = [net[1].gamma.data(context).asnumpy() for context in contexts]
    np.testing.assert_array_equal(gammas[0], gammas[1])
    assert (gammas[0] != 1).all()
