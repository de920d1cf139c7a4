"""One ONNX graph as several consecutive ones, cut at block boundaries; together they compute what the whole did.

What a later part needs of an earlier one (the hidden state, skip connections, the time embedding) becomes an output of
the one and an input of the other. Shapes and values that follow from constants alone are computed again in each part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from latentedge.export.errors import ExportError

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})

#: How deep into the module path two nodes may differ for a cut between them; ``None``: anywhere.
DEPTHS: tuple[int | None, ...] = (1, 2, 3, None)


@dataclass(frozen=True)
class CutGraph:
    """A graph prepared for cutting: nodes in order, and for each value where it is made and last read."""

    model: ir.Model
    nodes: tuple[ir.Node, ...]
    made: dict[ir.Value, int]
    last_read: dict[ir.Value, int]
    #: Values that each part computes for itself.
    recomputed: frozenset[ir.Value]

    @classmethod
    def of(cls, model: ir.Model) -> CutGraph:
        """Analyse ``model``, whose nodes must be in execution order; types that it does not declare are inferred."""
        if any(value.dtype is None or value.shape is None for node in model.graph for value in node.outputs):
            common.ShapeInferencePass()(model)
        nodes = tuple(model.graph)
        made = {value: index for index, node in enumerate(nodes) for value in node.outputs}
        last_read = {value: index for index, node in enumerate(nodes) for value in read_by(node)}
        last_read.update({value: len(nodes) for value in model.graph.outputs})
        recomputed: set[ir.Value] = set()
        for node in nodes:
            inputs = list(read_by(node))
            constant = all(value.is_initializer() or value in recomputed for value in inputs)
            recomputed.update(value for value in node.outputs if constant or _is_shape(value))
        return cls(model, nodes, made, last_read, frozenset(recomputed))

    def crossing(self, position: int) -> list[ir.Value]:
        """Values made by the first ``position`` nodes that the others or the graph's outputs need."""
        return [
            value
            for value, index in self.made.items()
            if index < position <= self.last_read.get(value, -1) and value not in self.recomputed
        ]

    def can_cut(self, position: int) -> bool:
        """Whether floats cross, and nothing else: a quantised value belongs to the node that reads it."""
        crossing = self.crossing(position)
        return bool(crossing) and all(value.dtype in _FLOATS and value.shape is not None for value in crossing)

    def weight(self, begin: int, end: int) -> int:
        """Bytes of the initialisers that the nodes from ``begin`` to ``end`` read."""
        return ([0, *self.weights_from(begin)])[end - begin]

    def weights_from(self, begin: int) -> list[int]:
        """Bytes of the initialisers of one node from ``begin`` on, of two, and so on."""
        seen: set[ir.Value] = set()
        total, totals = 0, []
        for node in self.nodes[begin:]:
            for value in self._initializers(node):
                if value not in seen:
                    seen.add(value)
                    total += 0 if value.const_value is None else value.const_value.nbytes
            totals.append(total)
        return totals

    def _initializers(self, node: ir.Node) -> Iterator[ir.Value]:
        for value in read_by(node):
            if value.is_initializer():
                yield value
            elif value in self.recomputed and (producer := value.producer()) is not None:
                yield from self._initializers(producer)


def read_by(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node reads; the graphs of this project hold no control flow."""
    return (value for value in node.inputs if value is not None)


def _is_shape(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def block_of(node: ir.Node, depth: int | None) -> tuple[str, ...]:
    """The module path of a node up to its ``depth``-th number, such as ``("input_blocks", "4")``."""
    if depth is None:
        return (node.name or "",)
    path = [part for part in re.split(r"[./]", (node.name or "").rpartition("/")[0]) if part]
    numbers = 0
    for index, part in enumerate(path):
        numbers += part.isdigit()
        if numbers == depth:
            return tuple(path[: index + 1])
    return tuple(path)


def cut_positions(graph: CutGraph, limit: int) -> list[int]:
    """Where to cut so that no part holds more than ``limit`` bytes of weights, in as few parts as possible.

    Blocks stay whole where they fit. :class:`ExportError` when not even single nodes do.
    """
    for depth in DEPTHS:
        candidates = [
            index
            for index in range(1, len(graph.nodes))
            if block_of(graph.nodes[index - 1], depth) != block_of(graph.nodes[index], depth) and graph.can_cut(index)
        ]
        positions = _greedy(graph, candidates, limit)
        if positions is not None:
            return positions
    largest = max(graph.weight(index, index + 1) for index in range(len(graph.nodes)))
    raise ExportError(
        f"the graph cannot be cut into parts of at most {limit} bytes of weights: "
        f"one of its layers alone holds {largest} bytes.",
        hint="allow larger parts, or use a precision with smaller weights",
    )


def _greedy(graph: CutGraph, candidates: Sequence[int], limit: int) -> list[int] | None:
    positions: list[int] = []
    begin = 0
    while (sizes := graph.weights_from(begin))[-1] > limit:
        fitting = {index: size for index in candidates if index > begin and (size := sizes[index - begin - 1]) <= limit}
        if not fitting or max(fitting.values()) == 0:
            return None
        # Of the cuts that leave a part at least half as full as it could be: the one that passes the least on.
        full = [index for index, size in fitting.items() if 2 * size >= max(fitting.values())]
        begin = min(full, key=lambda index: (len(graph.crossing(index)), -index))
        positions.append(begin)
    return positions


def cut(graph: CutGraph, positions: Iterable[int]) -> list[ir.Model]:
    """The parts between ``positions``, in the order in which they run. Inputs and outputs keep their names.

    :class:`ExportError` where a cut would pass nothing on, or anything but floats.
    """
    whole = graph.model.graph
    ends = [*positions, len(graph.nodes)]
    wanted = set(whole.outputs)
    parts: list[ir.Model] = []
    for begin, end in reversed(list(zip([0, *ends[:-1]], ends, strict=True))):
        outputs = [value for value, index in graph.made.items() if value in wanted and begin <= index < end]
        needed = _needed(graph, outputs, begin)
        if not outputs:
            raise ExportError(
                f"the graph cannot be cut at node {end}: the part before computes nothing for the others."
            )
        quantised = [value.name for value in needed if value in graph.made and value.dtype not in _FLOATS]
        if quantised:
            raise ExportError(
                f"the graph cannot be cut at node {begin}: quantised values would be passed on: {quantised}."
            )
        inputs = [value for value in (*whole.inputs, *graph.made) if value in needed]
        parts.insert(0, ir.Model(extract(whole, inputs, outputs), ir_version=graph.model.ir_version))
        wanted |= needed
    return parts


def extract(graph: ir.Graph, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
    """A copy of the part of ``graph`` between ``inputs`` and ``outputs``."""
    part = ir.convenience.extract(graph, inputs, outputs)
    # The library collects initialisers in a set; in a fixed order the same cut gives the same file.
    ordered = sorted(part.initializers.items())
    part.initializers.clear()
    part.initializers.update(ordered)
    return part


def _needed(graph: CutGraph, outputs: Iterable[ir.Value], begin: int) -> set[ir.Value]:
    """Graph inputs and values of earlier parts that ``outputs`` are computed from."""
    needed: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    waiting = list(outputs)
    while waiting:
        value = waiting.pop()
        if value in seen or value.is_initializer():
            continue
        seen.add(value)
        index = graph.made.get(value)
        if index is None or (index < begin and value not in graph.recomputed):
            needed.add(value)
        else:
            waiting.extend(read_by(graph.nodes[index]))
    return needed
