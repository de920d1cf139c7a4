"""Which layers may be quantised, and why the others stay in higher precision.

The rules come from what TensorRT's builder fuses and what hurts latent diffusion models; ``docs/calibration.md``
lists them with their reasons.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from latentedge.calibration.graph import Layer, ancestors, find_layers, is_constant, node_by_name, value_by_name

#: Fewer channels than this keep a kernel's tiles mostly empty.
SMALLEST_WIDTH = 16

#: Groups of layers that are decided together, apart from the blocks they stand in.
SHORTCUTS = "shortcuts"


@dataclass(frozen=True)
class Placed:
    """A layer, and the reason why it must stay in higher precision (``None``: it may be quantised)."""

    layer: Layer
    #: The group that sensitivity measures and the plan decides on.
    block: str
    kept: str | None = None
    #: Names of the tensors that a shortcut convolution reads joined; empty where it has one input.
    split: tuple[str, ...] = ()


def place(model: ir.Model) -> list[Placed]:
    """Every layer of the graph with its block and the rule that keeps it in higher precision, if there is one."""
    layers = find_layers(model)
    nodes, values = node_by_name(model), value_by_name(model)
    latent = _depends_on(model, "sample" if "sample" in {v.name for v in model.graph.inputs} else None)
    first, last = _first(layers, nodes), _last(model, layers, nodes)
    searched = _searched(model, layers, nodes)
    placed = []
    for layer in layers:
        shortcut = is_shortcut(layer, nodes)
        split = _concatenated(values[layer.activation]) if shortcut else ()
        block = SHORTCUTS if shortcut else layer.block
        placed.append(Placed(layer, block, searched.get(layer.name) or _kept(layer, nodes, latent, first, last), split))
    return placed


def _kept(layer: Layer, nodes: dict[str, ir.Node], latent: set[str], first: set[str], last: set[str]) -> str | None:
    if layer.name in first:
        return "first convolution"
    if layer.name in last:
        return "last convolution"
    if layer.group != 1:
        return "grouped convolution"
    if min(layer.inputs, layer.outputs) < SMALLEST_WIDTH:
        return f"fewer than {SMALLEST_WIDTH} channels"
    if layer.activation not in latent and not _reads_context(layer, nodes):
        return "time or vector embedding"
    data = nodes[layer.node].inputs[0]
    if layer.kind == "Gemm" or (layer.linear and data is not None and is_one_row(data)):
        return "matrix with one row for each picture"
    return None


def is_one_row(value: ir.Value) -> bool:
    """Whether a value is known to be a matrix of one row."""
    return value.shape is not None and len(value.shape) == 2 and value.shape[0] == 1


def _depends_on(model: ir.Model, name: str | None) -> set[str]:
    """Names of all values computed from the input ``name``; of every input where it is ``None``."""
    reached = {str(value.name) for value in model.graph.inputs if name is None or value.name == name}
    for node in model.graph:
        if node.op_type not in ("Shape", "Size") and any(v is not None and v.name in reached for v in node.inputs):
            reached.update(str(value.name) for value in node.outputs)
    return reached


def _reads_context(layer: Layer, nodes: dict[str, ir.Node]) -> bool:
    """Whether a layer projects the tokens of the conditioning, which is a matrix of many rows."""
    found = ancestors([nodes[layer.node].inputs[0]])
    return "encoder_hidden_states" in found and "timestep" not in found


def _first(layers: list[Layer], nodes: dict[str, ir.Node]) -> set[str]:
    """The convolutions that read the graph's input without another layer before them."""
    weights = {layer.weight for layer in layers}
    return {
        layer.name
        for layer in layers
        if layer.kind == "Conv" and not ancestors([nodes[layer.node].inputs[0]]) & weights
    }


def _last(model: ir.Model, layers: list[Layer], nodes: dict[str, ir.Node]) -> set[str]:
    """The convolutions whose output becomes the graph's without another layer in between."""
    outputs = {str(nodes[layer.node].outputs[0].name): layer for layer in layers}
    above = ancestors(model.graph.outputs, frozenset(outputs))
    return {layer.name for name, layer in outputs.items() if name in above and layer.kind == "Conv"}


def _searched(model: ir.Model, layers: list[Layer], nodes: dict[str, ir.Node]) -> dict[str, str]:
    """The layers whose output picks an entry of a table: a rounded distance would pick another one."""
    outputs = {str(nodes[layer.node].outputs[0].name): layer.name for layer in layers}
    picks = [node for node in model.graph if node.op_type in ("ArgMin", "ArgMax", "TopK")]
    above = ancestors([node.inputs[0] for node in picks], frozenset(outputs))
    return {name: "distance to a codebook" for output, name in outputs.items() if output in above}


def is_shortcut(layer: Layer, nodes: dict[str, ir.Node]) -> bool:
    """Whether a 1x1 convolution carries a residual block's input around the block, to the Add at its end."""
    if layer.kind != "Conv" or any(side != 1 for side in layer.shape[2:]):
        return False
    for use in nodes[layer.node].outputs[0].uses():
        if use.node.op_type == "Add" and not is_constant(use.node.inputs[1 - use.idx]):
            other = use.node.inputs[1 - use.idx]
            return layer.activation in ancestors([other], frozenset({layer.activation}))
    return False


def _concatenated(value: ir.Value) -> tuple[str, ...]:
    """Names of the tensors that a Concat over channels joins; empty where the value is no such Concat."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or node.attributes.get_int("axis", 0) not in (1, -3):
        return ()
    names = [str(entry.name) for entry in node.inputs if entry is not None and not is_constant(entry)]
    return tuple(names) if len(names) == len(node.inputs) else ()
