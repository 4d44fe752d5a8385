"""``swap``: the same net, computed by our blocks."""

from __future__ import annotations

import doctest
import re
import sys
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mxnet", reason="MXNet is not installed")

import multibn_mxnet
from multibn import BatchNormSpec, reference
from multibn_mxnet import swap, unswap

nn = mx.gluon.nn


class Net(mx.gluon.HybridBlock):  # type: ignore[misc,name-defined]
    """A block in an attribute that a container shares, one in the container, and one with a ReLU."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        with self.name_scope():
            self.bn = nn.BatchNorm()
            self.body = nn.HybridSequential()
            self.body.add(nn.Conv2D(4, 1), nn.BatchNorm(momentum=0.5, epsilon=1e-3), self.bn, nn.BatchNormReLU(center=False))

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.body(self.bn(x))


def test_everything_stays_but_the_class() -> None:
    net = Net(prefix="net_")
    net.initialize()
    net.hybridize(static_alloc=True)
    x = mx.nd.random.normal(shape=(4, 4, 3, 3))
    net(x).wait_to_read()  # traced with Gluon's operators
    parameters, bn = list(net.collect_params().items()), net.bn
    assert swap(net) == [net.bn.name, net.body[1].name, net.body[3].name]
    assert swap(net) == []
    assert net.bn is bn
    assert net.body[2] is bn
    assert type(bn) is multibn_mxnet.GluonBatchNorm
    assert isinstance(bn, nn.BatchNorm)
    assert type(net.body[3]) is multibn_mxnet.GluonBatchNormReLU
    assert bn._active
    now = list(net.collect_params().items())
    assert [name for name, _ in now] == [name for name, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(now, parameters, strict=True))
    assert net.body[1].spec.eps == 1e-3
    assert net.body[1].spec.momentum == 0.5
    assert net.body[3].spec.center is False
    with mx.autograd.record():
        y = net(x)
    y.wait_to_read()  # no backward: ours update in forward
    assert np.abs(net.body[1].running_mean.data().asnumpy()).min() > 0


def test_a_single_block_gives_the_bits_of_the_reference() -> None:
    block = nn.BatchNorm(prefix="it_", in_channels=3)
    block.initialize()
    assert swap(block) == ["it"]
    assert type(block) is multibn_mxnet.GluonBatchNorm
    x, ones, zeros = np.arange(12, dtype="f").reshape(4, 3), np.ones(3, "f"), np.zeros(3, "f")
    with mx.autograd.record():
        y = block(mx.nd.array(x))
    done = reference.forward(x, ones, zeros, zeros, ones, BatchNormSpec(), True)
    np.testing.assert_array_equal(y.asnumpy(), done.y)
    np.testing.assert_array_equal(block.running_var.data().asnumpy(), done.moving_var)


def test_what_the_specification_refuses_is_named_and_nothing_swapped() -> None:
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(), nn.BatchNorm(epsilon=0, prefix="second_"))
    with pytest.raises(ValueError, match=re.escape("second: eps must be a finite number > 0, got 0 (BN-03).")):
        swap(net)
    assert type(net[0]) is nn.BatchNorm


def test_plain_blocks_are_searched_too() -> None:
    net = nn.Sequential()
    net.add(nn.BatchNorm())
    assert len(swap(net)) == 1


def test_subclasses_are_left_alone() -> None:
    block = mx.gluon.contrib.nn.SyncBatchNorm(num_devices=1, prefix="it_")
    message = (
        "swap leaves these blocks as they are: it (SyncBatchNorm, a subclass of gluon.nn.BatchNorm, may compute something else)."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        assert swap(block) == []
    assert type(block) is mx.gluon.contrib.nn.SyncBatchNorm


def test_a_fixed_graph_is_named_with_its_operator() -> None:
    x = mx.sym.var("data")
    with pytest.warns(UserWarning, match="Cannot decide type for the following arguments"):  # MXNet's own
        graph, other = (mx.gluon.SymbolBlock(make(x), x) for make in (mx.sym.BatchNorm, mx.sym.relu))
    message = f"swap leaves these blocks as they are: {graph.name} (SymbolBlock, a fixed graph with the operator BatchNorm)."
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        assert swap(graph) == []
    assert swap(other) == []


@pytest.mark.parametrize("hybrid", [False, True])
def test_unswap_gives_the_very_objects_back(hybrid: bool) -> None:
    net = Net(prefix="net_")
    net.initialize()
    net.hybridize(hybrid)
    x = mx.nd.random.normal(shape=(4, 4, 3, 3))
    own = net(x).asnumpy()
    blocks = [net.bn, net.body[1], net.body[3]]
    kinds = [type(block) for block in blocks]
    attributes = [set(vars(block)) for block in blocks]
    parameters = list(net.collect_params().items())
    names = swap(net, implementation="kernel")
    net(x).wait_to_read()
    assert unswap(net) == names
    assert unswap(net) == []
    assert [net.bn, net.body[1], net.body[3]] == blocks
    assert [type(block) for block in blocks] == kinds
    assert [set(vars(block)) for block in blocks] == attributes
    now = list(net.collect_params().items())
    assert [name for name, _ in now] == [name for name, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(now, parameters, strict=True))
    np.testing.assert_array_equal(net(x).asnumpy(), own)
    with mx.autograd.record():
        net(x).wait_to_read()
    assert np.abs(net.body[1].running_mean.data().asnumpy()).max() == 0  # Gluon's own updates in backward


def test_unswap_of_what_was_built_as_ours() -> None:
    block = multibn_mxnet.GluonBatchNorm(in_channels=3, init="identity", implementation="framework", prefix="it_")
    block.initialize()
    assert unswap(block) == ["it"]
    assert set(vars(block)) == set(vars(nn.BatchNorm(in_channels=3)))
    assert unswap(multibn_mxnet.BatchNorm(3, 4)) == []


def test_the_example_of_the_docstring() -> None:
    assert doctest.testmod(sys.modules["multibn_mxnet.swap"]) == (0, 6)
