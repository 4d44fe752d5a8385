"""The habits of ONNX's operator, in ONNX Runtime and in ONNX's reference evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

X = np.random.default_rng(0).normal(3, 2, (6, 3, 4, 5)).astype(np.float32)
STATE = {
    "scale": np.full(3, 2, np.float32),
    "bias": np.ones(3, np.float32),
    "mean": np.full(3, 0.5, np.float32),
    "var": np.full(3, 4, np.float32),
}
TYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32}


def _run(
    evaluator: Any, opset: int, outputs: int = 1, x: Any = X, state: Any = None, kind: str = "float32", **attributes: Any
) -> Any:
    state = STATE if state is None else state
    names = ["y", "a", "b", "c", "d"][:outputs]
    node = helper.make_node("BatchNormalization", ["x", *STATE], names, **attributes)
    inputs = [helper.make_tensor_value_info("x", TYPES[x.dtype.name], None)]
    inputs += [helper.make_tensor_value_info(name, TYPES[array.dtype.name], None) for name, array in state.items()]
    handed = [helper.make_tensor_value_info(name, TYPES[x.dtype.name if name == "y" else kind], None) for name in names]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, handed), opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )
    return evaluator(model, {"x": x, **state})


def _runtime(model: Any, given: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, given)


def _reference(model: Any, given: Any) -> Any:
    return ReferenceEvaluator(model).run(None, given)


def _inferred() -> Any:
    return (X - 0.5) / np.sqrt(4 + 1e-5) * 2 + 1


def defaults() -> object:
    """Defaults in the schema: epsilon, momentum, training_mode."""
    known = onnx.defs.get_schema("BatchNormalization", 15).attributes
    return ", ".join(
        f"{name} {helper.get_attribute_value(known[name].default_value):.6g}" for name in ("epsilon", "momentum", "training_mode")
    )


def defaults_by_opset() -> object:
    """epsilon and momentum in the schema, by opset."""
    told = []
    for opset in (1, 6, 7, 9, 14, 15):
        known = onnx.defs.get_schema("BatchNormalization", opset).attributes
        numbers = (helper.get_attribute_value(known[name].default_value) for name in ("epsilon", "momentum"))
        told.append(f"{opset}: {', '.join(f'{each:.6g}' for each in numbers)}")
    return "; ".join(told)


def _names(opset: int) -> str:
    schema = onnx.defs.get_schema("BatchNormalization", opset)
    return f"{', '.join(each.name for each in schema.inputs)}; {', '.join(each.name for each in schema.outputs)}"


def names_9() -> object:
    """Opset 9: names of inputs; of outputs."""
    return _names(9)


def names_14() -> object:
    """Opset 14: the same."""
    return _names(14)


def names_15() -> object:
    """Opset 15: the same."""
    return _names(15)


def types_by_opset() -> object:
    """The type in the schema of x, scale and the moving mean, by opset: alike where the letter is."""
    told = []
    for opset in (9, 14, 15):
        inputs = onnx.defs.get_schema("BatchNormalization", opset).inputs
        told.append(f"{opset}: {', '.join(inputs[at].type_str for at in (0, 1, 3))}")
    return "; ".join(told)


def opset_9_inference_reference() -> object:
    """Opset 9, one output (inference), reference evaluator: largest error."""
    return float(np.abs(_run(_reference, 9)[0] - _inferred()).max())


def opset_9_inference_runtime() -> object:
    """Opset 9, one output (inference), ONNX Runtime: largest error."""
    return float(np.abs(_run(_runtime, 9)[0] - _inferred()).max())


def opset_7_reference() -> object:
    """Opset 7, reference evaluator."""
    _run(_reference, 7)
    return "accepted"


def opset_9_training_runtime() -> object:
    """Opset 9, five outputs (training), ONNX Runtime: whether it normalises with the batch."""
    return bool(np.abs(_run(_runtime, 9, 5)[0].mean((0, 2, 3)) - 1).max() < 1e-4)


def estimator() -> object:
    """Moving variance in training, by opset: ONNX Runtime; reference evaluator."""
    told = []
    for evaluator, opsets in ((_runtime, (9, 14, 15)), (_reference, (14, 15))):
        for opset in opsets:
            mode: dict[str, Any] = {"training_mode": 1} if opset > 9 else {}
            stored = _run(evaluator, opset, 3 if opset > 9 else 5, **mode)[2]
            entered = (stored - 0.9 * 4) / 0.1
            off = [np.abs(entered / X.astype(np.float64).var((0, 2, 3), ddof=ddof) - 1).max() for ddof in (0, 1)]
            told.append(f"{opset} {'biased' if off[0] < off[1] else 'unbiased'}")
    return f"{', '.join(told[:3])}; {', '.join(told[3:])}"


def spatial_runtime() -> object:
    """Opset 7 with spatial=0, ONNX Runtime."""
    _run(_runtime, 7, spatial=0)
    return "accepted"


def eps_zero_runtime() -> object:
    """epsilon 0, ONNX Runtime."""
    _run(_runtime, 15, epsilon=0.0)
    return "accepted"


def rank_one_runtime() -> object:
    """Input of rank 1, ONNX Runtime."""
    _run(_runtime, 15, x=X[0, :, 0, 0])
    return "accepted"


def rank_one_reference() -> object:
    """Input of rank 1 in training, reference evaluator."""
    _run(_reference, 15, 3, x=X[0, :, 0, 0], training_mode=1)
    return "accepted"


def integers_runtime() -> object:
    """int32 input, ONNX Runtime."""
    _run(_runtime, 15, x=X.astype(np.int32))
    return "accepted"


def half_alone() -> object:
    """Opset 14, float16 input with float16 state, ONNX Runtime: type of the output."""
    return _run(_runtime, 14, x=X.astype(np.float16), state={k: v.astype(np.float16) for k, v in STATE.items()})[0].dtype


def half_with_single_statistics_14() -> object:
    """Opset 14, float16 input with float32 state, ONNX Runtime."""
    _run(_runtime, 14, x=X.astype(np.float16))
    return "accepted"


def half_with_single_statistics_15() -> object:
    """Opset 15, float16 input with float32 state, ONNX Runtime."""
    _run(_runtime, 15, x=X.astype(np.float16))
    return "accepted"
