"""Every operator that can be ported agrees with MXNet: outputs within 1e-5 of the largest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from port_checkpoints import in_mxnet, made_by_mxnet, mxnet

from multibn.port import PortError
from multibn.port.operators import NAMES, OPERATORS
from multibn.port.symbol import read_symbol
from multibn_torch.port.importer import read
from multibn_torch.port.operators import OPERATORS as BUILT

Make = Callable[[Any, Any], Any]
IMAGE = (2, 4, 9, 7)


def several(name: str, kinds: Iterable[Any], make: Callable[[Any, Any, Any], Any]) -> dict[str, tuple[Make, tuple[int, ...]]]:
    """A case for each kind."""
    return {name.format(kind): (partial(_of, make, kind), IMAGE) for kind in kinds}


def _of(make: Callable[[Any, Any, Any], Any], kind: Any, s: Any, x: Any) -> Any:
    return make(s, x, kind)


CASES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "convolution": (lambda s, x: s.Convolution(x, kernel=(3, 3), num_filter=6, name="c"), IMAGE),
    "convolution, everything": (
        lambda s, x: s.Convolution(x, kernel=(3, 2), stride=(2, 1), pad=(1, 0), dilate=(1, 2), num_filter=6, num_group=2),
        IMAGE,
    ),
    "convolution, no bias": (lambda s, x: s.Convolution(x, kernel=(1, 1), num_filter=6, no_bias=True, layout="NCHW"), IMAGE),
    "convolution 1d": (lambda s, x: s.Convolution(x, kernel=(3,), num_filter=6), (2, 4, 9)),
    "convolution 3d": (lambda s, x: s.Convolution(x, kernel=(2, 2, 2), num_filter=6), (2, 4, 5, 4, 3)),
    "deconvolution": (lambda s, x: s.Deconvolution(x, kernel=(3, 3), stride=(2, 2), pad=(1, 1), adj=(1, 1), num_filter=6), IMAGE),
    "deconvolution, groups and bias": (
        lambda s, x: s.Deconvolution(x, kernel=(4, 4), stride=(2, 2), num_filter=6, num_group=2, no_bias=False), IMAGE,
    ),
    "dense": (lambda s, x: s.FullyConnected(x, num_hidden=5), IMAGE),
    "dense, last axis": (lambda s, x: s.FullyConnected(x, num_hidden=5, flatten=False, no_bias=True), (2, 3, 4)),
    "batch norm": (lambda s, x: s.BatchNorm(x, fix_gamma=False, eps=1e-5, name="b"), IMAGE),
    "batch norm, nothing written": (lambda s, x: s.BatchNorm(x, name="b"), IMAGE),
    "batch norm, global statistics": (lambda s, x: s.BatchNorm(x, use_global_stats=True, fix_gamma=False, momentum=0.99), IMAGE),
    "batch norm of rank 2": (lambda s, x: s.BatchNorm(x, eps=2e-5), (4, 3)),
    "batch norm of rank 3": (lambda s, x: s.BatchNorm(x, eps=2e-5), (4, 3, 5)),
    "batch norm of rank 5": (lambda s, x: s.BatchNorm(x, axis=-4), (2, 3, 2, 2, 3)),
    "synchronized batch norm": (lambda s, x: s.contrib.SyncBatchNorm(x, key="k", ndev=1, fix_gamma=False), IMAGE),
    **several("activation {}", ("relu", "sigmoid", "tanh", "softrelu", "softsign"),
              lambda s, x, kind: s.Activation(x, act_type=kind)),
    **several("leaky {}", ("leaky", "elu", "prelu", "selu", "gelu"), lambda s, x, kind: s.LeakyReLU(x, act_type=kind, slope=0.1)),
    **several(
        "pooling {}", [f"{kind}, {rounding}" for kind in ("max", "avg", "sum") for rounding in ("valid", "full")],
        lambda s, x, kind: s.Pooling(
            x, kernel=(3, 2), stride=(2, 2), pad=(1, 0), pool_type=kind.split(", ")[0], pooling_convention=kind.split(", ")[1]
        ),
    ),
    "pooling, padding not counted": (
        lambda s, x: s.Pooling(x, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type="avg", count_include_pad=False), IMAGE),
    "pooling, padding not counted, full": (
        lambda s, x: s.Pooling(x, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type="avg", count_include_pad=False,
                               pooling_convention="full"), IMAGE),
    "pooling, stride 1": (lambda s, x: s.Pooling(x, kernel=(2, 2), pool_type="max"), IMAGE),
    "sum pooling 1d": (
        lambda s, x: s.Pooling(x, kernel=(3,), stride=(2,), pool_type="sum", pooling_convention="full"), (2, 4, 9)),
    "pooling 1d": (lambda s, x: s.Pooling(x, kernel=(2,), stride=(2,), pool_type="avg"), (2, 4, 9)),
    "pooling 3d": (lambda s, x: s.Pooling(x, kernel=(2, 2, 2), pool_type="max"), (2, 4, 4, 4, 4)),
    **several("global {} pooling", ("max", "avg", "sum"),
              lambda s, x, kind: s.Pooling(x, global_pool=True, kernel=(7, 7), pool_type=kind)),
    "dropout": (lambda s, x: s.Dropout(x, p=0.3), IMAGE),
    "concat": (lambda s, x: s.Concat(x, x * 2, dim=2), IMAGE),
    "flatten": (lambda s, x: s.Flatten(x), IMAGE),
    **several("reshape {}",
              ((0, -1), (-1, 7), (0, 0, -3), (-2,), (0, -4, 2, 2, -2), (0, -4, -1, 2, 0, 0), (2, 4, 63, 1), (-3, -3)),
              lambda s, x, shape: s.reshape(x, shape=shape)),
    "reshape, reversed": (lambda s, x: s.reshape(x, shape=(-1, 0), reverse=True), (8, 3, 4)),
    "elementwise": (lambda s, x: (x + x * x - x) / (x * x + 1), IMAGE),
    "broadcast": (
        lambda s, x: s.broadcast_div(s.broadcast_sub(s.broadcast_mul(x, s.var("g_weight", shape=(1, 4, 1, 1))), s.mean(
            x, axis=(2, 3), keepdims=True)), s.broadcast_add(s.broadcast_maximum(x, x), s.broadcast_minimum(x, x)) + 99), IMAGE),
    "scalars": (lambda s, x: 3 / (2 - (x * 2 - 1) / 4 + 9) + (x * x) ** 0.5, IMAGE),
    "scalar bounds": (lambda s, x: s._internal._maximum_scalar(s._internal._minimum_scalar(x, scalar=0.5), scalar=-0.5), IMAGE),
    "maximum, minimum": (lambda s, x: s.maximum(x, x * 2) + s.minimum(x, x * 3), IMAGE),
    "functions": (
        lambda s, x: s.sigmoid(x) + s.tanh(x) + s.relu(x) + s.exp(x) + s.log(s.abs(x) + 1) + s.sqrt(s.square(x)) + s.negative(x),
        IMAGE),
    "sum of several": (lambda s, x: s.add_n(x, x * 2, x * 3), IMAGE),
    "clip": (lambda s, x: s.clip(x, a_min=0, a_max=6), IMAGE),
    "softmax": (lambda s, x: s.softmax(x, axis=1), IMAGE),
    "softmax, temperature": (lambda s, x: s.log_softmax(x, axis=-1, temperature=2.0), IMAGE),
    "softmax activation": (
        lambda s, x: s.SoftmaxActivation(s.Flatten(x)) + s.Flatten(s.SoftmaxActivation(x, mode="channel")), IMAGE),
    "softmax output": (lambda s, x: s.SoftmaxOutput(s.Flatten(x), name="out"), IMAGE),
    "softmax output of channels": (lambda s, x: s.SoftmaxOutput(x, multi_output=True, use_ignore=True, name="out"), IMAGE),
    "softmax output, shape kept": (lambda s, x: s.SoftmaxOutput(x, preserve_shape=True, name="out"), IMAGE),
    "regression": (lambda s, x: s.LogisticRegressionOutput(x, name="out"), IMAGE),
    "linear regression": (lambda s, x: s.LinearRegressionOutput(x, name="out"), IMAGE),
    "made loss": (lambda s, x: s.MakeLoss(s.BlockGrad(s.identity(s.cast(x, dtype="float32")))), IMAGE),
    "upsampling": (lambda s, x: s.UpSampling(x, scale=3, sample_type="nearest"), IMAGE),
    "crop": (lambda s, x: s.Crop(x, s.Pooling(x, kernel=(3, 3)), num_args=2, offset=(2, 1)), IMAGE),
    "crop, centred": (lambda s, x: s.Crop(x, s.Pooling(x, kernel=(3, 3)), num_args=2, center_crop=True), IMAGE),
    "split": (lambda s, x: s.SliceChannel(x, num_outputs=2)[1], IMAGE),
    "split, squeezed": (lambda s, x: s.Concat(*s.SliceChannel(x, num_outputs=4, squeeze_axis=True), dim=1), IMAGE),
    "slice of an axis": (
        lambda s, x: s.slice_axis(x, axis=-2, begin=1, end=-1) + s.slice_axis(x, axis=2, begin=2, end=None), IMAGE),
    "slice": (lambda s, x: s.slice(x, begin=(None, 1), end=(None, 3), step=(1, 2)), IMAGE),
    "transpose": (lambda s, x: s.Concat(s.transpose(x), s.transpose(x, axes=(3, 2, 1, 0)), dim=0), IMAGE),
    "swap of axes": (lambda s, x: s.SwapAxis(x, dim1=1, dim2=3), IMAGE),
    "one more axis, one less": (
        lambda s, x: s.squeeze(s.expand_dims(s.squeeze(s.expand_dims(x, axis=1), axis=1), axis=-1)), IMAGE),
    **several("reduction {}", ("mean", "sum", "max", "min"),
              lambda s, x, kind: getattr(s, kind)(x, axis=(1, -1), exclude=True, keepdims=True)),
    "reduction of all": (lambda s, x: s.mean(x), IMAGE),
    **several("L2 over {}", ("instance", "channel", "spatial"), lambda s, x, mode: s.L2Normalization(x, mode=mode)),
    "LRN": (lambda s, x: s.LRN(x, nsize=3, alpha=0.1, knorm=1), IMAGE),
    "pad": (lambda s, x: s.Pad(x, mode="constant", pad_width=(0, 0, 0, 0, 1, 2, 3, 4), constant_value=2), IMAGE),
    **several("pad {}", ("edge", "reflect"), lambda s, x, mode: s.Pad(x, mode=mode, pad_width=(0, 0, 0, 0, 1, 2, 3, 1))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_operator_gives_what_mxnet_gives(case: str) -> None:
    mx = mxnet()
    make, shape = CASES[case]
    symbol = make(mx.sym, mx.sym.var("data"))
    arrays = made_by_mxnet(symbol, {"data": shape}, labels=("out_label",))
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    (wanted,) = in_mxnet(symbol, arrays, {"data": x})
    model = read(read_symbol(symbol.tojson()), arrays, {"data": shape}).model
    with torch.no_grad():
        got = model(torch.from_numpy(x)).numpy()
    assert got.shape == wanted.shape or wanted.size == got.size == 1  # MXNet's scalars are (1,)
    assert np.abs(got.reshape(wanted.shape) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_the_cases_cover_every_operator() -> None:
    mx = mxnet()
    seen = set()
    for make, _ in CASES.values():
        seen |= {
            NAMES[each["op"]] for each in json.loads(make(mx.sym, mx.sym.var("data")).tojson())["nodes"] if each["op"] != "null"
        }
    assert set(OPERATORS) - seen == set()
    assert set(BUILT) == set(OPERATORS)


def test_a_full_window_in_the_padding_is_refused() -> None:
    mx = mxnet()
    symbol = mx.sym.Pooling(mx.sym.var("data"), kernel=(2, 2), stride=(3, 3), pad=(1, 1), pooling_convention="full")
    with pytest.raises(PortError, match="a window in the padding alone for input of shape"):
        read(read_symbol(symbol.tojson()), {}, {"data": (1, 1, 5, 5)})
