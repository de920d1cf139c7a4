"""Writes the INT8 graph: explicit QuantizeLinear and DequantizeLinear nodes where the plan says so.

Weights are stored as INT8 with one scale for each output channel and a DequantizeLinear; activations get one pair of
Q/DQ for each tensor, with one symmetric scale. Biases, outputs and everything without weights stay as they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from latentedge.calibration import smoothing
from latentedge.calibration.graph import (
    Layer,
    constant,
    name_nodes,
    new_initializer,
    node_by_name,
    remove_unused,
    value_by_name,
)
from latentedge.calibration.observers import TensorStatistics
from latentedge.calibration.placement import Placed, place
from latentedge.calibration.plan import ActivationPlan, Plan
from latentedge.calibration.ranges import scale_of
from latentedge.calibration.weights import quantise_weight
from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import LatentEdgeError

#: QuantizeLinear with an axis, and with float16 scales.
OPSET_PER_CHANNEL, OPSET_HALF = 13, 19


@dataclass(frozen=True)
class Evidence:
    """What calibration measured: statistics by activation, and what to add to the bias by layer."""

    statistics: Mapping[str, TensorStatistics]
    bias: Mapping[str, Array] = field(default_factory=dict)


def quantise(model: ir.Model, plan: Plan, evidence: Evidence, original: ir.Model | None = None) -> tuple[str, ...]:
    """Quantise ``model`` in place; gives the names of the layers that became INT8.

    ``original`` is the fp32 graph that the plan was made for, where ``model`` is its float16 form: layers are matched
    by their nodes, because casting renames weights and some activations.
    """
    name_nodes(model)
    placed = place(model)
    source = {entry.layer.activation: entry.layer.activation for entry in placed}
    if original is not None:
        name_nodes(original)
        placed, source = _matched(placed, place(original))
    writer = _Writer(model, plan, evidence, source)
    writer.check(placed)
    groups: dict[str, list[Placed]] = {}
    for entry in placed:
        groups.setdefault(entry.layer.activation, []).append(entry)
    for tensor, group in groups.items():
        writer.group(tensor, group)
    remove_unused(model.graph)
    return tuple(writer.done)


def _matched(placed: list[Placed], original: list[Placed]) -> tuple[list[Placed], dict[str, str]]:
    """The layers of a cast graph by their names in the original, and the original activation of each one."""
    by_node = {entry.layer.node: entry for entry in original}
    found, source = [], {}
    for entry in placed:
        if entry.layer.node not in by_node:
            raise LatentEdgeError(
                f"the fp16 graph has a layer {entry.layer.node} that the fp32 graph does not have.",
                hint="export the checkpoint again with --precision fp32,fp16",
            )
        known = by_node[entry.layer.node]
        layer = dataclasses.replace(entry.layer, name=known.layer.name, block=known.layer.block)
        found.append(dataclasses.replace(known, layer=layer))
        source[layer.activation] = known.layer.activation
    return found, source


class _Writer:
    """One pass over a graph; Q/DQ pairs are shared by all layers that read a tensor."""

    def __init__(self, model: ir.Model, plan: Plan, evidence: Evidence, source: Mapping[str, str]) -> None:
        self.source = source
        self.graph = model.graph
        self.opset = model.opset_imports.get("", 0)
        self.plan = plan
        self.evidence = evidence
        self.nodes = node_by_name(model)
        self.values = value_by_name(model)
        self.chosen_blocks = plan.quantised_blocks()
        self.pairs: dict[str, ir.Value] = {}
        self.done: list[str] = []

    def check(self, placed: list[Placed]) -> None:
        """:class:`LatentEdgeError` where the plan does not fit the graph."""
        if self.opset < OPSET_PER_CHANNEL:
            raise LatentEdgeError(
                f"the graph's opset is {self.opset}; scales by channel need {OPSET_PER_CHANNEL}.",
                hint="export the checkpoint again",
            )
        known = {entry.block for entry in placed}
        unknown = sorted({block.name for block in self.plan.blocks} - known)
        if unknown:
            raise LatentEdgeError(
                f"the plan names blocks that {self.plan.component} does not have: {', '.join(unknown)}.",
                hint="calibrate this bundle again, or correct the plan",
            )

    def chosen(self, entry: Placed) -> bool:
        """Whether the plan quantises a layer and no rule forbids it."""
        return entry.kept is None and entry.layer.name not in self.plan.kept and entry.block in self.chosen_blocks

    def group(self, tensor: str, group: list[Placed]) -> None:
        """Quantise the chosen layers among those that read ``tensor``."""
        chosen = [entry for entry in group if self.chosen(entry)]
        if not chosen:
            return
        whole = [entry for entry in chosen if not (entry.layer.name in self.plan.split and entry.split)]
        factor = self._smooth(tensor, [entry.layer for entry in group]) if whole else None
        for entry in chosen:
            if entry in whole:
                node = self.nodes[entry.layer.node]
                node.replace_input_with(0, self._pair(tensor, self.values[tensor], node))
                self._weight(node, entry.layer, factor)
                self._bias(node, entry.layer)
                if self.plan.quantise_outputs and entry.layer.kind == "Conv":
                    self._output(node)
            else:
                self._split(entry)
            self.done.append(entry.layer.name)

    def _activation(self, tensor: str) -> ActivationPlan:
        name = self.source.get(tensor, tensor)
        if name not in self.plan.activations:
            raise LatentEdgeError(f"the plan has no range for the activation {name}.", hint="calibrate again")
        return self.plan.activations[name]

    def _statistics(self, tensor: str) -> TensorStatistics:
        return self.evidence.statistics[self.source.get(tensor, tensor)]

    def _smooth(self, tensor: str, layers: list[Layer]) -> Array | None:
        exponent = self._activation(tensor).smoothing
        affine = None if exponent is None else smoothing.affine_of(self.values[tensor], layers)
        if exponent is None:
            return None
        if affine is None:
            raise LatentEdgeError(f"the plan balances {tensor}, which no norm makes.", hint="calibrate again")
        weights = [self.nodes[layer.node].inputs[1] for layer in layers]
        arrays = [array for array in map(constant, weights) if array is not None]
        largest = smoothing.weight_amax(list(zip(arrays, [layer.input_axis for layer in layers], strict=True)))
        factor = smoothing.factors(self._statistics(tensor).channel_amax, largest, exponent)
        smoothing.divide(self.graph, affine, factor)
        for layer, array in zip(layers, arrays, strict=True):
            weight = smoothing.multiplied(array, layer.input_axis, factor)
            name = f"{layer.weight}_smoothed_{layer.node}"
            self.nodes[layer.node].replace_input_with(1, new_initializer(self.graph, name, weight))
        return factor

    def _pair(self, tensor: str, value: ir.Value, before: ir.Node) -> ir.Value:
        """The dequantised value of ``tensor``, made once."""
        if tensor not in self.pairs:
            dtype = self._dtype(before)
            scale, zero = self._constants(tensor, scale_of(self._activation(tensor).amax, dtype), dtype)
            quantized = _node("QuantizeLinear", [value, scale, zero], f"{tensor}_quantized")
            dequantized = _node("DequantizeLinear", [quantized.outputs[0], scale, zero], f"{tensor}_dequantized")
            self.graph.insert_before(before, [quantized, dequantized])
            self.pairs[tensor] = dequantized.outputs[0]
        return self.pairs[tensor]

    def _constants(self, name: str, scale: float, dtype: np.dtype[Any]) -> tuple[ir.Value, ir.Value]:
        return (
            new_initializer(self.graph, f"{name}_scale", np.array(scale, dtype)),
            new_initializer(self.graph, f"{name}_zero_point", np.zeros((), np.int8)),
        )

    def _dtype(self, node: ir.Node) -> np.dtype[Any]:
        """The type that a layer computes in: float16 in a float16 graph."""
        weight = node.inputs[1]
        half = weight is not None and weight.dtype == ir.DataType.FLOAT16
        if half and self.opset < OPSET_HALF:
            raise LatentEdgeError(f"the graph's opset is {self.opset}; float16 scales need {OPSET_HALF}.")
        return np.dtype(np.float16 if half else np.float32)

    def _weight(self, node: ir.Node, layer: Layer, factor: Array | None, part: slice | None = None) -> None:
        """Replace the weight (its input channels ``part``) by INT8 and a DequantizeLinear."""
        array = constant(node.inputs[1])
        assert array is not None
        dtype = self._dtype(node)
        power = self._statistics(layer.activation).channel_power()
        power = power if factor is None else power / np.square(factor)
        if part is not None:
            array, power = array[:, part], power[part]
        quantised = quantise_weight(array, layer.channel_axis, layer.input_axis, power, clip=self.plan.clip_weights)
        name = f"{layer.weight}_{node.name}"
        scales = np.maximum(quantised.scales, np.finfo(dtype).tiny).astype(dtype)
        inputs = [
            new_initializer(self.graph, f"{name}_int8", quantised.levels),
            new_initializer(self.graph, f"{name}_scale", scales),
            new_initializer(self.graph, f"{name}_zero_point", np.zeros(scales.shape, np.int8)),
        ]
        dequantized = _node("DequantizeLinear", inputs, f"{name}_dequantized", {"axis": quantised.axis})
        self.graph.insert_before(node, dequantized)
        node.replace_input_with(1, dequantized.outputs[0])

    def _bias(self, node: ir.Node, layer: Layer) -> None:
        """Add the measured correction to the layer's bias, where it has one."""
        correction = self.evidence.bias.get(layer.name)
        if not self.plan.correct_bias or correction is None or layer.bias is None:
            return
        owner, index = bias_place(node)
        array = constant(owner.inputs[index])
        assert array is not None
        corrected = (array.astype(np.float64) + correction).astype(array.dtype)
        owner.replace_input_with(index, new_initializer(self.graph, f"{layer.bias}_corrected_{node.name}", corrected))

    def _output(self, node: ir.Node) -> None:
        value = node.outputs[0]
        tensor = str(value.name)
        uses = [(use.node, use.idx) for use in value.uses()]
        dtype = self._dtype(node)
        scale, zero = self._constants(f"{tensor}_output", scale_of(self._activation(tensor).amax, dtype), dtype)
        quantized = _node("QuantizeLinear", [value, scale, zero], f"{tensor}_output_quantized")
        dequantized = _node("DequantizeLinear", [quantized.outputs[0], scale, zero], f"{tensor}_output_dequantized")
        self.graph.insert_after(node, [quantized, dequantized])
        for user, index in uses:
            user.replace_input_with(index, dequantized.outputs[0])

    def _split(self, entry: Placed) -> None:
        """Cut a 1x1 convolution on concatenated inputs in two, so that each input has its own range."""
        layer, node = entry.layer, self.nodes[entry.layer.node]
        joined = self.values[layer.activation].producer()
        assert joined is not None
        total: ir.Value | None = None
        start = 0
        for index, value in enumerate(joined.inputs):
            assert value is not None
            width = self.evidence.statistics[str(value.name)].channel_amax.size
            name = f"{node.name}_part{index}"
            inputs = [value, node.inputs[1], *(node.inputs[2:] if index == 0 else ())]
            part = ir.node("Conv", inputs, dict(node.attributes), name=name)
            part.outputs[0].name = name
            self.graph.insert_before(node, part)
            part.replace_input_with(0, self._pair(str(value.name), value, part))
            self._weight(part, layer, None, slice(start, start + width))
            if index == 0:
                self._bias(part, layer)
            if total is None:
                total = part.outputs[0]
            else:
                joined_parts = _node("Add", [total, part.outputs[0]], f"{name}_sum")
                self.graph.insert_before(node, joined_parts)
                total = joined_parts.outputs[0]
            start += width
        assert total is not None
        for use in list(node.outputs[0].uses()):
            use.node.replace_input_with(use.idx, total)
        self.graph.remove(node, safe=True)


def bias_place(node: ir.Node) -> tuple[ir.Node, int]:
    """The node and input that hold a layer's bias: its own third input, or the Add after a MatMul."""
    if node.op_type != "MatMul":
        return node, 2
    use = next(iter(node.outputs[0].uses()))
    return use.node, 1 - use.idx


def _node(kind: str, inputs: list[ir.Value], name: str, attributes: dict[str, int] | None = None) -> ir.Node:
    node = ir.node(kind, inputs, attributes or {}, name=name)
    node.outputs[0].name = name
    return node
