"""The layers of an ONNX graph that can be quantised: where they are, what they read, and what part they play."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from latentedge.runtime.bundle import EXTERNAL_DATA_LIMIT, Array
from latentedge.runtime.errors import LatentEdgeError

#: Operators with weights, and the axis of their output channels when the weight is stored as ONNX defines it.
WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")

#: Numbered lists that stand inside a block, in diffusers' and CompVis's names.
INSIDE_BLOCKS = re.compile(r"\.(?:transformer_blocks|to_out|in_layers|out_layers|emb_layers)\b")

#: Operators that change the shape of a tensor but none of its values.
RESHAPING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "Expand")


@dataclass(frozen=True)
class Layer:
    """One Conv, ConvTranspose, MatMul or Gemm whose second input is a constant.

    ``channel_axis`` and ``input_axis`` are the weight's axes of output and input channels, ``feature_axis`` is the
    activation's axis of input channels. ``bias`` is the constant that is added to the output: its name, or ``None``.
    """

    name: str
    block: str
    node: str
    kind: str
    activation: str
    weight: str
    shape: tuple[int, ...]
    channel_axis: int
    input_axis: int
    feature_axis: int
    group: int = 1
    bias: str | None = None

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.shape[self.input_axis] * (self.group if self.kind == "Conv" else 1)

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.shape[self.channel_axis] * (self.group if self.kind == "ConvTranspose" else 1)

    @property
    def linear(self) -> bool:
        """Whether it is a matrix product over the last axis."""
        return self.kind in ("MatMul", "Gemm")


def load_graph(path: Path) -> ir.Model:
    """The model at ``path``; weights stay on disk until they are read."""
    try:
        return ir.load(path)
    except Exception as error:
        raise LatentEdgeError(f"{path} cannot be read as ONNX: {error}") from error


def save_graph(model: ir.Model, path: Path, *, share_weights: bool = False) -> list[Path]:
    """Write ``model``; large weights go to ``<path>.data``. Gives the files written, graph first.

    ``share_weights`` leaves weights that lie in a file beside the original there, which needs the same folder.
    """
    if share_weights:
        ir.save(model, path)
        return [path]
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    if size <= EXTERNAL_DATA_LIMIT:
        ir.save(model, path)
        return [path]
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name)
    return [path, data]


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initialiser or of a Constant node's output, or ``None`` where the value is computed."""
    if value is None:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return np.asarray(node.attributes["value"].as_tensor().numpy())
    return None


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initialiser or the output of a Constant node."""
    if value is None:
        return False
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def new_initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Add the initialiser ``name``; an equal name that exists already is an error."""
    if name in graph.initializers:
        raise LatentEdgeError(f"the graph has an initialiser {name} already.")
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def remove_unused(graph: ir.Graph) -> None:
    """Drop initialisers that no node reads."""
    outputs = {id(value) for value in graph.outputs}
    for name in [name for name, value in graph.initializers.items() if not value.uses() and id(value) not in outputs]:
        del graph.initializers[name]


def find_layers(model: ir.Model) -> list[Layer]:
    """Every layer with a constant weight, in the order of the graph, with a unique name."""
    layers: list[Layer] = []
    taken: set[str] = set()
    block = ""
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in WEIGHTED:
            continue
        layer = _layer(node)
        if layer is None:
            continue
        name = _unique(layer_name(node), taken)
        block = block_name(name) or block or f"layers.{len(layers) // 6}"
        layers.append(dataclasses.replace(layer, name=name, block=block))
    return layers


def _layer(node: ir.Node) -> Layer | None:
    """The layer of a node, not yet named; ``None`` where the node is none that can be quantised."""
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or weight is None or is_constant(activation):
        return None
    if weight.const_value is None or weight.const_value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    shape = tuple(int(side) for side in weight.const_value.shape.numpy())
    transposed = node.attributes.get_int("transB", 0) == 1 if node.op_type == "Gemm" else False
    if node.op_type == "MatMul" and len(shape) != 2:
        return None
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1:
        return None
    axes = {"Conv": (0, 1, 1), "ConvTranspose": (1, 0, 1), "MatMul": (1, 0, -1)}
    channel, inputs, feature = axes.get(node.op_type, (0, 1, -1) if transposed else (1, 0, -1))
    bias = _bias(node)
    return Layer(
        name="",
        block="",
        node=str(node.name),
        kind=node.op_type,
        activation=str(activation.name),
        weight=str(weight.name),
        shape=shape,
        channel_axis=channel,
        input_axis=inputs,
        feature_axis=feature,
        group=node.attributes.get_int("group", 1) or 1,
        bias=None if bias is None else str(bias.name),
    )


def _bias(node: ir.Node) -> ir.Value | None:
    """The constant added to a layer's output: its third input, or the other side of the Add that reads it."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return node.inputs[2] if node.inputs[2].const_value is not None else None
    uses = list(node.outputs[0].uses())
    if node.op_type != "MatMul" or len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    return other if other is not None and other.const_value is not None and len(other.const_value.shape) == 1 else None


def layer_name(node: ir.Node) -> str:
    """The layer's name in the model it came from: by its weight, its exporter's scopes, its bias, or its node."""
    for value in (node.inputs[1], _bias(node)):
        name = "" if value is None else str(value.name)
        if "." in name and "::" not in name and name.rsplit(".", 1)[1] in ("weight", "bias", "weight_transposed"):
            return name.rsplit(".", 1)[0]
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        names = [str(name) for name in ast.literal_eval(scopes)]
        if len(names) > 1 and names[-2]:
            return names[-2]
    name = str(node.name)
    if "/" in name:
        return ".".join(part for part in name.split("/")[:-1] if part)
    return name


def block_name(layer: str) -> str | None:
    """A layer's block: its name up to the second number (``down_blocks.0.resnets.1``); ``None`` where it has none."""
    parts = INSIDE_BLOCKS.split(layer)[0].split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()][:2]
    return ".".join(parts[: numbered[-1] + 1]) if numbered and "." in layer else None


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    taken.add(candidate)
    return candidate


def ancestors(values: Iterable[ir.Value | None], stop: frozenset[str] = frozenset()) -> set[str]:
    """Names of all values that ``values`` are computed from, themselves included; nothing above ``stop``."""
    found: set[str] = set()
    stack = [value for value in values if value is not None]
    while stack:
        value = stack.pop()
        name = str(value.name)
        if name in found:
            continue
        found.add(name)
        producer = value.producer()
        if producer is not None and name not in stop:
            stack.extend(entry for entry in producer.inputs if entry is not None)
    return found


def node_by_name(model: ir.Model) -> dict[str, ir.Node]:
    """Every node by its name; an error where two share one."""
    nodes: dict[str, ir.Node] = {}
    for node in model.graph:
        if node.name in nodes:
            raise LatentEdgeError(f"two nodes of the graph are named {node.name}.")
        nodes[str(node.name)] = node
    return nodes


def value_by_name(model: ir.Model) -> dict[str, ir.Value]:
    """Every value of the graph by name: inputs, initialisers and node outputs."""
    values = {str(value.name): value for value in model.graph.inputs}
    values |= {str(name): value for name, value in model.graph.initializers.items()}
    for node in model.graph:
        values |= {str(value.name): value for value in node.outputs}
    return values


def name_nodes(model: ir.Model) -> None:
    """Give every node without a name, or with another's, a name of its own; layers are addressed by it."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph):
        name = str(node.name or f"{node.op_type}_{index}")
        node.name = _unique(re.sub(r"\s", "_", name), taken)


def downstream(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a value, looking through operators that only reshape."""
    for use in value.uses():
        if use.node.op_type in RESHAPING:
            yield from downstream(use.node.outputs[0])
        else:
            yield use.node
