"""Step caching: two graphs cut from the same denoiser, so that neighbouring steps share what its deep blocks compute.

A U-Net joins its upward path with skip connections; the tensor that arrives there from below changes slowly from step
to step (the observation behind DeepCache, arXiv 2312.00858). The ``full`` graph is the whole step with that tensor as
a second output, the ``shallow`` one takes it as an input and computes only what lies above it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from latentedge.export.bundle_writer import write_manifest
from latentedge.export.errors import ExportError
from latentedge.export.hoisting import (
    FLOOR_DB,
    REFERENCE,
    axis_lengths,
    cast_input,
    extract_part,
    random_inputs,
    solve_spec,
    write_part,
)
from latentedge.export.onnx_files import variant_of
from latentedge.export.session import HostSession
from latentedge.runtime.bundle import Array, Bundle, Component, Variant
from latentedge.runtime.engines.hoisted import DENOISER, FULL, SHALLOW, part_name
from latentedge.runtime.errors import ParityError, UsageError
from latentedge.runtime.parity import FLOORS, compare

#: Lowest PSNR of the cut graphs against the uncut one in the same precision: kernels are fused differently, and a
#: quantised value may be rounded to its neighbour.
CUT_FLOORS = {**FLOORS, REFERENCE: FLOOR_DB, "int8": 30.0}


def joins(graph: ir.Graph) -> list[str]:
    """Names of the tensors that come from below into each join with a skip connection, the outermost first.

    A join is a concatenation of two tensors along the channels; the one that is computed later comes from below.
    """
    order = {node: index for index, node in enumerate(graph)}
    found = []
    for node in graph:
        values = [value for value in node.inputs if value is not None]
        if node.op_type == "Concat" and node.attributes["axis"].as_int() == 1 and len(values) == 2:
            producers = [order.get(value.producer(), -1) for value in values]  # type: ignore[arg-type]
            ranks = {len(value.shape) for value in (*values, node.outputs[0]) if value.shape is not None}
            if min(producers) >= 0 and ranks <= {4}:
                found.append(str(values[producers.index(max(producers))].name))
    return found[::-1]


def cut(graph: ir.Graph, deep: str) -> dict[str, ir.Graph]:
    """The full and the shallow graph for the tensor ``deep``; :class:`ExportError` where the cut saves nothing."""
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    if deep not in values:
        raise ExportError(f"the graph has no value named {deep}.")
    outputs = list(graph.outputs)
    full = extract_part(graph, list(graph.inputs), [*outputs, values[deep]], every_input=True)
    shallow = extract_part(graph, [*graph.inputs, values[deep]], outputs)
    if len(shallow) >= len(full):
        raise ExportError(
            f"cutting the denoiser at {deep} leaves {len(shallow)} of {len(full)} operators in each step."
        )
    return {FULL: full, SHALLOW: shallow}


def cut_bundle(path: Path, depth: int = 0) -> tuple[str, ...]:
    """Write the full and shallow graphs of the bundle at ``path``, in every precision of its ``unet.step``.

    ``depth`` counts the joins that the shallow graph holds beside the outermost: deeper costs more and keeps more
    detail. Gives the new components' names. :class:`UsageError` when the bundle's denoiser is not in parts or has
    no such join.
    """
    manifest = Bundle.open(path).manifest
    name = part_name(DENOISER, "step")
    if name not in manifest.components:
        raise UsageError(f"{path} holds its denoiser whole; step caching cuts the part {name}.")
    step = manifest.components[name]
    found = joins(ir.load(path / step.variants[REFERENCE].path).graph)
    if depth >= len(found):
        raise UsageError(f"the denoiser has {len(found)} joins with skip connections; depth {depth} was asked for.")
    cuts: dict[str, Component] = {}
    for precision in sorted(step.variants, key=lambda item: item != REFERENCE):
        _cut_precision(path, step, found[depth], precision, cuts)
    others = {key: part for key, part in manifest.components.items() if key not in cuts}
    write_manifest(path, dataclasses.replace(manifest, components={**others, **cuts}))
    return tuple(cuts)


def _cut_precision(folder: Path, step: Component, deep: str, precision: str, cuts: dict[str, Component]) -> None:
    """Cut one precision, declare the components where this is the first, compare, and add the variants."""
    path = folder / step.variants[precision].path
    model = ir.load(path)
    graphs = cut(model.graph, deep)
    _in_float32(graphs, deep)
    plain = path.with_name(path.name.replace("step", "model", 1))
    files = {part: write_part(graph, model, part, plain) for part, graph in graphs.items()}
    if not cuts:
        cuts.update(_declare(step, graphs, deep, files[FULL]))
    records = _compare(step, path, {name: cuts[name] for name in cuts}, files, precision)
    for part, file in files.items():
        name = part_name(DENOISER, part)
        variant: Variant = dataclasses.replace(variant_of(folder, file), measured=(records[part],))
        cuts[name] = dataclasses.replace(
            cuts[name],
            variants={**cuts[name].variants, precision: variant},
            parity={**cuts[name].parity, precision: {k: v for k, v in records[part].items() if k != "kind"}},
        )


def _in_float32(graphs: Mapping[str, ir.Graph], deep: str) -> None:
    """The tensor crosses from one graph into the other in float32, whatever the graphs compute in."""
    for graph in graphs.values():
        for value in graph.inputs:
            if value.name == deep and value.dtype not in (None, ir.DataType.FLOAT):
                cast_input(graph, value, ir.DataType.FLOAT)
        for index, value in enumerate(graph.outputs):
            if value.name == deep and value.dtype not in (None, ir.DataType.FLOAT):
                node = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
                value.name, node.outputs[0].name = f"{deep}/own", deep
                node.outputs[0].dtype = ir.DataType.FLOAT
                graph.append(node)
                graph.outputs[index] = node.outputs[0]


def _declare(step: Component, graphs: Mapping[str, ir.Graph], deep: str, full: Path) -> dict[str, Component]:
    cases = axis_lengths(step.axes)
    with HostSession(full) as session:
        arrays = [session.run(random_inputs(step.inputs, axes))[deep] for axes in cases]
    spec = solve_spec(deep, arrays, cases)
    if spec is None:
        raise ExportError(f"the shape of {deep} is no multiple of the denoiser's axes: {[a.shape for a in arrays]}.")
    known = {declared.name: declared for declared in (*step.inputs, spec)}
    inputs = tuple(known[str(value.name)] for value in graphs[SHALLOW].inputs)
    return {
        part_name(DENOISER, FULL): Component(
            part_name(DENOISER, FULL), step.inputs, (*step.outputs, spec), dict(step.axes)
        ),
        part_name(DENOISER, SHALLOW): Component(part_name(DENOISER, SHALLOW), inputs, step.outputs, dict(step.axes)),
    }


def _compare(
    step: Component, path: Path, cuts: Mapping[str, Component], files: Mapping[str, Path], precision: str
) -> dict[str, dict[str, object]]:
    """Records of both graphs against the uncut one; :class:`ParityError` for one that gives something else."""
    known: dict[str, Array] = random_inputs(step.inputs, axis_lengths(step.axes)[0])
    output, floor = step.outputs[0].name, CUT_FLOORS[precision]
    with HostSession(path) as session:
        reference = session.run(known)[output]
    records: dict[str, dict[str, object]] = {}
    for part in (FULL, SHALLOW):
        component = cuts[part_name(DENOISER, part)]
        with HostSession(files[part]) as session:
            computed = session.run({spec.name: known[spec.name] for spec in component.inputs})
        known.update({name: array for name, array in computed.items() if name != output})
        found = compare(reference, computed[output])
        if found.psnr_db < floor:
            raise ParityError(
                f"the {part} graph of {DENOISER} in {precision} does not give what the uncut one gives: "
                f"{found.describe()}, the floor is {floor:g} dB."
            )
        records[part] = {
            "kind": "parity",
            "reference": path.name,
            "psnr_db": round(found.psnr_db, 2),
            "max_abs_error": found.max_abs_error,
            "floor_psnr_db": floor,
            "cases": 1,
        }
    return records
