"""Linear layers whose output is only cut into pieces, as one layer for each piece.

A gated feed-forward layer (GEGLU) computes value and gate in one product and cuts the result in two. With the weight cut
instead, the wide result is never written and read again, and the gate's GELU and the product that follows fuse with
their own layer. Every number is the same dot product as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from latentedge.runtime.bundle import Array


@dataclass(frozen=True)
class _Cut:
    """``MatMul`` with a constant weight [K, N], the ``Add`` of a constant bias [N] if there is one, and the ``Split``."""

    product: ir.Node
    addition: ir.Node | None
    split: ir.Node
    widths: tuple[int, ...]


def split_linear_layers(model: ir.Model) -> int:
    """Rewrite every linear layer that only a Split along its width reads, in place; gives their number."""
    found = [cut for node in model.graph if (cut := _match(node)) is not None]
    for cut in found:
        _rewrite(model.graph, cut)
    return len(found)


def _match(split: ir.Node) -> _Cut | None:
    if split.op_type != "Split" or split.domain != "" or any(value.is_graph_output() for value in split.outputs):
        return None
    joined = split.inputs[0]
    node = _only_reader(joined)
    addition = node if node is not None and node.op_type == "Add" else None
    if addition is not None:
        biases = [index for index, value in enumerate(addition.inputs) if _constant(value) is not None]
        if len(biases) != 1:
            return None
        node = _only_reader(addition.inputs[1 - biases[0]])
    weight = _constant(node.inputs[1]) if node is not None and node.op_type == "MatMul" and node.domain == "" else None
    if node is None or weight is None or weight.ndim != 2 or not _along_width(split, joined):
        return None
    widths = _widths(split, weight.shape[1])
    if widths is None or (addition is not None and _bias_of(addition).shape != (weight.shape[1],)):
        return None
    return _Cut(node, addition, split, widths)


def _only_reader(value: ir.Value | None) -> ir.Node | None:
    """The node that computes ``value``, where nothing but one node reads it."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return value.producer()


def _constant(value: ir.Value | None) -> Array | None:
    if value is None or not value.is_initializer() or value.const_value is None or value.is_graph_input():
        return None
    return np.asarray(value.const_value.numpy())


def _bias_of(addition: ir.Node) -> Array:
    constants = [array for value in addition.inputs if (array := _constant(value)) is not None]
    return constants[0]


def _along_width(split: ir.Node, joined: ir.Value | None) -> bool:
    axis = split.attributes.get_int("axis", 0)
    rank = len(joined.shape) if joined is not None and joined.shape is not None else None
    return axis == -1 or (rank is not None and axis == rank - 1)


def _widths(split: ir.Node, width: int) -> tuple[int, ...] | None:
    """Widths of the pieces: those that are stated, or equal ones."""
    stated = _constant(split.inputs[1]) if len(split.inputs) > 1 and split.inputs[1] is not None else None
    if stated is not None:
        return tuple(int(side) for side in stated)
    if len(split.inputs) > 1 and split.inputs[1] is not None:
        return None
    pieces = len(split.outputs)
    return (width // pieces,) * pieces if width % pieces == 0 else None


def _rewrite(graph: ir.Graph, cut: _Cut) -> None:
    source, weight = cut.product.inputs[0], cut.product.inputs[1]
    assert source is not None
    assert weight is not None
    begins = np.cumsum((0, *cut.widths[:-1]))
    for index, (begin, width) in enumerate(zip(begins, cut.widths, strict=True)):
        columns = slice(int(begin), int(begin) + width)
        nodes = [_piece(graph, cut.product, index, [source, _sliced(graph, weight, index, columns)])]
        if cut.addition is not None:
            inputs = [
                _sliced(graph, value, index, columns) if value.is_initializer() else nodes[0].outputs[0]
                for value in cut.addition.inputs
                if value is not None
            ]
            nodes.append(_piece(graph, cut.addition, index, inputs))
        old, new = cut.split.outputs[index], nodes[-1].outputs[0]
        new.shape, new.type = old.shape, old.type
        graph.insert_before(cut.split, nodes)
        old.replace_all_uses_with(new)
    old_nodes = [node for node in (cut.split, cut.addition, cut.product) if node is not None]
    constants = [value for node in old_nodes for value in node.inputs if value is not None and value.is_initializer()]
    graph.remove(old_nodes, safe=True)
    for value in constants:
        if not value.uses():
            graph.initializers.pop(str(value.name), None)


def _piece(graph: ir.Graph, like: ir.Node, index: int, inputs: list[ir.Value]) -> ir.Node:
    node = ir.node(like.op_type, inputs, name=f"{like.name}_{index}")
    node.outputs[0].name = f"{node.name}_output_0"
    node.outputs[0].type = like.outputs[0].type
    return node


def _sliced(graph: ir.Graph, value: ir.Value, index: int, columns: slice) -> ir.Value:
    """The initialiser with the columns of one piece of ``value``, [K, N] or [N]."""
    array = _constant(value)
    assert array is not None
    name = f"{value.name}_{index}"
    if name not in graph.initializers:
        piece = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array[..., columns]), name=name))
        graph.register_initializer(piece)
    return graph.initializers[name]
