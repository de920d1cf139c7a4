"""A float16 graph made to round like float16 where the library computes it in float32.

ONNX Runtime's CPU provider has no float16 kernels for most operators. It computes them in float32 and drops the
conversions between two of them, so that neither overflow nor rounding inside the graph is seen. Explicit conversions
are kept: here every operator computes in float32 and its result is rounded to float16.
"""

from __future__ import annotations

import onnx_ir as ir

from latentedge.export.passes.half_precision import FLOAT, HALF


def round_every_result(model: ir.Model) -> None:
    """Let every operator on float16 compute in float32 and round its results to float16, in place."""
    twins: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type == "Cast":
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == HALF:
                if value not in twins:
                    twins[value] = _widen(model.graph, value)
                node.replace_input_with(index, twins[value])
        for output in node.outputs:
            if output.dtype == HALF:
                _round(model.graph, node, output)
        _state_float(node)


def _widen(graph: ir.Graph, value: ir.Value) -> ir.Value:
    node = _cast(value, FLOAT, f"{value.name}__widened")
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return node.outputs[0]


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """``node`` gives float32, and a Cast behind it gives what every user of ``output`` takes."""
    rounded = _cast(output, HALF, f"{output.name}__rounded")
    result = rounded.outputs[0]
    for user, index in [(use.node, use.idx) for use in output.uses()]:
        if user is not rounded:
            user.replace_input_with(index, result)
    output.dtype = FLOAT
    graph.insert_after(node, rounded)


def _cast(value: ir.Value, wanted: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(wanted)}, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(wanted)
    node.outputs[0].shape = value.shape
    return node


def _state_float(node: ir.Node) -> None:
    if node.op_type == "ConstantOfShape" and node.outputs[0].dtype == FLOAT and "value" in node.attributes:
        filled = node.attributes["value"].as_tensor().numpy().astype("float32")
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(filled))
