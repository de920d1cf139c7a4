"""Runs one layer alone, in float, so that a range or a rule can be judged by the error of the layer's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from latentedge.calibration.graph import Layer
from latentedge.calibration.ranges import LEVELS, scale_of
from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import LatentEdgeError

#: Rows of a matrix that a layer is judged by: more do not change the choice.
MOST_ROWS = 1024

#: Computes a layer's output, without bias, from an activation and a weight.
Run = Callable[[Array, Array], Array]


def fake_quantise(array: Array, amax: float) -> Array:
    """``array`` rounded to symmetric INT8 with range ``amax`` and back, float32."""
    scale = np.float32(scale_of(amax))
    return np.asarray(np.clip(np.rint(array / scale), -LEVELS - 1, LEVELS) * scale, np.float32)


def layer_run(layer: Layer, attributes: Mapping[str, object]) -> Run:
    """A function that computes ``layer`` for any activation and weight; convolutions run in ONNX Runtime."""
    if layer.linear:
        transposed = layer.channel_axis == 0
        return lambda data, weight: np.asarray(data @ (weight.T if transposed else weight), np.float32)
    node = helper.make_node(layer.kind, ["data", "weight"], ["output"])
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("data", "weight", "output")]
    graph = helper.make_graph([node], "layer", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def run(data: Array, weight: Array) -> Array:
        return np.asarray(session.run(None, {"data": data, "weight": weight})[0])

    return run


def attributes_of(node: object) -> dict[str, object]:
    """A node's attributes as plain values."""
    attributes: Mapping[str, object] = node.attributes  # type: ignore[attr-defined]
    return {name: attribute.value for name, attribute in attributes.items()}  # type: ignore[attr-defined]


def rows_of(layer: Layer, data: Array) -> Array:
    """The part of an activation that a layer is judged by: all of a picture, some rows of a matrix."""
    if not layer.linear:
        return np.ascontiguousarray(data, np.float32)
    rows = data.reshape(-1, data.shape[-1])
    stride = max(1, len(rows) // MOST_ROWS)
    return np.ascontiguousarray(rows[::stride], np.float32)


def relative_error(reference: Array, computed: Array) -> float:
    """Squared error over squared reference; :class:`LatentEdgeError` where the reference is not finite."""
    power = float(np.square(reference, dtype=np.float64).sum())
    if not np.isfinite(power):
        raise LatentEdgeError("a layer's output is not finite in fp32.")
    error = float(np.square(computed.astype(np.float64) - reference).sum())
    return error / power if power > 0 else error


def check_model(path: str) -> None:
    """ONNX's own checker on a written graph; :class:`LatentEdgeError` says what it found."""
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise LatentEdgeError(f"the written graph {path} is not valid ONNX: {error}") from error
