"""The decoder goes the same way as the denoiser, on the latents that its trajectories end in."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from latentedge.calibration.calibrate import DECODER_MARGIN_DB, Options, Reporter, calibrate, reapply
from latentedge.calibration.capture import CaptureSettings, capture
from latentedge.calibration.graph import load_graph, name_nodes
from latentedge.calibration.lint import lint
from latentedge.calibration.placement import place
from latentedge.calibration.plan import Plan
from latentedge.calibration.planning import NothingToQuantise, check_quantisable
from latentedge.runtime.bundle import Bundle, file_sha256
from latentedge.runtime.machine import machine_fingerprint
from latentedge.runtime.pipeline import Pipeline
from latentedge.runtime.selection import component_precision, library_version
from latentedge.runtime.verify import verify_bundle
from tests.calibration.graphs import Builder, _model, write_bundle

DECODER = "vae_decoder"
OPTIONS = Options(samples=5, pictures=2, backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def calibrated_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_bundle(tmp_path_factory.mktemp("decoder") / "test.bundle", decoder_width=32)
    calibrate(made.path, OPTIONS, Reporter())
    return made.path


@pytest.fixture
def calibrated(calibrated_once: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(calibrated_once, tmp_path / "calibrated.bundle"))


def test_its_graph_is_written_and_judged_by_its_own_pictures(calibrated: Bundle) -> None:
    path, variant = calibrated.variant(DECODER, "int8")
    assert lint(load_graph(path), quantised_outputs=True) == []
    quality = next(record for record in variant.measured if record["kind"] == "quality")
    assert quality["floor_mean_db"] == 30 + DECODER_MARGIN_DB
    assert calibrated.manifest.calibration[DECODER]["plan"] == f"calibration/{DECODER}/plan.json"
    assert calibrated.manifest.calibration["plan"] == "calibration/plan.json"
    plan = Plan.load(calibrated.path / "calibration" / DECODER / "plan.json")
    assert plan.component == DECODER
    assert plan.kept["decoder.conv"] == "last convolution"
    # What the record says is what decoding gives: the same latents with the float and with the quantised graph.
    with Pipeline(calibrated, "onnxruntime", "fp32") as pipeline:
        steps = list(pipeline.steps(seed=1_000_000))
        decoded = {name: pipeline.engine(DECODER) if name == "fp32" else None for name in ("fp32", "int8")}
        assert decoded["fp32"] is not None
        whole = pipeline.decode(steps[-1].latents)
    assert whole.shape[-1] == 3
    assert quality["psnr_worst_db"] < 90


def pays(bundle: Bundle, ratio_low: float, psnr_db: float) -> str:
    """The decoder's precision beside an int8 denoiser where its records say this."""
    owner = bundle.component(DECODER)
    known = {"backend": "onnxruntime", "precision": "int8"}
    machine = {"machine": machine_fingerprint(), "library": library_version("onnxruntime")}
    records: list[dict[str, Any]] = [
        {"kind": "latency", **known, **machine, "ratio": 2.0, "ratio_low": ratio_low, "reference": "onnxruntime fp32"},
        {"kind": "quality", **known, "psnr_db": psnr_db, "psnr_worst_db": psnr_db, "floor_db": 30.0},
    ]
    variant = dataclasses.replace(owner.variants["int8"], measured=tuple(records))
    component = dataclasses.replace(owner, variants={**owner.variants, "int8": variant})
    return component_precision(component, "int8", "onnxruntime")


def test_it_runs_in_int8_only_where_it_was_measured_faster_and_good_enough(calibrated: Bundle) -> None:
    assert pays(calibrated, 1.2, 40.0) == "int8"
    assert pays(calibrated, 0.9, 40.0) == "fp32"
    assert pays(calibrated, 1.2, 20.0) == "fp32"
    unknown = dataclasses.replace(calibrated.component(DECODER).variants["int8"], measured=())
    component = calibrated.component(DECODER)
    component = dataclasses.replace(component, variants={**component.variants, "int8": unknown})
    assert component_precision(component, "int8", "onnxruntime") == "fp32"
    assert component_precision(component, "fp32", "onnxruntime") == "fp32"


def test_its_plan_can_be_edited_and_applied_alone(calibrated: Bundle) -> None:
    file = calibrated.path / "calibration" / DECODER / "plan.json"
    plan = dataclasses.replace(Plan.load(file), floor_db=1.0)
    before = calibrated.component("unet").variants["int8"]
    outcome = reapply(calibrated.path, plan, OPTIONS, Reporter())
    assert [part.plan.component for part in outcome.parts] == [DECODER]
    assert Bundle.open(calibrated.path).component("unet").variants["int8"].sha256 == before.sha256
    assert Plan.load(file).floor_db == 1.0


def test_it_is_observed_on_the_latents_that_trajectories_end_in(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "test.bundle", decoder_width=32)
    folder = bundle.path / "calibration" / "samples"
    settings = CaptureSettings(str(bundle.path), samples=1, threads=1)
    capture(settings, folder)
    own = CaptureSettings(str(bundle.path), DECODER, samples=1, threads=1, latents=str(folder / settings.digest()[:16]))
    statistics, probes = capture(own, bundle.path / "calibration" / DECODER)
    with Pipeline(bundle, "onnxruntime", "fp32") as pipeline:
        latents = list(pipeline.steps(seed=0))[-1].latents
    scaled = latents / np.float32(bundle.manifest.latent.scale_factor)
    np.testing.assert_allclose(probes[0].inputs["latent_sample"], scaled, atol=1e-4)
    assert probes[0].timestep == 0
    assert {"decoder.mid.0.norm1_output", "decoder.mid.0.norm2_output"} == set(statistics)


def test_a_decoder_without_layers_to_quantise_says_why(bundle: Bundle) -> None:
    with pytest.raises(NothingToQuantise, match="1 of 1: first convolution"):
        check_quantisable(bundle, DECODER)


def test_the_distance_to_a_codebook_stays_float() -> None:
    b = Builder()
    tokens = b.linear("before.0", "latent_sample", 32, 32)
    distances = b.linear("codebook.0", tokens, 32, 64)
    indices = b.node("ArgMin", [distances], "indices", axis=-1, keepdims=0)
    table = b.constant("table", np.ones((64, 32), np.float32))
    b.linear("after.0", b.node("Gather", [table, indices], "entries"), 32, 32)
    model = ir.from_proto(_model(b, {"latent_sample": ["batch", 5, 32]}, "after.0_output"))
    name_nodes(model)
    kept = {entry.layer.name: entry.kept for entry in place(model)}
    assert kept == {"before.0": None, "codebook.0": "distance to a codebook", "after.0": None}


def parity(bundle: Bundle) -> dict[str, str]:
    report = verify_bundle(bundle.path, "onnxruntime", "int8")
    return {check.subject: check.status for check in report.checks if check.kind == "parity"}


def test_verify_runs_the_int8_graphs_again(calibrated: Bundle) -> None:
    assert parity(calibrated) == {"unet int8": "ok", f"{DECODER} int8": "ok"}
    record = next(e for e in calibrated.component("unet").variants["int8"].measured if e["kind"] == "parity")
    assert 5 < record["psnr_db"] < 60
    # Another graph under the same name: all weights half as large again, and the digest of the new file.
    path, _ = calibrated.variant("unet", "int8")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if "weight" in tensor.name and tensor.name.endswith("_scale"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
    onnx.save(model, path)
    manifest = calibrated.path / "latentedge.json"
    data = json.loads(manifest.read_text())
    data["components"]["unet"]["variants"]["int8"]["sha256"] = file_sha256(path)
    manifest.write_text(json.dumps(data))
    assert parity(calibrated)["unet int8"] == "FAILED"
    assert parity(calibrated)[f"{DECODER} int8"] == "ok"


def test_changed_vectors_are_found(calibrated: Bundle) -> None:
    file = calibrated.path / "reports" / "parity" / "unet.int8.npz"
    file.write_bytes(file.read_bytes()[:-1])
    report = verify_bundle(calibrated.path, "onnxruntime", "int8")
    assert [check.subject for check in report.checks if check.status == "FAILED"] == ["reports/parity/unet.int8.npz"]
