"""Floating-point operations and bytes of a graph for given input shapes, without running it.

Shapes are inferred node by node with onnx's own inference; small integer tensors (shapes) are evaluated, so that
dynamic graphs get fixed shapes. A multiplication and an addition count as two operations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, helper, numpy_helper, shape_inference
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data
from onnx.reference import ReferenceEvaluator

from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import BundleError

#: Tensors up to this many elements are evaluated where all their inputs are known.
EVALUATED = 256

#: Operations for each output element of what is no matrix product; anything not listed counts one.
ELEMENTWISE = {"Softmax": 5, "LayerNormalization": 7, "InstanceNormalization": 7, "GroupNormalization": 7, "Gelu": 8,
               "Erf": 6, "Sigmoid": 4, "Exp": 4, "Tanh": 6, "Sqrt": 2, "Pow": 4, "Sin": 4, "Cos": 4}  # fmt: skip

#: What only moves or relabels data.
MOVES = frozenset({
    "Reshape", "Transpose", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Shape", "Size", "Gather",
    "Cast", "Identity", "Constant", "ConstantOfShape", "Pad", "Resize", "Tile", "Flatten", "Range", "DepthToSpace",
})  # fmt: skip

#: The products that decide; the others are usually fused into them.
PRODUCTS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "MatMulInteger", "ConvInteger", "Attention"})


@dataclass(frozen=True)
class Operation:
    """One node: operator, operations, bytes of its weights, and bytes of the activations it reads and writes."""

    operator: str
    flops: float
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class GraphCost:
    """What a graph computes and touches, with float32 activations as its file declares them."""

    operations: tuple[Operation, ...]
    weight_bytes: int
    io_bytes: int
    #: Most bytes of activations that are alive at once, in the order of the file.
    peak_activation_bytes: int
    by_operator: dict[str, float] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """All operations."""
        return sum(operation.flops for operation in self.operations)


def graph_cost(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> GraphCost:
    """The cost of the graph at ``path`` for inputs of these shapes; :class:`BundleError` for shapes it cannot take."""
    return _Walk(path, shapes).cost()


class _Walk:
    """The graph node by node, with the type of every tensor and the value of every small known one."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model = onnx.load(str(path), load_external_data=False)
        self._path = path
        self._opsets = list(self._model.opset_import)
        self._versions = {entry.domain: entry.version for entry in self._opsets}
        self._types: dict[str, TypeProto] = {}
        self._values: dict[str, Array] = {}
        self._weights: dict[str, int] = {}
        for tensor in self._model.graph.initializer:
            self._add_initializer(tensor)
        for value in self._model.graph.input:
            if value.name in shapes:
                kind = value.type.tensor_type.elem_type
                self._types[value.name] = helper.make_tensor_type_proto(kind, shapes[value.name])
        self._inputs = [name for name in shapes if name in self._types]

    def _add_initializer(self, tensor: TensorProto) -> None:
        self._types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        self._weights[tensor.name] = self._bytes(tensor.name)
        if math.prod(tensor.dims) <= EVALUATED:
            copy = TensorProto()
            copy.CopyFrom(tensor)
            if uses_external_data(copy):
                load_external_data_for_tensor(copy, str(self._path.parent))
            self._values[tensor.name] = numpy_helper.to_array(copy)

    def cost(self) -> GraphCost:
        operations = []
        by_operator: dict[str, float] = defaultdict(float)
        for node in self._model.graph.node:
            self._infer(node)
            operation = self._operation(node)
            operations.append(operation)
            by_operator[node.op_type] += operation.flops
        outputs = [value.name for value in self._model.graph.output]
        io_bytes = sum(self._bytes(name) for name in (*self._inputs, *outputs))
        peak = self._peak(outputs)
        return GraphCost(
            tuple(operations),
            sum(self._weights.values()),
            io_bytes,
            peak,
            dict(sorted(by_operator.items(), key=lambda item: -item[1])),
        )

    def _infer(self, node: Any) -> None:
        known = [name for name in node.input if name]
        values: list[Array] | None = None
        if node.op_type == "Shape" and node.domain == "":
            whole = np.array(self._shape(known[0]), np.int64)
            attributes = {item.name: item.i for item in node.attribute}
            values = [whole[attributes.get("start", 0) : attributes.get("end", len(whole))]]
        elif all(name in self._values for name in known) and (known or node.op_type == "Constant"):
            values = self._evaluate(node, known)
        if values is not None and all(value.size <= EVALUATED for value in values):
            for name, value in zip(node.output, values, strict=False):
                self._values[name] = value
                self._types[name] = helper.make_tensor_type_proto(
                    helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
                )
            return
        self._infer_types(node, known)

    def _evaluate(self, node: Any, known: list[str]) -> list[Array]:
        evaluator = ReferenceEvaluator(node, opsets=self._versions)
        return [np.asarray(item) for item in evaluator.run(None, {name: self._values[name] for name in known})]

    def _infer_types(self, node: Any, known: list[str]) -> None:
        schema = onnx.defs.get_schema(node.op_type, self._versions[node.domain], node.domain)
        data = {name: numpy_helper.from_array(self._values[name], name) for name in known if name in self._values}
        try:
            found = shape_inference.infer_node_outputs(
                schema,
                node,
                {name: self._types[name] for name in known},
                data,
                opset_imports=self._opsets,
                ir_version=self._model.ir_version,
            )
        except shape_inference.InferenceError as error:
            raise BundleError(
                f"{self._path.name}: {node.op_type} {node.name} does not take these shapes: {error}"
            ) from error
        self._types.update(found)
        for name in (name for name in node.output if name):
            if name not in self._types or any(
                not side.HasField("dim_value") for side in self._types[name].tensor_type.shape.dim
            ):
                raise BundleError(f"{self._path.name}: the shape of {name} ({node.op_type}) cannot be inferred.")

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(side.dim_value for side in self._types[name].tensor_type.shape.dim)

    def _elements(self, name: str) -> int:
        return math.prod(self._shape(name))

    def _bytes(self, name: str) -> int:
        kind = self._types[name].tensor_type.elem_type
        return self._elements(name) * int(helper.tensor_dtype_to_np_dtype(kind).itemsize)

    def _operation(self, node: Any) -> Operation:
        read = [name for name in node.input if name]
        outputs = [name for name in node.output if name]
        weights = sum(self._weights.get(name, 0) for name in read)
        activations = sum(self._bytes(name) for name in (*read, *outputs) if name not in self._weights)
        return Operation(node.op_type, self._flops(node, read, outputs), weights, activations)

    def _flops(self, node: Any, read: list[str], outputs: list[str]) -> float:
        kind = node.op_type
        if kind in MOVES or all(name in self._values for name in outputs):
            return 0.0
        size = sum(self._elements(name) for name in outputs)
        if kind in ("Conv", "ConvInteger"):
            return 2.0 * size * math.prod(self._shape(read[1])[1:])
        if kind == "ConvTranspose":
            return 2.0 * self._elements(read[0]) * math.prod(self._shape(read[1])[1:])
        if kind in ("MatMul", "MatMulInteger"):
            return 2.0 * size * self._shape(read[0])[-1]
        if kind == "Gemm":
            return 2.0 * self._elements(read[0]) * self._shape(outputs[0])[1]
        if kind == "Attention":
            return self._attention(node, read)
        return float(size * ELEMENTWISE.get(kind, 1))

    def _attention(self, node: Any, read: list[str]) -> float:
        """Both products and the softmax; inputs are [batch, heads, length, width] or [batch, length, heads * width]."""
        query, key = self._shape(read[0]), self._shape(read[1])
        heads = next((item.i for item in node.attribute if item.name == "q_num_heads"), query[1])
        width = query[-1] if len(query) == 4 else query[-1] // heads
        return float(query[0] * heads * query[-2] * key[-2] * (4 * width + ELEMENTWISE["Softmax"]))

    def _peak(self, outputs: list[str]) -> int:
        nodes = list(self._model.graph.node)
        last = {name: index for index, node in enumerate(nodes) for name in node.input if name}
        last.update(dict.fromkeys(outputs, len(nodes)))
        alive = sum(self._bytes(name) for name in self._inputs)
        peak = alive
        for index, node in enumerate(nodes):
            alive += sum(self._bytes(name) for name in node.output if name in last)
            peak = max(peak, alive)
            done = {
                name for name in (*node.input, *node.output) if last.get(name) == index and name not in self._weights
            }
            alive -= sum(self._bytes(name) for name in done)
        return peak
