"""Exported bundles of diffusers pipelines, drawn by ONNX Runtime, against recorded arrays and diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.model import SourceOptions
from latentedge.export.sources import load_source
from latentedge.runtime.engines import EngineOptions
from latentedge.runtime.pipeline import Pipeline
from tests.export.sources import diffusers_models
from tests.export.sources.diffusers_running import Recorder, recorder, torch_pipeline
from tests.export.sources.test_diffusers_pictures import CASES, compare

__all__ = ["recorder"]

RECORDED = Path(__file__).parents[2] / "golden" / "diffusers" / "ldm-uncond"
#: One case of each model; those whose graphs differ from another's only in their weights are left to the torch tests.
EXPORTED = (
    "sd", "sd2", "sdxl", "sdxl inpaint9, default strength", "sdxl refiner, scores", "lcm", "inpaint9", "ip2p", "taesd",
    "ldm-text2im", "ldm-superres, eta",
)  # fmt: skip


def opened(path: Path) -> Pipeline:
    return Pipeline.open(path, backend="onnxruntime", precision="fp32", options=EngineOptions(threads=1))


@pytest.fixture(scope="module")
def recorded_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded unconditional pipeline, exported."""
    path = tmp_path_factory.mktemp("ldm") / "ldm.bundle"
    export_source(load_source(RECORDED / "model", SourceOptions()), path, ExportOptions())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", ["default", "eta1"])
def test_recorded_pictures(recorded_bundle: Path, case: str) -> None:
    entry = json.loads((RECORDED / "call.json").read_text())["cases"][case]
    arrays = np.load(RECORDED / entry["file"])
    with opened(recorded_bundle) as pipe:
        if case == "default":
            sample = arrays["unet0_sample"]
            timestep = np.full(len(sample), arrays["unet0_timestep"], np.float32)
            output = pipe.engine("unet").run({"sample": sample, "timestep": timestep})["out_sample"]
            assert np.abs(output - arrays["unet0_out"]).max() < 1e-5
        check_recorded(pipe, entry, arrays)


def check_recorded(pipe: Pipeline, entry: dict[str, Any], arrays: Any) -> None:
    """Final latents within 1e-3 of the recorded ones, 8-bit pictures within one level."""
    draws = [arrays[draw["key"]] for draw in entry["noise_draws"]][1:]
    result = pipe.generate(
        steps=entry["call"]["num_inference_steps"],
        eta=entry["call"]["eta"],
        latents=arrays["latents_in"],
        noise=np.stack(draws) if draws else None,
    )
    assert np.abs(result.latents - arrays["latent"]).max() < 1e-3
    expected = np.rint(arrays["image"] * 255).astype(int)
    found = np.stack([np.asarray(image) for image in result.images]).astype(int)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("case", ["default", "eta1"])
def test_recorded_pictures_in_torch(case: str, tmp_path: Path) -> None:
    entry = json.loads((RECORDED / "call.json").read_text())["cases"][case]
    pipe = torch_pipeline(load_source(RECORDED / "model", SourceOptions()), tmp_path / "ldm")
    check_recorded(pipe, entry, np.load(RECORDED / entry["file"]))


def test_recorded_first_stage(tmp_path: Path) -> None:
    """The first stage alone, exported: picture to latent, latent through the codebook to picture."""
    arrays = np.load(RECORDED / "vq_encode.npz")
    export_source(load_source(RECORDED / "model" / "vqvae", SourceOptions()), tmp_path / "vq", ExportOptions())
    with opened(tmp_path / "vq") as pipe:
        latents = pipe.engine("vae_encoder").run({"sample": arrays["image"]})["latent_sample"]
        assert np.abs(latents - arrays["latents"]).max() < 5e-5
        decoded = pipe.engine("vae_decoder").run({"latent_sample": arrays["latents"]})["sample"]
        assert np.abs(decoded - arrays["decode"]).max() < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_and_drawn(name: str, tmp_path: Path, recorder: Recorder) -> None:
    case = CASES[name]
    theirs = diffusers_models.save(case.model, tmp_path / "model")
    model = load_source(tmp_path / "model", SourceOptions())
    export_source(model, tmp_path / "out.bundle", ExportOptions(precisions=("fp32", "fp16")))
    with opened(tmp_path / "out.bundle") as pipe:
        compare(case, theirs, pipe, recorder)
