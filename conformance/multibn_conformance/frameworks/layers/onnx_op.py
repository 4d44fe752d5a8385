"""ONNX's BatchNormalization, opset 15, in ONNX Runtime and in ONNX's reference evaluator. Needs NumPy, onnx and, for the first,
onnxruntime.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

TYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
STATE = ("scale", "bias", "mean", "var")
OPSET = 15


class OnnxOperator:
    """A model with one node per mode and type; the subject stores the statistics that the node returns."""

    def __init__(self, num_features: int, spec: Any, evaluator: Any) -> None:
        self._attributes = {} if spec is None else _attributes(spec)
        self._evaluator, self._models = evaluator, {}  # type: ignore[var-annotated]
        self._with_batch = spec is None or spec.normalize_with == "batch"
        ones, zeros = np.ones(num_features, np.float32), np.zeros(num_features, np.float32)
        self.load(ones, zeros, zeros, ones)

    def load(self, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any) -> None:
        """Set the state."""
        gamma = np.ones_like(moving_mean) if gamma is None else gamma
        beta = np.zeros_like(moving_mean) if beta is None else beta
        self._state = [np.array(a) for a in (gamma, beta, moving_mean, moving_var)]

    def forward(self, x: Any, training: bool) -> Any:
        """Return y for x."""
        mode = training and self._with_batch
        key = x.dtype.name, self._state[0].dtype.name, mode
        if key not in self._models:
            self._models[key] = self._evaluator(_model(*key, self._attributes))
        answers = self._models[key].run(None, {"x": x, **dict(zip(STATE, self._state, strict=True))})
        if mode:
            self._state[2:] = answers[1:]
        return answers[0]

    def backward(self, dy: Any) -> Any:
        """Refuse: there is no gradient."""
        raise NotImplementedError("ONNX has no gradient of BatchNormalization")

    def moving(self) -> Any:
        """Return (running_mean, running_var)."""
        return tuple(array.copy() for array in self._state[2:])


def _model(dtype: str, state: str, training: bool, attributes: dict[str, Any]) -> Any:
    if dtype not in TYPES:
        raise TypeError(f"BatchNormalization takes {', '.join(TYPES)}, got {dtype}")
    outputs = ["y", "running_mean", "running_var"] if training else ["y"]
    node = helper.make_node("BatchNormalization", ["x", *STATE], outputs, training_mode=int(training), **attributes)
    inputs = [helper.make_tensor_value_info("x", TYPES[dtype], None)]
    inputs += [helper.make_tensor_value_info(name, TYPES[state], [None]) for name in STATE]
    handed = [helper.make_tensor_value_info(name, TYPES[dtype if name == "y" else state], None) for name in outputs]
    graph = helper.make_graph([node], "batch_norm", inputs, handed)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def _attributes(spec: Any) -> dict[str, float]:
    if spec.momentum is None:
        raise NotImplementedError("ONNX has no average with equal weights")
    if spec.update_statistics != (spec.normalize_with == "batch"):
        raise NotImplementedError("ONNX has one switch: training_mode normalises with the batch and updates")
    return {"epsilon": spec.eps, "momentum": spec.momentum}


def _runtime(model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _reference(model: Any) -> Any:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model)


def make_runtime(num_features: int, spec: Any = None, device: str = "cpu") -> OnnxOperator:
    """Make a subject of ONNX Runtime, for inference and training_mode; without a spec, it has the operator's own defaults."""
    return OnnxOperator(num_features, spec, _runtime)


def make_reference(num_features: int, spec: Any = None, device: str = "cpu") -> OnnxOperator:
    """Make a subject of the reference evaluator."""
    return OnnxOperator(num_features, spec, _reference)


VERSION = onnx.__version__
