"""MXNet's operators in PyTorch: one function per operator, which adds it to the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from multibn.port.errors import PortError
from multibn.port.operators import Call

from . import functions
from .builder import Builder, Value

Build = Callable[[Builder, Call], "Value | list[Value]"]
OPERATORS: Final[dict[str, Build]] = {}
"""Name of each operator of ``multibn.port.operators`` -> function that builds it."""


def _builds(*names: str) -> Callable[[Build], Build]:
    def add(function: Build) -> Build:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return add


def _each(sizes: tuple[int, ...], default: int, dims: int) -> tuple[int, ...]:
    """Return one size per dimension; MXNet writes () for its default."""
    return sizes if sizes else (default,) * dims


def _function(function: Callable[..., Any], *names: str) -> Callable[[Builder, Call], Value]:
    """Return a builder that passes the input and then the named settings, in order."""
    return lambda b, call: b.call(function, b.value(call.inputs[0]), *[call.settings[name] for name in names])


@_builds("Convolution", "Deconvolution")
def _convolution(b: Builder, call: Call) -> Value:
    s, dims = call.settings, len(call.settings["kernel"])
    x = b.value(call.inputs[0])
    if not 1 <= dims <= 3 or len(b.shape(x)) != dims + 2:
        raise PortError(f"kernel={s['kernel']} does not fit input of shape {b.shape(x)}")
    if s["num_filter"] < 1:
        raise PortError(f"num_filter={s['num_filter']} must be 1 or more")
    transposed = call.op == "Deconvolution"
    name = f"Conv{'Transpose' * transposed}{dims}d"
    more = {"output_padding": _each(s["adj"], 0, dims)} if transposed else {}
    module = getattr(nn, name)(
        b.shape(x)[1], s["num_filter"], s["kernel"], stride=_each(s["stride"], 1, dims), padding=_each(s["pad"], 0, dims),
        dilation=_each(s["dilate"], 1, dims), groups=s["num_group"], bias=not s["no_bias"], device="meta", **more,
    )  # fmt: skip
    return b.layer(call, module, x)


@_builds("FullyConnected")
def _fully_connected(b: Builder, call: Call) -> Value:
    x = b.value(call.inputs[0])
    if call.settings["flatten"] and len(b.shape(x)) > 2:
        x = b.call(torch.flatten, x, 1)
    if call.settings["num_hidden"] < 1:
        raise PortError(f"num_hidden={call.settings['num_hidden']} must be 1 or more")
    module = nn.Linear(b.shape(x)[-1], call.settings["num_hidden"], not call.settings["no_bias"], device="meta")
    return b.layer(call, module, x)


@_builds("BatchNorm", "_contrib_SyncBatchNorm")
def _batch_norm(b: Builder, call: Call) -> Value:
    return b.batch_norm(call)


@_builds("Activation")
def _activation(b: Builder, call: Call) -> Value:
    kinds = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softrelu": nn.Softplus, "softsign": nn.Softsign}
    return b.layer(call, kinds[call.settings["act_type"]](), b.value(call.inputs[0]))


@_builds("LeakyReLU")
def _leaky_relu(b: Builder, call: Call) -> Value:
    kind, slope, x = call.settings["act_type"], call.settings["slope"], b.value(call.inputs[0])
    if kind == "prelu":
        b.notes.append(
            f"{call.node}: MXNet 1.9.1 multiplies its gradient by the slope once more in graphs; PyTorch's is right, so "
            "fine-tuning differs."
        )
        return b.layer(call, nn.PReLU(b.size(call.inputs[1]), device="meta"), x)
    module = {"leaky": nn.LeakyReLU(slope), "elu": nn.ELU(slope), "selu": nn.SELU(), "gelu": nn.GELU()}[kind]
    return b.layer(call, module, x)


@_builds("Pooling")
def _pooling(b: Builder, call: Call) -> Value:
    s, x = call.settings, b.value(call.inputs[0])
    kind, dims = s["pool_type"], len(b.shape(x)) - 2
    if s["global_pool"]:
        return b.call(functions.reduce, x, {"avg": "mean"}.get(kind, kind), tuple(range(2, dims + 2)), True, False)
    if not 1 <= dims <= 3 or len(s["kernel"]) != dims:
        raise PortError(f"kernel={s['kernel']} does not fit input of shape {b.shape(x)}")
    stride, pad = _each(s["stride"], 1, dims), _each(s["pad"], 0, dims)
    full, count_pad = s["pooling_convention"] == "full", s["count_include_pad"] is not False
    if full or kind == "sum":
        return b.call(functions.pool, x, kind, s["kernel"], stride, pad, full, count_pad)
    if kind == "max":
        return b.layer(call, getattr(nn, f"MaxPool{dims}d")(s["kernel"], stride, pad), x)
    return b.layer(call, getattr(nn, f"AvgPool{dims}d")(s["kernel"], stride, pad, count_include_pad=count_pad), x)


@_builds("Dropout")
def _dropout(b: Builder, call: Call) -> Value:
    return b.layer(call, nn.Dropout(call.settings["p"]), b.value(call.inputs[0]))


@_builds("Concat")
def _concat(b: Builder, call: Call) -> Value:
    return b.call(torch.cat, [b.value(each) for each in call.inputs], call.settings["dim"])


@_builds("Reshape")
def _reshape(b: Builder, call: Call) -> Value:
    if not call.settings["shape"]:
        raise PortError("it has no shape")
    return b.call(functions.reshape, b.value(call.inputs[0]), call.settings["shape"], call.settings["reverse"])


def _binary(function: Callable[..., Any]) -> Callable[[Builder, Call], Value]:
    def build(b: Builder, call: Call) -> Value:
        left, right = (b.value(each) for each in call.inputs)
        if not call.node.op.startswith("broadcast") and b.shape(left) != b.shape(right):
            raise PortError(f"its inputs have shapes {b.shape(left)} and {b.shape(right)}, which must be equal")
        return b.call(function, left, right)

    return build


def _scalar(function: Callable[..., Any], swapped: bool = False) -> Callable[[Builder, Call], Value]:
    def build(b: Builder, call: Call) -> Value:
        x, scalar = b.value(call.inputs[0]), call.settings["scalar"]
        return b.call(function, scalar, x) if swapped else b.call(function, x, scalar)

    return build


@_builds("add_n")
def _add_n(b: Builder, call: Call) -> Value:
    out = b.value(call.inputs[0])
    for each in call.inputs[1:]:
        out = b.call(operator.add, out, b.value(each))
    return out


@_builds("softmax", "log_softmax")
def _softmax(b: Builder, call: Call) -> Value:
    x, temperature = b.value(call.inputs[0]), call.settings["temperature"]
    if temperature not in (None, 1.0):
        x = b.call(operator.truediv, x, temperature)
    return b.call(F.softmax if call.op == "softmax" else F.log_softmax, x, call.settings["axis"])


@_builds("SoftmaxActivation", "SoftmaxOutput")
def _softmax_output(b: Builder, call: Call) -> Value:
    s, x = call.settings, b.value(call.inputs[0])
    if call.op == "SoftmaxOutput":
        b.notes.append(_loss_note(call))
    if s.get("preserve_shape"):
        return b.call(F.softmax, x, -1)
    if not (s.get("multi_output") or s.get("mode") == "channel") and len(b.shape(x)) > 2:
        raise PortError(
            f"its input has shape {b.shape(x)}; MXNet 1.9.1 itself gives one thing in inference and another in training there. "
            "Say which axis: multi_output=True or mode=channel"
        )
    return b.call(F.softmax, x, 1)


@_builds("MakeLoss", "LinearRegressionOutput", "LogisticRegressionOutput")
def _loss(b: Builder, call: Call) -> Value:
    b.notes.append(_loss_note(call))
    x = b.value(call.inputs[0])
    return b.call(torch.sigmoid, x) if call.op == "LogisticRegressionOutput" else x


def _loss_note(call: Call) -> str:
    return f"{call.node}: its backward is the gradient of a loss; in PyTorch write that loss, and the labels are no input."


@_builds("_copy", "Cast")
def _identity(b: Builder, call: Call) -> Value:
    return b.value(call.inputs[0])


@_builds("UpSampling")
def _upsampling(b: Builder, call: Call) -> Value:
    return b.layer(call, nn.Upsample(scale_factor=float(call.settings["scale"])), b.value(call.inputs[0]))


@_builds("Crop")
def _crop(b: Builder, call: Call) -> Value:
    x, like = (b.value(each) for each in call.inputs)
    return b.call(functions.crop_like, x, like, call.settings["offset"], call.settings["center_crop"])


@_builds("SliceChannel")
def _slice_channel(b: Builder, call: Call) -> list[Value]:
    s = call.settings
    parts = b.call(functions.split, b.value(call.inputs[0]), s["num_outputs"], s["axis"], s["squeeze_axis"])
    return [b.call(operator.getitem, parts, i) for i in range(s["num_outputs"])]


@_builds("slice")
def _slice(b: Builder, call: Call) -> Value:
    if any(step is not None and step <= 0 for step in call.settings["step"]):
        raise PortError(f"step={call.settings['step']} cannot be ported; PyTorch's steps are > 0")
    return b.call(functions.take, b.value(call.inputs[0]), *[call.settings[name] for name in ("begin", "end", "step")])


@_builds("transpose")
def _transpose(b: Builder, call: Call) -> Value:
    x = b.value(call.inputs[0])
    return b.call(torch.permute, x, call.settings["axes"] or tuple(range(len(b.shape(x))))[::-1])


@_builds("squeeze")
def _squeeze(b: Builder, call: Call) -> Value:
    x, axis = b.value(call.inputs[0]), call.settings["axis"]
    axes = axis if axis is not None else tuple(i for i, size in enumerate(b.shape(x)) if size == 1)
    if any(b.shape(x)[i] != 1 for i in axes):
        raise PortError(f"axis={axis} of {b.shape(x)} is not of size 1")
    return b.call(torch.squeeze, x, axes)


@_builds("mean", "sum", "max", "min")
def _reduction(b: Builder, call: Call) -> Value:
    s = call.settings
    return b.call(functions.reduce, b.value(call.inputs[0]), call.op, s["axis"], s["keepdims"], s["exclude"])


@_builds("LRN")
def _lrn(b: Builder, call: Call) -> Value:
    s = call.settings
    return b.layer(call, nn.LocalResponseNorm(s["nsize"], s["alpha"], s["beta"], s["knorm"]), b.value(call.inputs[0]))


@_builds("Pad")
def _pad(b: Builder, call: Call) -> Value:
    s, x = call.settings, b.value(call.inputs[0])
    width = s["pad_width"]
    pairs = [width[i : i + 2] for i in range(0, len(width), 2)]
    if len(width) != 2 * len(b.shape(x)):
        raise PortError(f"pad_width={width} does not fit input of shape {b.shape(x)}")
    if any(width[:4]):
        raise PortError(f"pad_width={width} pads the batch or the channels, which MXNet does not either")
    flat = tuple(size for pair in reversed(pairs[2:]) for size in pair)
    if s["mode"] == "constant":
        return b.call(F.pad, x, flat, "constant", s["constant_value"])
    return b.call(F.pad, x, flat, "replicate" if s["mode"] == "edge" else "reflect")


_SIMPLE: Final[dict[str, Build]] = {
    "Flatten": lambda b, call: b.call(torch.flatten, b.value(call.inputs[0]), 1),
    "elemwise_add": _binary(operator.add),
    "elemwise_sub": _binary(operator.sub),
    "elemwise_mul": _binary(operator.mul),
    "elemwise_div": _binary(operator.truediv),
    "_maximum": _binary(torch.maximum),
    "_minimum": _binary(torch.minimum),
    "_plus_scalar": _scalar(operator.add),
    "_minus_scalar": _scalar(operator.sub),
    "_mul_scalar": _scalar(operator.mul),
    "_div_scalar": _scalar(operator.truediv),
    "_rminus_scalar": _scalar(operator.sub, swapped=True),
    "_rdiv_scalar": _scalar(operator.truediv, swapped=True),
    "_power_scalar": _scalar(operator.pow),
    "_maximum_scalar": _scalar(torch.clamp_min),
    "_minimum_scalar": _scalar(torch.clamp_max),
    "sigmoid": _function(torch.sigmoid),
    "tanh": _function(torch.tanh),
    "relu": _function(torch.relu),
    "exp": _function(torch.exp),
    "log": _function(torch.log),
    "sqrt": _function(torch.sqrt),
    "square": _function(torch.square),
    "abs": _function(torch.abs),
    "negative": _function(torch.neg),
    "BlockGrad": _function(torch.detach),
    "clip": _function(torch.clamp, "a_min", "a_max"),
    "slice_axis": _function(functions.take_axis, "axis", "begin", "end"),
    "SwapAxis": _function(torch.transpose, "dim1", "dim2"),
    "expand_dims": _function(torch.unsqueeze, "axis"),
    "L2Normalization": _function(functions.l2_normalize, "eps", "mode"),
}
OPERATORS.update(_SIMPLE)
