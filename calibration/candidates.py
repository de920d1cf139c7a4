"""INT8 graphs on trial: written beside the bundle's own, opened through the runtime as any precision, then removed."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from latentedge.calibration.graph import load_graph, save_graph
from latentedge.calibration.plan import Plan, write_atomically
from latentedge.calibration.quantise import Evidence, quantise
from latentedge.runtime.bundle import MANIFEST_NAME, Bundle, Component, Manifest, Variant, file_sha256
from latentedge.runtime.errors import LatentEdgeError


def build(bundle: Bundle, plan: Plan, evidence: Evidence) -> tuple[ir.Model, tuple[str, ...]]:
    """The quantised graph of a plan, and the layers that became INT8; :class:`LatentEdgeError` where there are none."""
    model = load_graph(bundle.variant(plan.component, plan.floats)[0])
    original = load_graph(bundle.variant(plan.component, "fp32")[0]) if plan.floats != "fp32" else None
    layers = quantise(model, plan, evidence, original)
    if not layers:
        raise LatentEdgeError("the plan quantises no layer.", hint="set a block's precision to int8 in the plan")
    return model, layers


@contextmanager
def candidate(bundle: Bundle, plan: Plan, evidence: Evidence) -> Iterator[Bundle]:
    """The bundle with the plan's graph as its int8 variant; the graph's files are removed at the end."""
    model, _ = build(bundle, plan, evidence)
    folder = bundle.variant(plan.component, "fp32")[0].parent
    path = folder / f".candidate-{uuid.uuid4().hex}.onnx"
    files: list[Path] = []
    try:
        files = save_graph(model, path, share_weights=True)
        yield with_variant(bundle, plan.component, "int8", variant_of(bundle, files))
    finally:
        for file in files or [path, path.with_name(path.name + ".data")]:
            file.unlink(missing_ok=True)


def remove_leftovers(bundle: Bundle) -> None:
    """Remove the graphs that a calibration which was killed had on trial, or observed, beside the bundle's own."""
    for component in bundle.manifest.components:
        folder = bundle.variant(component, "fp32")[0].parent
        for file in (*folder.glob(".candidate-*"), *folder.glob(".*.observed-*.onnx")):
            file.unlink(missing_ok=True)


def variant_of(bundle: Bundle, files: list[Path]) -> Variant:
    """The manifest's record of a graph and its weight files."""
    graph, *weights = files
    return Variant(
        graph.relative_to(bundle.path).as_posix(),
        file_sha256(graph),
        sum(file.stat().st_size for file in files),
        {file.relative_to(bundle.path).as_posix(): file_sha256(file) for file in weights},
    )


def with_component(manifest: Manifest, component: Component) -> Manifest:
    """The manifest with one component replaced."""
    return dataclasses.replace(manifest, components={**manifest.components, component.name: component})


def with_variant(bundle: Bundle, component: str, precision: str, variant: Variant) -> Bundle:
    """The bundle, in memory, with one precision of a component added or replaced.

    Parts that the component was split into lose that precision: they were cut from the graph that is replaced.
    """
    found = bundle.component(component)
    changed = dataclasses.replace(found, variants={**found.variants, precision: variant})
    manifest = with_component(bundle.manifest, changed)
    for part in parts_with(bundle, component, precision):
        kept = {name: other for name, other in part.variants.items() if name != precision}
        parity = {name: record for name, record in part.parity.items() if name != precision}
        manifest = with_component(manifest, dataclasses.replace(part, variants=kept, parity=parity))
    return Bundle(bundle.path, manifest)


def parts_with(bundle: Bundle, component: str, precision: str) -> list[Component]:
    """The parts that ``component`` was split into and that are there in ``precision``."""
    found = bundle.manifest.components.values()
    return [part for part in found if part.name.startswith(f"{component}.") and precision in part.variants]


def write_manifest(bundle: Bundle) -> None:
    """Replace the manifest file by ``bundle``'s manifest, at once."""
    import json

    text = json.dumps(bundle.manifest.to_json(), indent=2) + "\n"
    write_atomically(bundle.path / MANIFEST_NAME, text.encode())
