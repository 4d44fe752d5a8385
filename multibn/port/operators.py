"""The operators of MXNet that can be ported: their attributes, each with its type, its default and the values that can be ported.

Sources: the parameter structures of MXNet 1.9.1 (src/operator/**/*-inl.h), whose defaults are not written into a file. An
attribute with a value that is not allowed here, an attribute that is not listed, or an operator that is not, is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import PortError, refuse
from .symbol import Node, Symbol

_IGNORED: Final = frozenset({"workspace", "cudnn_tune", "cudnn_off", "cudnn_algo_verbose"})
"""Attributes that affect how MXNet computes, but not the result."""

REQUIRED: Final = object()
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Attribute:
    """An attribute: the function that parses its text, its default (REQUIRED: none), and the values that can be ported (empty:
    all).
    """

    read: Callable[[str], Any]
    default: Any = REQUIRED
    allowed: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Operator:
    """An operator that can be ported.

    Args:
        attributes: by name.
        inputs: the number of inputs that are used with these settings; None for all.
        outputs: the number of outputs with these settings.
    """

    attributes: Mapping[str, Attribute]
    inputs: Callable[[Settings], int | None] = lambda settings: 1
    outputs: Callable[[Settings], int] = lambda settings: 1


def _boolean(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _tuple(text: str) -> tuple[int | None, ...]:
    """Parse (3, 3), [3,3], (3L,), 3 or (None, 2)."""
    inner = text.strip().removeprefix("(").removesuffix(")").removeprefix("[").removesuffix("]")
    parts = [part.strip() for part in inner.split(",") if part.strip()]
    if len(parts) > 32:
        raise ValueError
    return tuple(None if part == "None" else _small(part) for part in parts)


def _small(text: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,18}L?", text.strip()):
        raise ValueError
    return int(text.strip().removesuffix("L"))


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.strip() == "None" else read(text)


def boolean(default: Any = REQUIRED, *allowed: bool | None) -> Attribute:
    """Parse True, False, 1 or 0; None if that is the default or allowed."""
    return Attribute(_optional(_boolean) if default is None or None in allowed else _boolean, default, allowed)


def integer(default: Any = REQUIRED, *allowed: int) -> Attribute:
    """Parse an integer; None if that is the default."""
    return Attribute(_optional(_small) if default is None else _small, default, allowed)


def number(default: Any = REQUIRED) -> Attribute:
    """Parse a finite number; None if that is the default."""
    return Attribute(_optional(_number) if default is None else _number, default)


def sizes(default: Any = REQUIRED, *allowed: Any) -> Attribute:
    """Parse integers."""
    return Attribute(_tuple, default, allowed)


def choice(default: Any, *allowed: Any) -> Attribute:
    """One of several words; ``allowed`` are those that can be ported, including the default."""
    return Attribute(_optional(str), default, allowed)


def _weights(settings: Settings) -> int:
    return 2 if settings["no_bias"] else 3


def _convolution(no_bias: bool, **more: Attribute) -> Operator:
    layout = choice(None, None, "NCHW", "NCW", "NCDHW")
    common = {"kernel": sizes(), "stride": sizes(()), "dilate": sizes(()), "pad": sizes(()), "num_filter": integer()}
    return Operator({**common, "num_group": integer(1), "no_bias": boolean(no_bias), "layout": layout, **more}, _weights)


_BATCH_NORM = {
    "eps": number(1e-3), "momentum": number(0.9), "fix_gamma": boolean(True), "use_global_stats": boolean(False),
    "output_mean_var": boolean(False, False), "axis": integer(1),
}  # fmt: skip
_CALIBRATION = {name: Attribute(_optional(_number), None, (None,)) for name in ("min_calib_range", "max_calib_range")}
_SYNC = {"ndev": integer(1), "key": choice(None)}
_POOLING = Operator(
    {
        "kernel": sizes(()), "pool_type": choice("max", "max", "avg", "sum"), "global_pool": boolean(False),
        "pooling_convention": choice("valid", "valid", "full"), "stride": sizes(()), "pad": sizes(()), "p_value": integer(None),
        "count_include_pad": boolean(None), "layout": choice(None, None, "NCHW", "NCW", "NCDHW"),
    }
)  # fmt: skip
_SOFTMAX_OUTPUT = Operator(
    {
        "grad_scale": number(1.0), "ignore_label": number(-1.0), "multi_output": boolean(False), "use_ignore": boolean(False),
        "preserve_shape": boolean(False), "normalization": choice("null"), "out_grad": boolean(False),
        "smooth_alpha": number(0.0),
    }
)  # fmt: skip
_SOFTMAX = Operator(
    {
        "axis": integer(-1), "temperature": number(None), "dtype": choice(None, None, "float32"),
        "use_length": boolean(False, False, None),
    }
)  # fmt: skip
_REDUCTION = Operator({"axis": Attribute(_optional(_tuple), None), "keepdims": boolean(False), "exclude": boolean(False)})
_CAST = Operator({"dtype": choice(REQUIRED, "float32")})
_PLAIN, _TWO = Operator({}), Operator({}, lambda settings: 2)
_SCALAR = Operator({"scalar": number(), "is_int": boolean(None)})
_LOSS = Operator({"grad_scale": number(1.0)})
_ALL_INPUTS = Operator({"num_args": integer(None)}, lambda settings: settings["num_args"])

_FAMILIES: Final[Mapping[str, Operator]] = {
    "Convolution Convolution_v1": _convolution(False),
    "Deconvolution": _convolution(True, adj=sizes(()), target_shape=sizes((), ())),
    "FullyConnected": Operator({"num_hidden": integer(), "no_bias": boolean(False), "flatten": boolean(True)}, _weights),
    "BatchNorm BatchNorm_v1": Operator({**_BATCH_NORM, **_CALIBRATION}, lambda settings: 5),
    "_contrib_SyncBatchNorm SyncBatchNorm": Operator({**_BATCH_NORM, **_SYNC}, lambda settings: 5),
    "Activation": Operator({"act_type": choice(REQUIRED, "relu", "sigmoid", "tanh", "softrelu", "softsign")}),
    "LeakyReLU": Operator(
        {
            "act_type": choice("leaky", "leaky", "elu", "prelu", "selu", "gelu"), "slope": number(0.25),
            "lower_bound": number(0.125), "upper_bound": number(0.334),
        },
        lambda settings: 2 if settings["act_type"] == "prelu" else 1,
    ),
    "Pooling Pooling_v1": _POOLING,
    "Dropout": Operator({"p": number(0.5), "mode": choice("training", "training"), "axes": sizes((), ())}),
    "Concat concat": Operator({"num_args": integer(None), "dim": integer(1)}, lambda settings: settings["num_args"]),
    "Flatten flatten": _PLAIN,
    "Reshape reshape": Operator(
        {"shape": sizes(()), "reverse": boolean(False), "target_shape": sizes((), (), (0, 0)),
         "keep_highest": boolean(False, False)}
    ),
    "elemwise_add _plus _Plus broadcast_add broadcast_plus _add": _TWO,
    "elemwise_sub _minus _Minus broadcast_sub broadcast_minus _sub": _TWO,
    "elemwise_mul _mul _Mul broadcast_mul": _TWO,
    "elemwise_div _div _Div broadcast_div": _TWO,
    "_maximum _Maximum broadcast_maximum": _TWO,
    "_minimum _Minimum broadcast_minimum": _TWO,
    "_plus_scalar _PlusScalar": _SCALAR,
    "_minus_scalar _MinusScalar": _SCALAR,
    "_mul_scalar _MulScalar": _SCALAR,
    "_div_scalar _DivScalar": _SCALAR,
    "_rminus_scalar _RMinusScalar": _SCALAR,
    "_rdiv_scalar _RDivScalar": _SCALAR,
    "_power_scalar _PowerScalar": _SCALAR,
    "_maximum_scalar _MaximumScalar": _SCALAR,
    "_minimum_scalar _MinimumScalar": _SCALAR,
    "sigmoid": _PLAIN, "tanh": _PLAIN, "relu": _PLAIN, "exp": _PLAIN, "log": _PLAIN, "sqrt": _PLAIN, "square": _PLAIN,
    "abs": _PLAIN, "negative": _PLAIN,
    "_copy identity": _PLAIN,
    "BlockGrad stop_gradient": _PLAIN,
    "MakeLoss make_loss": Operator({"grad_scale": number(1.0), "normalization": choice("null"), "valid_thresh": number(0.0)}),
    "LinearRegressionOutput MAERegressionOutput": _LOSS,
    "LogisticRegressionOutput": _LOSS,
    "Cast cast amp_cast": _CAST,
    "add_n ElementWiseSum": _ALL_INPUTS,
    "clip": Operator({"a_min": number(), "a_max": number()}),
    "softmax": _SOFTMAX,
    "log_softmax": _SOFTMAX,
    "SoftmaxActivation": Operator({"mode": choice("instance", "instance", "channel")}),
    "SoftmaxOutput Softmax": _SOFTMAX_OUTPUT,
    "UpSampling": Operator(
        {
            "scale": integer(), "num_filter": integer(0), "sample_type": choice(REQUIRED, "nearest"),
            "multi_input_mode": choice("concat", "concat"), "num_args": integer(1, 1),
        }
    ),
    "Crop": Operator(
        {"num_args": integer(REQUIRED, 2), "offset": sizes((0, 0)), "h_w": sizes((0, 0)), "center_crop": boolean(False)},
        lambda settings: 2,
    ),
    "SliceChannel split": Operator(
        {"num_outputs": integer(), "axis": integer(1), "squeeze_axis": boolean(False)},
        outputs=lambda settings: settings["num_outputs"],
    ),
    "slice_axis": Operator({"axis": integer(), "begin": integer(), "end": Attribute(_optional(_small))}),
    "slice crop": Operator({"begin": sizes(), "end": sizes(), "step": sizes(())}),
    "transpose": Operator({"axes": sizes(())}),
    "SwapAxis swapaxes": Operator({"dim1": integer(0), "dim2": integer(0)}),
    "expand_dims": Operator({"axis": integer()}),
    "squeeze": Operator({"axis": Attribute(_optional(_tuple), None)}),
    "mean": _REDUCTION, "sum sum_axis": _REDUCTION, "max max_axis": _REDUCTION, "min min_axis": _REDUCTION,
    "L2Normalization": Operator({"eps": number(1e-10), "mode": choice("instance", "instance", "channel", "spatial")}),
    "LRN": Operator({"alpha": number(1e-4), "beta": number(0.75), "knorm": number(2.0), "nsize": integer()}),
    "Pad pad": Operator(
        {"mode": choice(REQUIRED, "constant", "edge", "reflect"), "pad_width": sizes(), "constant_value": number(0.0)}
    ),
}  # fmt: skip

NAMES: Final[Mapping[str, str]] = {name: names.split()[0] for names in _FAMILIES for name in names.split()}
"""Each name of an operator in MXNet -> the first of its names."""

OPERATORS: Final[Mapping[str, Operator]] = {names.split()[0]: operator for names, operator in _FAMILIES.items()}
"""The first name of each operator that can be ported -> the operator."""


@dataclass(frozen=True)
class Call:
    """A node of a graph, checked.

    Args:
        index: of the node.
        node: as in the file.
        op: the operator, by the first of its names.
        settings: the values of all attributes of the operator; the default if the file has none.
        inputs: those that are used.
        outputs: their number.
    """

    index: int
    node: Node
    op: str
    settings: Settings
    inputs: tuple[tuple[int, int], ...]
    outputs: int


def calls(symbol: Symbol, name: str = "the symbol") -> list[Call]:
    """Return the calls that the outputs of a graph depend on, each after its inputs.

    Raises:
        PortError: names every operator, attribute and value that cannot be ported, and every reference to an output that does not
            exist; ``name`` is for the message.
    """
    needed = {node for node, _ in symbol.heads}
    found: dict[int, Call] = {}
    problems: list[str] = []
    for index in range(len(symbol.nodes) - 1, -1, -1):
        node = symbol.nodes[index]
        if index not in needed or node.op == "null":
            continue
        call, objections = _call(index, node)
        problems += reversed(objections)
        if call is not None:
            found[index] = call
        needed.update(reference[0] for reference in (node.inputs if call is None else call.inputs))
    outputs = {index: call.outputs for index, call in found.items()}
    for where, references in [*((str(call.node), call.inputs) for call in found.values()), ("the graph", symbol.heads)]:
        for node_index, output in references:
            if output >= outputs.get(node_index, 1):
                problems.append(f"{where} takes output {output} of {symbol.nodes[node_index]}, which is not ported.")
    problems.reverse()
    refuse(list(dict.fromkeys(problems)), f"{name} cannot be ported")
    return [found[index] for index in sorted(found)]


def _call(index: int, node: Node) -> tuple[Call | None, list[str]]:
    if node.op not in NAMES:
        return None, [f"{node}: the operator is not known."]
    operator = OPERATORS[NAMES[node.op]]
    settings: dict[str, Any] = {}
    problems = []
    for key, attribute in operator.attributes.items():
        try:
            settings[key] = _setting(node, key, attribute)
        except PortError as error:
            problems.append(str(error))
    unknown = sorted(set(node.attributes) - set(operator.attributes) - _IGNORED)
    problems += [f"{node}: the attribute {key}={node.attributes[key]!r} is not known." for key in unknown]
    if problems:
        return None, problems
    wanted, outputs = operator.inputs(settings), operator.outputs(settings)
    if wanted is None:
        wanted = len(node.inputs)
    if NAMES[node.op] in ("BatchNorm", "_contrib_SyncBatchNorm") and len(node.inputs) == 3:
        wanted = 3  # before 0.9 the moving statistics were not inputs
    if not 0 < wanted <= len(node.inputs):
        return None, [f"{node}: it has {len(node.inputs)} inputs, its attributes ask for {wanted}."]
    if not 0 < outputs <= 10_000:
        return None, [f"{node}: it has {outputs} outputs."]
    return Call(index, node, NAMES[node.op], settings, node.inputs[:wanted], outputs), []


def _setting(node: Node, key: str, attribute: Attribute) -> Any:
    if key not in node.attributes:
        if attribute.default is REQUIRED:
            raise PortError(f"{node}: the attribute {key} is missing.")
        return attribute.default
    text = node.attributes[key]
    try:
        value = attribute.read(text)
    except (ValueError, KeyError):
        raise PortError(f"{node}: {key}={text[:60]!r} cannot be read.") from None
    if attribute.allowed and value not in attribute.allowed:
        able = ", ".join(str(each) for each in attribute.allowed if each is not None)
        raise PortError(
            f"{node}: {key}={text} cannot be ported; {able} can." if able else f"{node}: {key}={text} cannot be ported."
        )
    return value
