"""TensorRT-RTX compiles the graphs of tiny models of every kind, in every precision, for three generations of GPUs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import numpy as np
import onnx_ir as ir

from latentedge.calibration.graph import name_nodes
from latentedge.calibration.observers import TensorStatistics
from latentedge.calibration.placement import place
from latentedge.calibration.plan import ActivationPlan, BlockPlan, Plan
from latentedge.calibration.quantise import Evidence, quantise
from latentedge.export.builders import BuildRequest, Range
from latentedge.export.bundle_writer import write_manifest
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.model import SourceOptions
from latentedge.export.onnx_files import save_model, variant_of
from latentedge.export.sources import load_source
from latentedge.export.tensorrt.builder import CHECKED_CAPABILITIES, build
from latentedge.runtime.bundle import Bundle
from tests.export.sources import diffusers_models
from tests.export.tiny import tiny_model

DEFAULT_MODEL = Path(__file__).parents[3] / "examples/emoji"
#: The default model, Stable Diffusion 1.5, SDXL, inpainting with nine channels, and an LDM with a codebook.
FAMILIES = ("emoji", "sd", "sdxl", "inpaint9", "ldm-uncond")


def exported(family: str, folder: Path) -> Bundle:
    source = DEFAULT_MODEL
    if family != DEFAULT_MODEL.name:
        source = folder / "source"
        diffusers_models.save(family, source)
    model = load_source(str(source), SourceOptions())
    return with_int8(export_source(model, folder / "tiny.bundle", ExportOptions(("fp32", "fp16"))))


def with_int8(bundle: Bundle) -> Bundle:
    """The bundle with an INT8 denoiser: Q/DQ wherever the calibration places it, with made-up ranges."""
    component = bundle.component("unet")
    model = ir.load(bundle.variant("unet", "fp32")[0])
    name_nodes(model)
    placed = [entry for entry in place(model) if entry.kept is None]
    assert len(placed) > 5
    blocks: dict[str, list[str]] = {}
    for entry in placed:
        blocks.setdefault(entry.block, []).append(entry.layer.name)
    chosen = tuple(BlockPlan(name, "int8", "", tuple(layers)) for name, layers in blocks.items())
    ranges = {entry.layer.activation: ActivationPlan(4.0, "absmax") for entry in placed}
    observed = {entry.layer.activation: noise_statistics(entry.layer.inputs) for entry in placed}
    plan = Plan("unet", "tensorrt", "int8", 30.0, chosen, ranges)
    assert quantise(model, plan, Evidence(observed))
    path = bundle.path / "unet" / "model.int8.onnx"
    save_model(model, path)
    variants = {**component.variants, "int8": variant_of(bundle.path, path)}
    components = {**bundle.manifest.components, "unet": dataclasses.replace(component, variants=variants)}
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, components=components))
    return Bundle.open(bundle.path)


def noise_statistics(channels: int) -> TensorStatistics:
    statistics = TensorStatistics.empty(channels)
    statistics.observe(np.random.default_rng(0).standard_normal((8, channels)).astype(np.float32), 1, 0.0)
    return statistics


def test_a_denoiser_and_a_decoder_compile(tmp_path: Path) -> None:
    bundle = export_source(tiny_model(), tmp_path / "tiny.bundle", ExportOptions(("fp32", "fp16")))
    rows = build(BuildRequest(bundle, "tensorrt-rtx", check=True, notify=lambda message: None))
    assert [(row.component, row.precision, row.errors) for row in rows] == [
        (component, precision, ()) for precision in ("fp32", "fp16") for component in ("unet", "vae_decoder")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_compiles(family: str, tmp_path: Path) -> None:
    bundle = exported(family, tmp_path)
    rows = build(BuildRequest(bundle, "tensorrt-rtx", check=True, notify=lambda message: None))
    assert {row.target for row in rows} == {", ".join(CHECKED_CAPABILITIES)}
    assert [(row.component, row.precision, row.errors) for row in rows if row.errors] == []
    compiled = {(row.component, row.precision) for row in rows}
    assert compiled >= {("unet", "fp32"), ("unet", "fp16"), ("unet", "int8"), ("vae_decoder", "fp16")}
    sizes = {row.precision: row.weight_memory or 0 for row in rows if row.component == "unet"}
    assert sizes["int8"] < sizes["fp32"]
    assert sizes["fp16"] < 0.6 * sizes["fp32"]


@pytest.mark.slow
def test_ranges_of_batch_and_size_compile(tmp_path: Path) -> None:
    bundle = exported("ldm-uncond", tmp_path)
    side = bundle.manifest.defaults.height
    size = Range(side, 2 * side)
    request = BuildRequest(
        bundle, "tensorrt-rtx", ("fp16",), check=True, batch=Range(1, 4), size=(size, size), notify=lambda message: None
    )
    rows = build(request)
    assert {row.component for row in rows} == {"unet", "vae_encoder", "vae_decoder"}
    assert [row.errors for row in rows if row.errors] == []
