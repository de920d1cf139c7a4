"""A bundle's denoiser in INT8: Q/DQ wherever the calibration places it, with ranges of a short trajectory of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from latentedge.calibration.capture import CaptureSettings, capture
from latentedge.calibration.graph import name_nodes
from latentedge.calibration.placement import place
from latentedge.calibration.plan import ActivationPlan, BlockPlan, Plan
from latentedge.calibration.quantise import Evidence, quantise
from latentedge.export.bundle_writer import write_manifest
from latentedge.export.onnx_files import save_model, variant_of
from latentedge.runtime.bundle import Bundle


def with_int8(bundle: Bundle, folder: Path) -> Bundle:
    """Every layer that may be quantised is, whatever that does to the pictures: the compiler has to take them all."""
    component = bundle.component("unet")
    model = ir.load(bundle.variant("unet", "fp32")[0])
    name_nodes(model)
    placed = [entry for entry in place(model) if entry.kept is None]
    assert len(placed) > 5
    seen, _ = capture(CaptureSettings(str(bundle.path), samples=1, steps=2, threads=1), folder)
    blocks: dict[str, list[str]] = {}
    for entry in placed:
        blocks.setdefault(entry.block, []).append(entry.layer.name)
    chosen = tuple(BlockPlan(name, "int8", "", tuple(layers)) for name, layers in blocks.items())
    names = {entry.layer.activation for entry in placed}
    ranges = {name: ActivationPlan(float(seen[name].channel_amax.max()), "absmax") for name in names}
    assert len({entry.amax for entry in ranges.values()}) > len(ranges) // 2, "ranges are what was seen"
    plan = Plan("unet", "tensorrt", "int8", 30.0, chosen, ranges)
    assert quantise(model, plan, Evidence({name: seen[name] for name in names}))
    path = bundle.path / "unet" / "model.int8.onnx"
    save_model(model, path)
    variants = {**component.variants, "int8": variant_of(bundle.path, path)}
    components = {**bundle.manifest.components, "unet": dataclasses.replace(component, variants=variants)}
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, components=components))
    return Bundle.open(bundle.path)
