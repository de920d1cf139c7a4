"""Bringing a foreign ONNX graph to the bundle's contract: names, dtypes and shapes of inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from latentedge.runtime.bundle import Component, TensorSpec
from latentedge.runtime.errors import LatentEdgeError

RANDOM_OPERATORS = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
#: Names that older exporters gave: ours by theirs.
OUTPUT_NAMES = {"out_sample": ("out_sample", "sample", "output"), "sample": ("sample", "image", "output")}


@dataclass(frozen=True)
class Tensor:
    """An input or output as a graph declares it; sides are lengths, or ``None`` where they may change."""

    dtype: ir.DataType
    sides: tuple[int | None, ...]


@dataclass(frozen=True)
class Graph:
    """What a graph file says about itself."""

    path: Path
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    precision: str
    files: tuple[Path, ...]

    def encoding(self) -> str:
        """How a first stage's encoder gives its latent."""
        return "kl" if "latent_parameters" in self.outputs else "plain"

    def fitted(self, spec: Component) -> Component:
        """``spec`` with the outputs that this graph has; :class:`LatentEdgeError` where it cannot be met."""
        expected, found = [entry.name for entry in spec.inputs], list(self.inputs)
        if sorted(expected) != sorted(found):
            raise LatentEdgeError(
                f"{self.path} takes the inputs {', '.join(found)}; expected: {', '.join(expected)}.",
                hint="export it again with optimum-onnx, without further inputs",
            )
        for entry in spec.inputs:
            self._check(entry, self.inputs[entry.name])
        outputs = [entry for entry in spec.outputs if self._output(entry.name) is not None]
        if spec.name == "vae_encoder" and self.encoding() == "plain":
            latent = self._output("latent_sample")
            if latent is None:
                raise LatentEdgeError(
                    f"{self.path} gives {', '.join(self.outputs)}; expected latent_parameters or latent_sample."
                )
            channels = latent[1].sides[1]
            outputs = [replace(spec.outputs[0], name="latent_sample", shape=_with_channels(spec.outputs[0], channels))]
        missing = [entry.name for entry in spec.outputs if entry not in outputs and not _optional(entry.name)]
        if missing and spec.name != "vae_encoder":
            raise LatentEdgeError(f"{self.path} gives {', '.join(self.outputs)}; missing: {', '.join(missing)}.")
        return replace(spec, outputs=tuple(outputs))

    def messages(self, spec: Component) -> list[str]:
        """What of the contract this graph meets only in part."""
        if spec.name != "unet":
            return []
        timestep = self.inputs["timestep"]
        found = []
        if timestep.dtype in INTEGERS:
            found.append("the UNet takes whole timesteps: samplers that ask for fractions get the nearest whole one")
        if timestep.sides in ((), (1,)):
            found.append("the UNet takes one timestep for a whole batch")
        return found

    def adapt(self, model: ir.Model, spec: Component) -> None:
        """Change ``model``, this graph read again, to take and give exactly what ``spec`` declares."""
        graph = model.graph
        for entry in spec.inputs:
            _adapt_input(graph, next(value for value in graph.inputs if value.name == entry.name), entry)
        ordered = {value.name: value for value in graph.inputs}
        graph.inputs[:] = [ordered[entry.name] for entry in spec.inputs]
        by_name = {value.name: value for value in graph.outputs}
        outputs = []
        for entry in spec.outputs:
            named = self._output(entry.name)
            assert named is not None
            outputs.append(_adapted_output(graph, by_name[named[0]], entry))
        graph.outputs[:] = outputs

    def _output(self, name: str) -> tuple[str, Tensor] | None:
        for candidate in OUTPUT_NAMES.get(name, (name,)):
            if candidate in self.outputs:
                return candidate, self.outputs[candidate]
        return None

    def _check(self, entry: TensorSpec, found: Tensor) -> None:
        allowed = INTEGERS if entry.dtype == "int64" else FLOATS
        if entry.name == "timestep":
            if found.dtype not in (*INTEGERS, *FLOATS) or len(found.sides) > 1:
                raise LatentEdgeError(f"{self.path}: timestep is {found.dtype.name} of {len(found.sides)} axes.")
            return
        fits = len(found.sides) == len(entry.shape) and all(
            side is None or not isinstance(declared, int) or side == declared
            for side, declared in zip(found.sides, entry.shape, strict=True)
        )
        fixed = fits and any(
            side is not None and not isinstance(declared, int)
            for side, declared in zip(found.sides, entry.shape, strict=True)
        )
        if found.dtype not in allowed or not fits or fixed:
            raise LatentEdgeError(
                f"{self.path}: {entry.name} is {found.dtype.name} {list(found.sides)}; expected {entry.dtype} "
                f"{list(entry.shape)}.",
                hint="export it again with dynamic axes" if fixed else "its config.json must be of the same model",
            )


def _optional(name: str) -> bool:
    return name in ("pooler_output", "last_hidden_state")


def _with_channels(entry: TensorSpec, channels: int | None) -> tuple[int | str, ...]:
    shape = list(entry.shape)
    if channels is not None:
        shape[1] = channels
    elif isinstance(shape[1], int):
        shape[1] //= 2
    return tuple(shape)


def read_graph(path: Path) -> Graph:
    """Read what ``path`` takes and gives; :class:`LatentEdgeError` for a damaged graph or one that draws noise."""
    try:
        model = ir.load(path)
    except Exception as error:
        # protobuf and onnx_ir raise errors of no common class for damaged files.
        raise LatentEdgeError(f"{path} is no ONNX graph: {error}", hint="copy or export it again") from error
    drawing = sorted({node.op_type for node in model.graph if node.op_type in RANDOM_OPERATORS})
    if drawing:
        raise LatentEdgeError(
            f"{path} draws its own noise ({', '.join(drawing)}), so a result could not be repeated.",
            hint="export it again with a newer optimum, whose vae_encoder gives latent_parameters",
        )
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    weights = {path.parent / str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    missing = sorted(str(file) for file in weights if not file.is_file())
    if missing:
        raise LatentEdgeError(f"{path} keeps its weights in {', '.join(missing)}, which is missing.")
    half = sum(tensor.nbytes for tensor in tensors if tensor.dtype == ir.DataType.FLOAT16)
    full = sum(tensor.nbytes for tensor in tensors if tensor.dtype == ir.DataType.FLOAT)
    return Graph(
        path,
        {str(value.name): _declared(value) for value in model.graph.inputs},
        {str(value.name): _declared(value) for value in model.graph.outputs},
        "fp16" if half > full else "fp32",
        (path, *sorted(weights)),
    )


def _declared(value: ir.Value) -> Tensor:
    sides = tuple(side if isinstance(side, int) else None for side in value.shape or ())
    return Tensor(value.dtype or ir.DataType.UNDEFINED, sides)


def _adapt_input(graph: ir.Graph, value: ir.Value, entry: TensorSpec) -> None:
    """Put conversions between a new input of the declared kind and the users of the old one."""
    wanted = ir.DataType.INT64 if entry.dtype == "int64" else ir.DataType.FLOAT
    found, sides = value.dtype, list(value.shape or ())
    fixed_batch = entry.name == "timestep" and sides in ([], [1])
    if found == wanted and not fixed_batch:
        value.shape = ir.Shape(entry.shape)
        return
    users = list(value.uses())
    value.name = f"{entry.name}_original"
    replacement = ir.Value(name=entry.name, shape=ir.Shape(entry.shape), type=ir.TensorType(wanted))
    nodes, current = [], replacement
    if fixed_batch:
        nodes += _first_entry(current, entry.name, len(sides))
        current = nodes[-1].outputs[0]
    if found in INTEGERS and wanted == ir.DataType.FLOAT:
        nodes.append(ir.node("Round", [current], name=f"{entry.name}/round"))
        current = nodes[-1].outputs[0]
    if found != wanted:
        nodes.append(ir.node("Cast", [current], {"to": int(found or 0)}, name=f"{entry.name}/cast"))
        current = nodes[-1].outputs[0]
    for node in nodes:
        node.outputs[0].name = f"{node.name}_output"
    first = next(iter(graph), None)
    if first is None:
        graph.extend(nodes)
    else:
        graph.insert_before(first, nodes)
    for user, position in users:
        user.replace_input_with(position, current)
    graph.inputs[list(graph.inputs).index(value)] = replacement


def _first_entry(current: ir.Value, name: str, rank: int) -> list[ir.Node]:
    """The first of a batch of timesteps, as [1] or as a scalar."""
    indices = ir.tensor([0] if rank else 0, dtype=ir.DataType.INT64)
    constant = ir.node("Constant", [], {"value": indices}, name=f"{name}/index")
    return [constant, ir.node("Gather", [current, constant.outputs[0]], {"axis": 0}, name=f"{name}/first")]


def _adapted_output(graph: ir.Graph, value: ir.Value, entry: TensorSpec) -> ir.Value:
    if value.dtype == ir.DataType.FLOAT:
        value.name = entry.name
        value.shape = ir.Shape(entry.shape)
        return value
    value.name = f"{entry.name}_original"
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{entry.name}/cast")
    graph.append(cast)
    result = cast.outputs[0]
    result.name = entry.name
    result.type = ir.TensorType(ir.DataType.FLOAT)
    result.shape = ir.Shape(entry.shape)
    return result
