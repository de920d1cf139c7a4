"""Attention in a graph: found, fused into one operator, or computed in slices of its queries.

An attention is ``MatMul, Softmax, MatMul`` on ``[batch, heads, tokens, width]`` (or ``[batch, tokens, width]`` for one
head) without a mask. Both rewrites are for one engine library's own copy of a graph; a bundle's graphs keep the three
operators, which every library knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from latentedge.export.errors import ExportError

#: The domain of ONNX Runtime's own operators, and its version.
CONTRIB = ("com.microsoft", 1)

#: What may stand between the two products: it acts on each number, or on each row of scores, by itself.
ROW_WISE = {"Softmax", "Mul", "Div", "Cast", "QuantizeLinear", "DequantizeLinear"}

#: Pieces that the queries of a sliced attention are cut into.
SLICES = 8


@dataclass(frozen=True)
class Attention:
    """One attention: its operators in order, from the product with the keys to the product with the values."""

    chain: tuple[ir.Node, ...]

    @property
    def query(self) -> ir.Value:
        """Queries, ``[..., tokens, width]``."""
        return _input(self.chain[0], 0)

    @property
    def keys(self) -> ir.Value:
        """Keys, transposed: ``[..., width, key tokens]``."""
        return _input(self.chain[0], 1)

    @property
    def values(self) -> ir.Value:
        """Values, ``[..., key tokens, width]``."""
        return _input(self.chain[-1], 1)

    @property
    def output(self) -> ir.Value:
        """What is attended to, ``[..., tokens, width]``."""
        return self.chain[-1].outputs[0]


def attentions(graph: ir.Graph) -> list[Attention]:
    """Every attention of ``graph``, in order; one with a mask is none of these."""
    found = []
    for node in graph:
        if node.op_type == "MatMul" and _rank(node.outputs[0]) in (3, 4):
            chain = _chain(node)
            if chain is not None:
                found.append(Attention(chain))
    return found


def fuse(model: ir.Model) -> int:
    """Put ONNX Runtime's MultiHeadAttention in the place of every float32 attention; gives how many there were.

    Queries go in as ``[batch, tokens, heads * width]``, keys and values likewise, or as ``[batch, heads, tokens,
    width]`` where they arrive so. The operator never holds the whole matrix of scores.
    """
    graph, count = model.graph, 0
    for attention in attentions(graph):
        if {node.op_type for node in attention.chain} <= {"MatMul", "Mul", "Softmax"}:
            count += _fuse(graph, attention)
    if count:
        model.opset_imports[CONTRIB[0]] = CONTRIB[1]
        _remove_unused(graph)
    return count


def slice_queries(model: ir.Model, slices: int = SLICES) -> int:
    """Compute every attention in ``slices`` pieces of its queries, one after the other; gives how many there were.

    A row of scores depends on its own query only, so the result is the same, and a ``slices``-th of the scores is held
    at a time. Tokens that do not divide go into the last piece.
    """
    graph, count = model.graph, 0
    for attention in attentions(graph):
        _slice(graph, attention, slices)
        count += 1
    if count:
        _remove_unused(graph)
    return count


def _chain(first: ir.Node) -> tuple[ir.Node, ...] | None:
    """The operators from a product up to the next one, when they are the middle of an attention."""
    chain, node = [first], first
    while True:
        users = list(node.outputs[0].uses())
        if len(users) != 1 or node.outputs[0].is_graph_output():
            return None
        node, index = users[0].node, users[0].idx
        chain.append(node)
        if node.op_type == "MatMul":
            return tuple(chain) if index == 0 and any(inner.op_type == "Softmax" for inner in chain) else None
        if node.op_type not in ROW_WISE or not _acts_on_rows(node, index):
            return None


def _acts_on_rows(node: ir.Node, index: int) -> bool:
    if node.op_type == "Softmax":
        axis = node.attributes.get_int("axis", -1)
        return axis in (-1, (_rank(node.outputs[0]) or 0) - 1)
    others = [value for position, value in enumerate(node.inputs) if position != index and value is not None]
    return all(_scalar(value) is not None for value in others)


def _fuse(graph: ir.Graph, attention: Attention) -> int:
    scale, last = 1.0, attention.chain[-1]
    for node in attention.chain[1:-1]:
        if node.op_type == "Mul":
            scale *= next(number for value in node.inputs if (number := _scalar(value)) is not None)
    query, factor = _unscaled(attention.query)
    keys, key_factor = _unscaled(attention.keys)
    rank = _rank(attention.output)
    heads, width = (1, None) if rank == 3 else (_side(query, 1), _side(query, 3))
    if rank == 4 and (heads is None or width is None):
        return 0
    build = _Builder(graph, last)
    packed = (
        _packed(keys, (0, 2, 3, 1) if rank == 4 else (0, 2, 1), rank),
        _packed(attention.values, (0, 2, 1, 3), rank),
    )
    queries = query if rank == 3 else build.joined(query)
    if rank == 3:
        key = packed[0] if packed[0] is not None else build.transposed(keys, (0, 2, 1))
        value: ir.Value = attention.values
    elif packed[0] is not None and packed[1] is not None:
        key, value = build.flattened(packed[0]), build.flattened(packed[1])
    else:
        key, value = build.transposed(keys, (0, 1, 3, 2)), attention.values
    attributes = {"num_heads": heads, "scale": float(scale * factor * key_factor)}
    fused = build.node("MultiHeadAttention", [queries, key, value], attributes, domain=CONTRIB[0])
    result = fused if rank == 3 else build.transposed(build.reshaped(fused, (0, 0, int(heads or 1), -1)), (0, 2, 1, 3))
    replace_value(attention.output, result)
    return 1


def _slice(graph: ir.Graph, attention: Attention, slices: int) -> None:
    build = _Builder(graph, attention.chain[-1])
    rank = _rank(attention.output) or 4
    tokens = build.node("Shape", [attention.query], {"start": rank - 2, "end": rank - 1})
    each = build.node("Div", [tokens, build.numbers([slices])])
    rest = build.node("Sub", [tokens, build.node("Mul", [each, build.numbers([slices - 1])])])
    sizes = build.node("Concat", [*[each] * (slices - 1), rest], {"axis": 0})
    pieces = build.nodes("Split", [attention.query, sizes], {"axis": rank - 2}, outputs=slices)
    results = []
    for piece in pieces:
        value = piece
        for before, node in zip((None, *attention.chain), attention.chain, strict=False):
            previous = attention.query if before is None else before.outputs[0]
            inputs = [value if read is previous else read for read in node.inputs]
            value = build.node(node.op_type, inputs, dict(node.attributes), domain=node.domain)
        results.append(value)
    replace_value(attention.output, build.node("Concat", results, {"axis": rank - 2}))


class _Builder:
    """Adds operators in front of ``place``."""

    def __init__(self, graph: ir.Graph, place: ir.Node) -> None:
        self._graph, self._place = graph, place
        self._name = f"{place.outputs[0].name}/rewritten"
        self._count = 0

    def node(
        self, operator: str, inputs: Sequence[ir.Value | None], attributes: object = None, domain: str = ""
    ) -> ir.Value:
        return self.nodes(operator, inputs, attributes, domain)[0]

    def nodes(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: object = None,
        domain: str = "",
        outputs: int = 1,
    ) -> list[ir.Value]:
        given = attributes or {}
        assert isinstance(given, dict)
        plain = {name: value.value if isinstance(value, ir.Attr) else value for name, value in given.items()}
        made = ir.node(operator, inputs, attributes=plain, domain=domain, num_outputs=outputs)
        for value in made.outputs:
            self._count += 1
            value.name = f"{self._name}/{self._count}"
        self._graph.insert_before(self._place, made)
        return list(made.outputs)

    def numbers(self, values: list[int]) -> ir.Value:
        self._count += 1
        name = f"{self._name}/{self._count}"
        value = ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
        value.shape, value.dtype = ir.Shape((len(values),)), ir.DataType.INT64
        self._graph.register_initializer(value)
        return value

    def reshaped(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        return self.node("Reshape", [value, self.numbers(list(shape))])

    def transposed(self, value: ir.Value, order: tuple[int, ...]) -> ir.Value:
        return self.node("Transpose", [value], {"perm": list(order)})

    def flattened(self, value: ir.Value) -> ir.Value:
        """``[batch, tokens, heads, width]`` as ``[batch, tokens, heads * width]``."""
        producer = value.producer()
        if producer is not None and producer.op_type == "Reshape" and _rank(_input(producer, 0)) == 3:
            return _input(producer, 0)
        return self.reshaped(value, (0, 0, -1))

    def joined(self, query: ir.Value) -> ir.Value:
        """Queries ``[batch, heads, tokens, width]`` as ``[batch, tokens, heads * width]``."""
        found = _packed(query, (0, 2, 1, 3), 4)
        return self.flattened(found if found is not None else self.transposed(query, (0, 2, 1, 3)))


def _packed(value: ir.Value, order: tuple[int, ...], rank: int | None) -> ir.Value | None:
    """What ``value`` is the transpose of in ``order``, or ``None``."""
    producer = value.producer()
    if producer is None or producer.op_type != "Transpose" or _rank(value) not in (None, rank):
        return None
    return _input(producer, 0) if tuple(producer.attributes["perm"].as_ints()) == order else None


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """``value`` without the multiplication by a constant that made it, and the constant."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Mul":
        for index in (0, 1):
            number = _scalar(producer.inputs[index])
            if number is not None:
                return _input(producer, 1 - index), number
    return value, 1.0


def _scalar(value: ir.Value | None) -> float | None:
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return float(constant.numpy().reshape(())) if constant is not None and constant.size == 1 else None


def _side(value: ir.Value, index: int) -> int | None:
    side = None if value.shape is None else value.shape[index]
    return side if isinstance(side, int) else None


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ExportError(f"{node.op_type} {node.name} has no input {index}.")
    return value


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``; an output of the graph keeps its name."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        old.name, new.name = f"{old.name}/replaced", old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _remove_unused(graph: ir.Graph) -> None:
    """Drop operators whose results nothing reads, and the constants that only they read."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
