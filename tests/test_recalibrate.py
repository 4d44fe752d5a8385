"""``recalibrate``: exact statistics of the whole data, whatever the batches; nothing else changes, nothing at all on error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from multibn import BatchNormSpec
from multibn.layer.types import Array
from multibn.recalibration import WholeData

X = np.random.default_rng(0).normal(1, 2, (23, 2, 6, 5)).astype(np.float32)
CUTS = {"whole": [23], "sevens": [7, 7, 7, 2], "uneven": [1, 13, 1, 3, 5]}


def cut(x: Array, sizes: list[int], backwards: bool = False) -> list[Array]:
    order = np.arange(len(x))[:: -1 if backwards else 1]
    return [x[part] for part in np.split(order, np.cumsum(sizes)[:-1])]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_sums_are_exact(dtype: str) -> None:
    draw = np.random.default_rng(1)
    wide = 3 if dtype == "float16" else 30
    x = (draw.normal(3, 2, (40, 3, 5)) * 10.0 ** draw.integers(-wide, wide // 2, (40, 3, 5))).astype(dtype)
    x[:, 2] = np.finfo(dtype).smallest_subnormal
    data = WholeData(3)
    for part in np.split(x, [1, 7, 30]):
        data.add(part)
    for unbiased in (False, True):
        mean, var = data.statistics(unbiased)
        for c in range(3):
            values = [Fraction(float(v)) for v in x[:, c].ravel()]
            exact = sum(values) / len(values)
            assert mean[c] == float(exact)
            assert var[c] == float(sum((v - exact) ** 2 for v in values) / (len(values) - unbiased))


def test_they_are_what_chans_merge_gives() -> None:
    count, mean, squares = 0, 0.0, 0.0
    data = WholeData(1)
    for part in cut(X[:, :1].astype(np.float64), CUTS["uneven"]):
        data.add(part)
        shift, total = part.mean() - mean, count + part.size
        squares += part.var() * part.size + shift**2 * count * part.size / total
        mean += shift * part.size / total
        count = total
    np.testing.assert_allclose(np.ravel(data.statistics(False)), [mean, squares / count], rtol=1e-13)


def test_a_large_batch_is_exact() -> None:
    """More values than one float64 sum of products holds."""
    value = float(np.nextafter(2.0, 1.0))
    x = np.full((1 << 18, 1), value)
    data = WholeData(1)
    data.add(x)
    data.add(np.full((1, 1), 3.0))
    m, total = len(x) + 1, len(x) * Fraction(value) + 3
    assert data.statistics(False)[0][0] == float(total / m)
    assert data.statistics(False)[1][0] == float((len(x) * Fraction(value) ** 2 + 9) / m - (total / m) ** 2)


def test_what_is_not_finite_keeps_its_old_statistics() -> None:
    x = X.copy()
    x[3, 1, 0, 0] = np.nan
    data = WholeData(2)
    data.add(x)
    mean, var = data.settle(np.full(2, 5, np.float32), np.full(2, 6, np.float32), True)
    assert (mean[1], var[1]) == (5, 6)
    assert mean[0] == np.float32(X[:, 0].astype(np.float64).mean())
    huge = WholeData(2)
    huge.add(np.array([[1e300, 1], [-1e300, 2]]))
    assert huge.statistics(False)[1].tolist() == [float("inf"), 0.25]
    with pytest.raises(ValueError) as caught:
        WholeData(2).statistics(False)
    assert str(caught.value) == (
        "the statistics of the whole data need more than 1 value per channel, got 0 (BN-12). Give more data."
    )


class Home:
    """What these tests need of a framework: a net with three BatchNorms, one of them the framework's own."""

    name: str
    recalibrate: Callable[..., list[str]]

    def statistics(self, net: Any) -> list[Array]:
        raise NotImplementedError


class Torch(Home):
    name = "torch"

    def __init__(self) -> None:
        self.torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")
        import multibn_torch

        self.layers, self.recalibrate = multibn_torch, multibn_torch.recalibrate

    def net(self) -> Any:
        nn = self.torch.nn
        self.torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3),
            self.layers.BatchNorm2d(4, momentum=None),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5),
            nn.Flatten(),
            nn.Linear(10, 6),
            self.layers.BatchNorm(6, 2, BatchNormSpec()),
        )

    def arrays(self, parts: list[Array]) -> list[Any]:
        return [self.torch.from_numpy(part) for part in parts]

    def statistics(self, net: Any) -> list[Array]:
        return [t.clone().numpy() for i in (1, 5, 8) for t in (net[i].running_mean, net[i].running_var)]

    def rest(self, net: Any) -> Any:
        modes = [module.training for module in net.modules()]
        hooks = [len(module._forward_pre_hooks) for module in net.modules()]
        return modes, hooks, [(k, v.tolist()) for k, v in net.state_dict().items() if "running" not in k]

    def seen(self, net: Any, which: int) -> Array:
        with self.torch.no_grad():
            return net.eval()[: (1, 5, 8)[which]](self.torch.from_numpy(X)).numpy()  # type: ignore[no-any-return]

    def train(self, net: Any) -> None:
        net.train()
        net[1].eval()
        net(self.torch.from_numpy(X[:5]))


class Gluon(Home):
    name = "mxnet"
    hybrid = False

    def __init__(self) -> None:
        self.mx: Any = pytest.importorskip("mxnet", reason="MXNet is not installed")
        import multibn_mxnet

        self.layers, self.recalibrate = multibn_mxnet, multibn_mxnet.recalibrate

    def net(self) -> Any:
        nn = self.mx.gluon.nn
        self.mx.random.seed(0)
        net = nn.HybridSequential(prefix="net_")
        with net.name_scope():
            net.add(nn.Conv2D(4, 3, in_channels=2), self.layers.BatchNorm(4, 4, BatchNormSpec(moving_variance="unbiased")))
            net.add(nn.Activation("relu"), nn.Dropout(0.5), nn.Conv2D(5, 3, in_channels=4), nn.BatchNorm(in_channels=5))
            net.add(nn.Flatten(), nn.Dense(6, in_units=10), self.layers.GluonBatchNorm(in_channels=6))
        net.initialize(self.mx.init.Normal(0.3))
        if self.hybrid:
            net.hybridize(static_alloc=True)
        return net

    def arrays(self, parts: list[Array]) -> list[Any]:
        return [self.mx.nd.array(part) for part in parts]

    def statistics(self, net: Any) -> list[Array]:
        return [p.data().asnumpy() for i in (1, 5, 8) for p in (net[i].running_mean, net[i].running_var)]

    def rest(self, net: Any) -> Any:
        blocks = [net, *net._children.values()]
        hooks = [(block._active, len(block._forward_pre_hooks)) for block in blocks]
        return hooks, [(k, p.data().asnumpy().tolist()) for k, p in net.collect_params().items() if "running" not in k]

    def seen(self, net: Any, which: int) -> Array:
        x = self.mx.nd.array(X)
        for block in list(net._children.values())[: (1, 5, 8)[which]]:
            x = block(x)
        return x.asnumpy()  # type: ignore[no-any-return]

    def train(self, net: Any) -> None:
        with self.mx.autograd.record():
            net(self.mx.nd.array(X[:5])).backward()


class Hybridized(Gluon):
    hybrid = True


@pytest.fixture(params=[Torch, Gluon, Hybridized], ids=["torch", "gluon", "hybridized"])
def home(request: Any) -> Any:
    return request.param()


def test_every_layer_has_the_statistics_of_what_reaches_it(home: Any) -> None:
    net = home.net()
    home.train(net)
    rest = home.rest(net)
    names = home.recalibrate(net, home.arrays(cut(X, CUTS["uneven"])), one_by_one=True)
    assert names == (["1", "5", "8"] if home.name == "torch" else ["net_batchnorm0", "net_batchnorm1", "net_gluonbatchnorm0"])
    assert home.rest(net) == rest
    found = home.statistics(net)
    unbiased = (True, True, False) if home.name == "torch" else (True, False, False)
    for i in range(3):
        values = home.seen(net, i).astype(np.float64)
        values = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
        np.testing.assert_allclose(found[2 * i], values.mean(axis=1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[2 * i + 1], values.var(axis=1, ddof=int(unbiased[i])), rtol=1e-5)
    home.recalibrate(net, home.arrays([X]), one_by_one=True)
    for a, b in zip(home.statistics(net), found, strict=True):
        assert np.array_equal(a, b)


def test_order_and_size_of_the_batches_do_not_matter(home: Any) -> None:
    exact: list[Array] = []
    close: list[Array] = []
    for sizes in CUTS.values():
        for one_by_one, results in ((True, exact), (False, close)):
            net = home.net()
            batches = [(x, None) for x in home.arrays(cut(X, sizes, backwards=len(results) == 1))]
            home.recalibrate(net, batches, one_by_one=one_by_one)
            results.append(np.concatenate(home.statistics(net)))
    assert len({each.tobytes() for each in exact}) == 1
    for each in close:  # the convolutions and the product may round in other ways
        np.testing.assert_allclose(each, exact[0], rtol=2**-18, atol=2**-20)


def test_an_error_changes_nothing(home: Any) -> None:
    net = home.net()
    home.train(net)
    before, rest = home.statistics(net), home.rest(net)

    class Failing:
        rounds = 0

        def __iter__(self) -> Iterator[Any]:
            self.rounds += 1
            yield from home.arrays([X])
            if self.rounds == 3:
                raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        home.recalibrate(net, Failing())
    for a, b in zip(home.statistics(net), before, strict=True):
        assert np.array_equal(a, b)
    assert home.rest(net) == rest


def test_what_cannot_be_gone_through_again_is_refused(home: Any) -> None:
    with pytest.raises(TypeError) as caught:
        home.recalibrate(home.net(), iter([1]))
    assert str(caught.value) == (
        "batches must be something to go through more than once, once for each BatchNorm, got list_iterator, which is used up "
        "after one. Give a list or a data loader."
    )
    assert home.recalibrate(home.net(), []) == []


def test_torch_takes_halves_and_named_inputs() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import multibn_torch

    class Named(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.norm = multibn_torch.BatchNorm2d(2)

        def forward(self, x: Any) -> Any:
            return self.norm(input=x.bfloat16())

    net = Named()
    assert multibn_torch.recalibrate(net, [torch.from_numpy(X)]) == ["norm"]
    exact = torch.from_numpy(X).bfloat16().double().mean((0, 2, 3))
    assert torch.equal(net.norm.running_mean, exact.float())


def test_gluon_takes_bfloat16_and_numpy_arrays() -> None:
    mx = pytest.importorskip("mxnet", reason="MXNet is not installed")
    import multibn_mxnet

    block = multibn_mxnet.BatchNorm(2, 4)
    block.initialize()
    half = mx.nd.amp_cast(mx.nd.array(X), dtype=np.dtype([("bfloat16", np.uint16)]))
    multibn_mxnet.recalibrate(block, [half])
    exact = mx.nd.amp_cast(half, dtype="float32").asnumpy().astype(np.float64).mean((0, 2, 3))
    assert np.array_equal(block.running_mean.data().asnumpy(), exact.astype(np.float32))
    mx.npx.set_np()
    try:
        block = multibn_mxnet.BatchNorm(2, 4)
        block.initialize()
        multibn_mxnet.recalibrate(block, [mx.np.array(X)])
        exact = X.astype(np.float64).mean((0, 2, 3)).astype(np.float32)
        assert np.array_equal(block.running_mean.data().asnumpy(), exact)
    finally:
        mx.npx.reset_np()
