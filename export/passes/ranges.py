"""Largest magnitude of every float tensor of a graph, measured by running it."""

from __future__ import annotations

import onnx_ir as ir

_SUFFIX = "__absmax"


def add_range_outputs(model: ir.Model) -> list[str]:
    """Give the graph one scalar output for each float32 tensor that a node computes: its largest magnitude.

    The model's own outputs are replaced. Returns the tensors' names; the outputs are named after them
    (:func:`ranges_of`).
    """
    values = [
        output for node in model.graph for output in node.outputs if output.dtype == ir.DataType.FLOAT and output.name
    ]
    outputs = []
    for value in values:
        absolute = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", [absolute.outputs[0]], attributes={"keepdims": 0})
        largest.outputs[0].name = f"{value.name}{_SUFFIX}"
        largest.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        largest.outputs[0].shape = ir.Shape([])
        producer = value.producer()
        assert producer is not None
        model.graph.insert_after(producer, [absolute, largest])
        outputs.append(largest.outputs[0])
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    return [value.name for value in values if value.name is not None]


def ranges_of(outputs: dict[str, float]) -> dict[str, float]:
    """Largest magnitude by tensor name, from the outputs of a graph that :func:`add_range_outputs` changed."""
    return {name.removesuffix(_SUFFIX): value for name, value in outputs.items()}
