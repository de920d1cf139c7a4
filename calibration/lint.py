"""Checks a Q/DQ graph against the rules that engines need; every finding names the node that breaks one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from latentedge.calibration.graph import RESHAPING, WEIGHTED, constant, is_constant
from latentedge.calibration.placement import SMALLEST_WIDTH, is_one_row
from latentedge.calibration.quantise import OPSET_PER_CHANNEL
from latentedge.runtime.bundle import Array

#: Operators of quantised arithmetic that TensorRT does not take.
REFUSED = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
#: Operators whose inputs stay in higher precision.
FLOAT_ONLY = (
    "Softmax",
    "LayerNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "Sigmoid",
    "Gelu",
    "Erf",
    "Tanh",
    "Relu",
    "ReduceMean",
)
#: Axis of the output channels, as the weight is stored.
CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}


@dataclass(frozen=True)
class Finding:
    """One broken rule."""

    node: str
    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.node}: {self.detail} ({self.rule})"


def lint(model: ir.Model, *, quantised_outputs: bool = False) -> list[Finding]:
    """Every rule that ``model`` breaks; ``quantised_outputs`` allows Q/DQ after convolutions (ONNX Runtime's CPU)."""
    findings: list[Finding] = []
    opset = model.opset_imports.get("", 0)
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and opset < OPSET_PER_CHANNEL:
            detail = f"opset {opset} knows no scales by channel"
            findings.append(Finding(_name(node), f"opset {OPSET_PER_CHANNEL} or later", detail))
        if node.op_type in REFUSED:
            findings.append(Finding(_name(node), "explicit Q/DQ only", f"{node.op_type} is not Q/DQ"))
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            findings += _scales(node)
            findings += _pair(node)
        if node.op_type == "DequantizeLinear":
            findings += _readers(node, quantised_outputs)
        if node.op_type == "QuantizeLinear":
            findings += _source(node, quantised_outputs)
        if node.op_type in WEIGHTED:
            findings += _layer(node, quantised_outputs)
    return findings


def _name(node: ir.Node) -> str:
    return str(node.name or node.outputs[0].name)


def _scales(node: ir.Node) -> list[Finding]:
    """Scales: constant, positive, finite, of the input's type; zero points zero, INT8, of the scale's shape."""
    scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    array = constant(scale)
    if array is None:
        return [Finding(_name(node), "constant scale", f"its scale {scale.name if scale else ''} is computed")]
    found = []
    if not (np.isfinite(array).all() and (array > 0).all()):
        found.append(Finding(_name(node), "positive finite scale", "a scale is zero, negative, NaN or infinite"))
    points = constant(zero)
    if zero is not None and (points is None or points.dtype != np.int8 or points.any() or points.shape != array.shape):
        found.append(Finding(_name(node), "symmetric INT8", "its zero point is not INT8 zeros of the scale's shape"))
    if node.op_type == "QuantizeLinear" and zero is None:
        found.append(Finding(_name(node), "symmetric INT8", "without a zero point it quantises to UINT8"))
    data = node.inputs[0]
    if node.op_type == "QuantizeLinear" and data is not None and data.dtype is not None and scale is not None:
        wrong = scale.dtype is not None and scale.dtype != data.dtype
        found += [Finding(_name(node), "one type", f"scale {scale.dtype}, input {data.dtype}")] if wrong else []
    if array.ndim and not _is_weight(node):
        found.append(Finding(_name(node), "activations per tensor", f"an activation has {array.size} scales"))
    return found


def _is_weight(node: ir.Node) -> bool:
    """Whether a Q or DQ works on a constant, directly or through the Q before it."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "QuantizeLinear":
        return is_constant(producer.inputs[0])
    return is_constant(value)


def _pair(node: ir.Node) -> list[Finding]:
    """Q is read by DQ only, and DQ reads a Q or stored INT8, with equal scales."""
    if node.op_type == "QuantizeLinear":
        others = [use.node.op_type for use in node.outputs[0].uses() if use.node.op_type != "DequantizeLinear"]
        return [Finding(_name(node), "Q before DQ", f"it is read by {', '.join(others)}")] if others else []
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is None:
        return [] if is_constant(node.inputs[0]) else [Finding(_name(node), "Q before DQ", "it reads no Q")]
    if producer.op_type != "QuantizeLinear":
        return [Finding(_name(node), "Q before DQ", f"it reads {producer.op_type}")]
    same = np.array_equal(_array(producer.inputs[1]), _array(node.inputs[1]))
    return [] if same else [Finding(_name(node), "equal scales", f"its Q {producer.name} has another scale")]


def _array(value: ir.Value | None) -> Array:
    array = constant(value)
    return np.empty(0) if array is None else array


def _readers(node: ir.Node, quantised_outputs: bool) -> list[Finding]:
    """DQ feeds weight-bearing layers, at their activation or weight; never a bias, a norm, a softmax or the output."""
    found = []
    if node.outputs[0].is_graph_output():
        found.append(Finding(_name(node), "float output", "it makes the graph's output"))
    for use in node.outputs[0].uses():
        reader = use.node
        if reader.op_type in FLOAT_ONLY:
            found.append(
                Finding(_name(node), "norms and softmax in float", f"{_name(reader)} ({reader.op_type}) reads it")
            )
        elif reader.op_type == "Resize" and not quantised_outputs:
            detail = f"{_name(reader)} repeats its values; Q/DQ belongs behind it"
            found.append(Finding(_name(node), "no Q/DQ before Resize", detail))
        elif reader.op_type in WEIGHTED and use.idx == 2:
            found.append(Finding(_name(node), "float bias", f"it is the bias of {_name(reader)}"))
        elif reader.op_type in ("MatMul", "Gemm") and not is_quantised_weight(reader.inputs[1]):
            found.append(Finding(_name(node), "attention in float", f"{_name(reader)} multiplies two activations"))
    return found


def is_quantised_weight(value: ir.Value | None) -> bool:
    """Whether a value is a weight, as a constant or dequantised from one."""
    if is_constant(value):
        return True
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type in ("DequantizeLinear", "QuantizeLinear") and _is_weight(producer)


def _source(node: ir.Node, quantised_outputs: bool) -> list[Finding]:
    """No Q on a layer's output: the convolution's accumulator stays in high precision for what follows it."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type not in WEIGHTED:
        return []
    if not is_quantised_weight(producer.inputs[1]) or _reaches_layer(node):
        return []
    if quantised_outputs and producer.op_type == "Conv":
        return []
    return [Finding(_name(node), "float output", f"it quantises the output of {_name(producer)}")]


def _reaches_layer(node: ir.Node) -> bool:
    """Whether a Q's DQ feeds a weight-bearing layer's activation, perhaps through a reshape."""
    stack = [use.node for use in node.outputs[0].uses()]
    while stack:
        reader = stack.pop()
        if reader.op_type in WEIGHTED:
            return True
        if reader.op_type == "DequantizeLinear" or reader.op_type in RESHAPING:
            stack.extend(use.node for use in reader.outputs[0].uses())
    return False


def _layer(node: ir.Node, quantised_outputs: bool) -> list[Finding]:
    """A layer is INT8 on both sides or on none, with its weight's scales along the output channels.

    A float layer may read a convolution's output that is quantised for that convolution's sake.
    """
    weight = node.inputs[1].producer() if node.inputs[1] is not None else None
    data = node.inputs[0].producer() if node.inputs[0] is not None else None
    quantised = weight is not None and weight.op_type == "DequantizeLinear"
    activation = data is not None and data.op_type == "DequantizeLinear"
    if activation and not quantised and quantised_outputs and data is not None and _is_output(data):
        return []
    if quantised != activation:
        side = "weight" if quantised else "activation"
        return [Finding(_name(node), "both sides or none", f"only its {side} is quantised")]
    if not quantised or weight is None:
        return []
    small = _small(node, weight)
    if small is not None:
        return [Finding(_name(node), "small shapes in float", small)]
    scales = _array(weight.inputs[1])
    axis = CHANNEL_AXIS.get(node.op_type, 0 if node.attributes.get_int("transB", 0) else 1)
    if scales.size > 1 and weight.attributes.get_int("axis", 1) != axis:
        return [
            Finding(_name(node), "scales by output channel", f"its weight's scales lie along another axis than {axis}")
        ]
    return []


def _is_output(dequantise: ir.Node) -> bool:
    """Whether a DQ gives back what a convolution in INT8 made."""
    quantise = dequantise.inputs[0].producer() if dequantise.inputs[0] is not None else None
    made = quantise.inputs[0].producer() if quantise is not None and quantise.inputs[0] is not None else None
    return made is not None and made.op_type == "Conv" and is_quantised_weight(made.inputs[1])


def _small(node: ir.Node, weight: ir.Node) -> str | None:
    """Why no kernel gains from this layer in INT8: too few channels, groups, or one row for each picture."""
    if node.attributes.get_int("group", 1) != 1:
        return f"a convolution of {node.attributes.get_int('group', 1)} groups"
    producer = weight.inputs[0].producer() if weight.inputs[0] is not None else None
    array = constant(weight.inputs[0] if producer is None else producer.inputs[0])
    if array is not None and min(array.shape[:2]) < SMALLEST_WIDTH:
        return f"{array.shape[0]} by {array.shape[1]} channels, fewer than {SMALLEST_WIDTH}"
    data = node.inputs[0]
    return "a matrix of one row" if data is not None and is_one_row(data) else None
