"""A float32 graph as a mixed float16 graph, by casting: inputs and outputs stay float32, so do the nodes asked for.

Which inputs and outputs of an operator may be float16 is read from ONNX's operator schemas: Resize, for example,
takes float16 pictures but float32 scales.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir

from latentedge.export.errors import ExportError

FLOAT = ir.DataType.FLOAT
HALF = ir.DataType.FLOAT16
HALF_MAX = float(np.finfo(np.float16).max)
HALF_TINY = float(np.finfo(np.float16).tiny)
#: Masks write "minus infinity" as the lowest float32; magnitudes from here on are taken as that.
MASK_MAGNITUDE = 1e30
#: Only small constants are searched for values that float16 cannot hold one by one; weights are checked by their peak.
SMALL_CONSTANT = 1024

_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
#: Operators whose float inputs must be exact: angles, and choices of an index.
_EXACT = ("Sin", "Cos", "ArgMin", "ArgMax", "TopK")


def needs_float32(model: ir.Model) -> dict[ir.Node, str]:
    """Nodes whose meaning does not survive float16 whatever the input, with the reason.

    Angles of sine and cosine (a timestep of 999.5 has no float16), comparisons that pick an index (the nearest code
    word), constants that float16 flushes to zero or overflows, subgraphs.
    """
    found: dict[ir.Node, str] = {}
    for node in model.graph:
        if node.op_type in _EXACT or _makes_integers(node):
            for ancestor in _float_ancestors(node):
                found.setdefault(ancestor, f"feeds {node.op_type}")
        if any(attribute.type in _SUBGRAPHS for attribute in node.attributes.values()):
            found[node] = "holds a subgraph"
        for value in node.inputs:
            reason = _constant_reason(value)
            if reason is not None:
                found.setdefault(node, reason)
    return found


def _makes_integers(node: ir.Node) -> bool:
    """Whether the node turns floats into integers (a timestep into the row of a table)."""
    source = node.inputs[0] if node.op_type == "Cast" else None
    target = node.outputs[0].dtype
    return source is not None and source.dtype == FLOAT and target is not None and not target.is_floating_point()


def _float_ancestors(node: ir.Node) -> list[ir.Node]:
    """The node and every node that it depends on through float32 tensors."""
    seen: dict[ir.Node, None] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen[current] = None
        for value in current.inputs:
            producer = value.producer() if value is not None and value.dtype == FLOAT else None
            if producer is not None:
                waiting.append(producer)
    return list(seen)


def _constant_reason(value: ir.Value | None) -> str | None:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    if value is None or tensor is None or value.dtype != FLOAT or tensor.size > SMALL_CONSTANT:
        return None
    magnitudes = np.abs(tensor.numpy())
    finite = magnitudes[magnitudes < MASK_MAGNITUDE]
    if finite.size and finite.max() > HALF_MAX:
        return f"its constant {value.name} exceeds float16 ({finite.max():.3g})"
    if finite.size and 0 < finite.max() < HALF_TINY:
        return f"its constant {value.name} vanishes in float16 ({finite.max():.3g})"
    return None


def cast_to_half(model: ir.Model, keep: Collection[ir.Node]) -> None:
    """Cast every float32 tensor of ``model`` to float16 in place, except around the nodes in ``keep``.

    Initialisers are converted when the model is saved, one after the other.
    """
    caster = _Caster(model, keep)
    for node in list(model.graph):
        caster.visit(node)
    caster.restore_outputs()
    _drop_unused_initialisers(model)


class _Caster:
    """Walks the graph in its order and remembers each value's other-precision twin."""

    def __init__(self, model: ir.Model, keep: Collection[ir.Node]) -> None:
        self.graph = model.graph
        self.opset = model.opset_imports.get("", 0)
        self.keep = set(keep)
        self.twins: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.half: set[ir.Value] = set()

    def visit(self, node: ir.Node) -> None:
        half_inputs, half_outputs = _half_slots(node.op_type, node.domain, self.opset)
        wanted = HALF if node not in self.keep else FLOAT
        for index, value in enumerate(node.inputs):
            if value is None or (value.dtype != FLOAT and value not in self.half):
                continue
            target = wanted if half_inputs(index) else FLOAT
            node.replace_input_with(index, self.as_type(value, target, node))
        if wanted is HALF:
            self.convert_outputs(node, half_outputs)

    def convert_outputs(self, node: ir.Node, half_outputs: Callable[[int], bool]) -> None:
        for index, output in enumerate(node.outputs):
            if output.dtype == FLOAT and half_outputs(index):
                _retarget(node)
                output.dtype = HALF
                self.half.add(output)

    def as_type(self, value: ir.Value, wanted: ir.DataType, user: ir.Node) -> ir.Value:
        actual = HALF if value in self.half else FLOAT
        if actual == wanted:
            return value
        if (value, wanted) not in self.twins:
            made = self.half_initialiser(value) if value.is_initializer() else self.cast(value, wanted, user)
            self.twins[value, wanted] = made
        return self.twins[value, wanted]

    def cast(self, value: ir.Value, wanted: ir.DataType, user: ir.Node) -> ir.Value:
        name = f"{value.name}_{'fp16' if wanted is HALF else 'fp32'}"
        node = ir.node("Cast", [value], attributes={"to": int(wanted)}, name=f"{name}/Cast")
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(wanted)
        node.outputs[0].shape = value.shape
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return node.outputs[0]

    def half_initialiser(self, value: ir.Value) -> ir.Value:
        tensor = value.const_value
        if tensor is None or value.name is None:
            raise ExportError(f"the initialiser {value.name} has no value.")
        name, shape = f"{value.name}_fp16", value.shape
        if shape is None:
            raise ExportError(f"the initialiser {value.name} has no shape.")
        lazy = ir.LazyTensor(lambda: half_tensor(tensor, name), dtype=HALF, shape=shape, name=name)
        made = ir.Value(name=name, shape=shape, type=ir.TensorType(HALF), const_value=lazy)
        self.graph.register_initializer(made)
        return made

    def restore_outputs(self) -> None:
        """Graph outputs that became float16 are cast back, under their own names."""
        for index, output in enumerate(list(self.graph.outputs)):
            if output not in self.half:
                continue
            name = output.name
            output.name = f"{name}_fp16"
            node = ir.node("Cast", [output], attributes={"to": int(FLOAT)}, name=f"{name}/Cast")
            node.outputs[0].name = name
            node.outputs[0].type = ir.TensorType(FLOAT)
            node.outputs[0].shape = output.shape
            self.graph.append(node)
            self.graph.outputs[index] = node.outputs[0]


def half_tensor(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """A float32 tensor in float16. Finite magnitudes from 1e30 on are masks and become the largest float16."""
    array = tensor.numpy()
    masks = np.isfinite(array) & (np.abs(array) >= MASK_MAGNITUDE)
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    half[masks] = np.copysign(np.float16(HALF_MAX), array[masks])
    lost = np.isinf(half) & np.isfinite(array)
    if lost.any():
        raise ExportError(f"{name} has {int(lost.sum())} values beyond float16, up to {np.abs(array[lost]).max():.3g}.")
    return ir.Tensor(half, name=name)


def _retarget(node: ir.Node) -> None:
    """Make an operator that states its output type state float16."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(HALF))
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        filled = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(filled.astype(np.float16)))


@cache
def _half_slots(op_type: str, domain: str, opset: int) -> tuple[Callable[[int], bool], Callable[[int], bool]]:
    """Which inputs and outputs of an operator may be float16."""
    schema = onnx.defs.get_schema(op_type, opset, domain)
    half_types = {
        constraint.type_param_str: "tensor(float16)" in constraint.allowed_type_strs
        for constraint in schema.type_constraints
    }

    def accepts(parameters: list[onnx.defs.OpSchema.FormalParameter]) -> Callable[[int], bool]:
        flags = [half_types.get(parameter.type_str, False) for parameter in parameters]
        return lambda index: bool(flags) and flags[min(index, len(flags) - 1)]

    return accepts(list(schema.inputs)), accepts(list(schema.outputs))


def _drop_unused_initialisers(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
