"""Loop-invariant hoisting: a denoiser's graph split by which of its inputs a node depends on.

``conditioning``: what depends on the conditioning alone, above all keys and values of cross-attention; once for each
prompt. ``timestep``: what depends on the timestep (and perhaps the conditioning) but not on the sample, the time
embedding and its projections; once for each timestep of a schedule. ``step``: the rest. The three compute what the
whole graph computes, operator by operator. The shape of an input is not its data: what is computed from the shape of
``sample`` alone, such as a batch size, is repeated in every part that needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from latentedge.export.bundle_writer import write_manifest
from latentedge.export.errors import ExportError
from latentedge.export.graph_cut import extract
from latentedge.export.onnx_files import save_model, variant_of
from latentedge.export.session import HostSession
from latentedge.runtime.bundle import Array, Axis, Bundle, Component, Dimension, TensorSpec
from latentedge.runtime.engines.hoisted import DENOISER, PARTS, part_name
from latentedge.runtime.errors import ParityError
from latentedge.runtime.parity import TensorParity, compare

#: Stage of a value: 0 and 1 are hoisted, 2 is computed in each step; constants and input shapes have none.
CONSTANT, CONDITIONING, TIMESTEP, STEP = -1, 0, 1, 2

#: Operators whose result depends on the shape of their input only.
SHAPE_ONLY = {"Shape", "Size"}

#: Recomposed parts must agree with the whole graph; what is left is the runtime's own choice of fused kernels.
FLOOR_DB = 100.0
#: How much further from fp32 the parts may be than the whole graph in the same precision.
ALLOWED_LOSS_DB = 1.0

#: The precision that is split; the others are cut at the same values, and the hoisted parts run in it.
REFERENCE = "fp32"


def split(graph: ir.Graph, kept: frozenset[str] = frozenset()) -> dict[str, ir.Graph]:
    """A denoiser's graphs by part; one that would hold nothing is not there.

    Values named in ``kept`` are computed in each step although they could be hoisted.
    """
    stages = _stages(graph, kept)
    crossing = [value for value in _values(graph) if _crosses(value, stages)]
    graphs = {}
    for stage, part in enumerate(PARTS):
        outputs = list(graph.outputs) if stage == STEP else [value for value in crossing if stages[value] == stage]
        if outputs:
            taken = [value for value in crossing if stages[value] < stage]
            graphs[part] = extract_part(graph, [*graph.inputs, *taken], outputs)
    return graphs


def cut_step(graph: ir.Graph, step: Component) -> ir.Graph:
    """The step part of the same denoiser in another precision, with the inputs that ``step`` declares.

    Hoisted values arrive in the declared dtype and are cast to the graph's own. :class:`ExportError` when the graph
    lost one of them.
    """
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    missing = [spec.name for spec in step.inputs if spec.name not in values]
    if missing:
        raise ExportError(f"{step.name}: this precision's graph has no value named {', '.join(missing)}.")
    inputs = [values[spec.name] for spec in step.inputs]
    part = extract_part(graph, inputs, [values[spec.name] for spec in step.outputs], every_input=True)
    for value, spec in zip(part.inputs, step.inputs, strict=True):
        declared = ir.DataType.from_numpy(np.dtype(spec.dtype))
        if value.dtype not in (None, declared):
            cast_input(part, value, declared)
    return part


def hoist_bundle(path: Path) -> tuple[str, ...]:
    """Split the denoiser of the bundle at ``path`` in every precision, and write the parts into its manifest.

    Parts that are there are written anew. Hoisted parts run in fp32 whatever the precision of the step, so that int8
    never touches them. Gives the names of the new components; none when there is nothing to hoist.
    """
    manifest = Bundle.open(path).manifest
    whole = manifest.components[DENOISER]
    others = {name: part for name, part in manifest.components.items() if not name.startswith(f"{DENOISER}.")}
    parts = hoist(path, whole)
    if parts:
        step = part_name(DENOISER, PARTS[STEP])
        for precision in whole.variants:
            if precision != REFERENCE:
                parts[step] = add_precision(path, whole, parts, precision)
    write_manifest(path, dataclasses.replace(manifest, components={**others, **parts}))
    return tuple(parts)


def hoist(folder: Path, component: Component) -> dict[str, Component]:
    """Split the fp32 graph of ``component`` in ``folder`` (a bundle), write the parts beside it, and compare.

    Returns the new components by name, each with its variant: ``unet.conditioning``, ``unet.timestep``, ``unet.step``;
    nothing when the graph has nothing to hoist. :class:`~latentedge.runtime.errors.ParityError` when the parts do not
    give what the whole graph gives.
    """
    path = folder / component.variants[REFERENCE].path
    kept: frozenset[str] = frozenset()
    while True:
        model = ir.load(path)
        parts = split(model.graph, kept)
        if len(parts) == 1:
            return {}
        files = {part: write_part(graph, model, part, path) for part, graph in parts.items()}
        specs, refused = _boundary_specs(component, parts, files)
        if not refused:
            break
        kept |= refused
    components = {}
    for part, graph in parts.items():
        declared = _declaration(component, part, graph, specs)
        components[declared.name] = dataclasses.replace(declared, variants={REFERENCE: variant_of(folder, files[part])})
    found = compare(*_recomposed(folder, component, REFERENCE, components, REFERENCE))
    if found.psnr_db < FLOOR_DB:
        raise ParityError(
            f"{component.name} in parts does not give what the whole graph gives: {found.describe()}, "
            f"the floor is {FLOOR_DB:g} dB."
        )
    return _with_record(components, REFERENCE, found, FLOOR_DB, path.name)


def add_precision(folder: Path, whole: Component, parts: Mapping[str, Component], precision: str) -> Component:
    """The step component with the variant ``precision``, cut from the whole graph in that precision.

    :class:`~latentedge.runtime.errors.ParityError` when the parts are further from the whole fp32 graph than the whole
    graph in ``precision`` is.
    """
    name = part_name(whole.name, PARTS[STEP])
    path = folder / whole.variants[precision].path
    model = ir.load(path)
    file = write_part(cut_step(model.graph, parts[name]), model, PARTS[STEP], path)
    step = parts[name]
    step = dataclasses.replace(step, variants={**step.variants, precision: variant_of(folder, file)})
    reference, recomposed = _recomposed(folder, whole, REFERENCE, {**parts, name: step}, precision)
    _, single = _recomposed(folder, whole, precision, {}, precision)
    found, floor = compare(reference, recomposed), compare(reference, single).psnr_db - ALLOWED_LOSS_DB
    if found.psnr_db < floor:
        raise ParityError(
            f"{whole.name} in {precision} and in parts is further from fp32 than the whole graph in {precision}: "
            f"{found.describe()}, expected at least {floor:.1f} dB."
        )
    return _with_record({name: step}, precision, found, floor, path.name)[name]


def _recomposed(
    folder: Path, whole: Component, precision: str, parts: Mapping[str, Component], step_precision: str
) -> tuple[Array, Array]:
    """The first output of the whole graph in ``precision`` and of its parts, on the same random inputs.

    Values of several sizes, in one row: where a rounding to INT8 falls the other way, few values tell little.
    Without ``parts`` the second is what the whole graph in ``precision`` gives.
    """
    cases = [random_inputs(whole.inputs, lengths) for lengths in axis_lengths(whole.axes)]
    output = whole.outputs[0].name
    with HostSession(folder / whole.variants[precision].path) as session:
        reference = _in_a_row(session.run(known)[output] for known in cases)
    if not parts:
        return reference, reference
    for part in parts.values():
        variant = part.variants[step_precision if step_precision in part.variants else REFERENCE]
        with HostSession(folder / variant.path) as session:
            for known in cases:
                known |= session.run({spec.name: known[spec.name] for spec in part.inputs})
    return reference, _in_a_row(known[output] for known in cases)


def _in_a_row(arrays: Iterable[Array]) -> Array:
    return np.concatenate([array.ravel() for array in arrays])


def _with_record(
    components: Mapping[str, Component], precision: str, found: TensorParity, floor: float, reference: str
) -> dict[str, Component]:
    """``components`` whose step says how well the parts reproduce the whole."""
    changed = dict(components)
    step = next(name for name in changed if name.endswith(f".{PARTS[STEP]}"))
    numbers = {"psnr_db": round(found.psnr_db, 2), "max_abs_error": found.max_abs_error, "floor_psnr_db": floor}
    variants = dict(changed[step].variants)
    record = {"kind": "parity", "reference": reference, "backend": "onnxruntime cpu", **numbers}
    variants[precision] = dataclasses.replace(variants[precision], measured=(record,))
    parity = {**changed[step].parity, precision: {**numbers, "cases": len(axis_lengths(components[step].axes))}}
    changed[step] = dataclasses.replace(changed[step], variants=variants, parity=parity)
    return changed


def axis_lengths(axes: Mapping[str, Axis]) -> list[dict[str, int]]:
    """Three sets of small axis lengths in which every axis that may vary has a ratio of its own."""
    sets = []
    for turn in range(3):
        lengths = {}
        for index, (name, axis) in enumerate(axes.items()):
            lowest = -(-axis.min // axis.multiple)
            wanted = (lowest + (turn * (index + 1) + turn * turn * (index % 2) + index) % 7) * axis.multiple
            lengths[name] = min(wanted, axis.max)
        sets.append(lengths)
    return sets


def dimension(lengths: list[int], axes: list[dict[str, int]]) -> Dimension | None:
    """A side as the manifest writes it, from its length in several sets of axis lengths; ``None`` if it is no such."""
    if len(set(lengths)) == 1:
        return lengths[0]
    for name in axes[0]:
        factor, rest = divmod(lengths[0], axes[0][name])
        if rest == 0 and all(length == factor * found[name] for length, found in zip(lengths, axes, strict=True)):
            return name if factor == 1 else f"{factor}*{name}"
    return None


def solve_spec(name: str, arrays: list[Array], cases: list[dict[str, int]]) -> TensorSpec | None:
    """The declaration of a tensor from what it was for several axis lengths; ``None`` if the manifest has no such."""
    sides = [dimension([array.shape[index] for array in arrays], cases) for index in range(arrays[0].ndim)]
    declared = tuple(side for side in sides if side is not None)
    if arrays[0].dtype.kind != "f" or len(declared) < len(sides):
        return None
    return TensorSpec(name, str(arrays[0].dtype), declared)


def _stages(graph: ir.Graph, kept: frozenset[str]) -> dict[ir.Value, int]:
    names = {"sample": STEP, "timestep": TIMESTEP}
    stages = {value: names.get(str(value.name), CONDITIONING) for value in graph.inputs}
    inputs = set(graph.inputs)
    for node in graph:
        read = [value for value in _read(node) if value is not None]
        if node.op_type in SHAPE_ONLY and node.domain == "" and read[0] in inputs:
            stage = CONSTANT
        else:
            stage = max((stages.get(value, CONSTANT) for value in read), default=CONSTANT)
        for value in node.outputs:
            stages[value] = STEP if stage != CONSTANT and value.name in kept else stage
    return stages


def _read(node: ir.Node) -> Iterator[ir.Value | None]:
    """Everything that a node reads: its inputs, and what its subgraphs capture."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
            for inner in graphs:
                for nested in ir.traversal.RecursiveGraphIterator(inner):
                    yield from nested.inputs


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from node.outputs


def _crosses(value: ir.Value, stages: Mapping[ir.Value, int]) -> bool:
    """Whether a hoisted value is read by a later part, or is an output of the graph."""
    stage = stages[value]
    if stage not in (CONDITIONING, TIMESTEP):
        return False
    return value.is_graph_output() or any(_stage_of(node, stages) > stage for node in value.consumers())


def _stage_of(node: ir.Node, stages: Mapping[ir.Value, int]) -> int:
    return max(stages.get(value, CONSTANT) for value in node.outputs)


def extract_part(
    graph: ir.Graph, inputs: list[ir.Value], outputs: list[ir.Value], *, every_input: bool = False
) -> ir.Graph:
    """The part between ``inputs`` and ``outputs``, with the inputs that it reads, or with all of them."""
    part = extract(graph, inputs, outputs)
    unread = [value for value in part.inputs if not value.uses() and not value.is_graph_output()]
    for value in () if every_input else unread:
        part.inputs.remove(value)
    return part


def cast_input(part: ir.Graph, value: ir.Value, declared: ir.DataType) -> None:
    """Make a part's input of dtype ``declared``, and cast it to what the part computes in."""
    own = value.dtype
    assert own is not None
    users = list(value.uses())
    node = ir.node("Cast", [value], attributes={"to": int(own)})
    for use in users:
        use.node.replace_input_with(use.idx, node.outputs[0])
    node.outputs[0].name, node.outputs[0].dtype = f"{value.name}/hoisted", own
    # A new type object: clones of a graph share theirs.
    value.type = ir.TensorType(declared)
    part.insert_before(part[0], node)


def write_part(graph: ir.Graph, model: ir.Model, part: str, path: Path) -> Path:
    """Write a part beside ``path``; weights that lie in a file of their own are shared with the whole graph."""
    file = path.with_name(part + path.name.removeprefix("model"))
    functions = list(model.functions.values())
    save_model(ir.Model(graph, ir_version=model.ir_version, functions=functions), file, keep_external=True)
    return file


def _boundary_specs(
    component: Component, parts: Mapping[str, ir.Graph], files: Mapping[str, Path]
) -> tuple[dict[str, TensorSpec], frozenset[str]]:
    """Declarations of the hoisted values, and those that the manifest cannot declare: they stay in the step."""
    found: dict[str, list[Array]] = {}
    cases = axis_lengths(component.axes)
    for axes in cases:
        known = random_inputs(component.inputs, axes)
        for part in PARTS[:STEP]:
            if part in files:
                with HostSession(files[part]) as session:
                    computed = session.run({name: known[name] for name in _names(parts[part].inputs)})
                known.update(computed)
                for name, array in computed.items():
                    found.setdefault(name, []).append(array)
    solved = {name: solve_spec(name, arrays, cases) for name, arrays in found.items()}
    specs = {name: spec for name, spec in solved.items() if spec is not None}
    return specs, frozenset(found) - frozenset(specs)


def _declaration(whole: Component, part: str, graph: ir.Graph, boundary: Mapping[str, TensorSpec]) -> Component:
    known = {spec.name: spec for spec in (*whole.inputs, *whole.outputs)} | dict(boundary)
    inputs = tuple(known[name] for name in _names(graph.inputs))
    used = {side.rpartition("*")[2] for spec in inputs for side in spec.shape if isinstance(side, str)}
    axes = {name: axis for name, axis in whole.axes.items() if name in used}
    outputs = tuple(known[name] for name in _names(graph.outputs))
    return Component(part_name(whole.name, part), inputs, outputs, axes)


def _names(values: Iterable[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def random_inputs(specs: tuple[TensorSpec, ...], axes: Mapping[str, int]) -> dict[str, Array]:
    """Inputs of a comparison: N(0, 1) draws, zeros for integers; the same on every call."""
    generator = np.random.default_rng(7)
    arrays: dict[str, Array] = {}
    for spec in specs:
        shape, dtype = spec.resolve(axes), np.dtype(spec.dtype)
        arrays[spec.name] = (
            generator.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)
        )
    return arrays
