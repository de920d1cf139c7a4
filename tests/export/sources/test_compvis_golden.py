"""Recorded runs of the original code, reproduced from checkpoint to picture.

Once with the source's networks in torch as engines (seconds), once through ONNX (minutes).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")
pytest.importorskip("onnxruntime")

from latentedge.export.exporter import ExportOptions, export_source  # noqa: E402
from latentedge.export.model import SourceOptions  # noqa: E402
from latentedge.export.sources import compvis  # noqa: E402
from latentedge.runtime import Pipeline  # noqa: E402
from tests.export.sources import compvis_models  # noqa: E402

GOLDEN = Path(__file__).parents[2] / "golden" / "compvis"
#: What may differ, in latents whose standard deviation is 3 to 14, in U-Net outputs (0.7) and in encodings (1).
LATENTS, UNET, ENCODINGS = 1e-3, 1e-5, 5e-5
ANCESTRAL = 1e-5
ENGINES = ["torch", pytest.param("onnx", marks=pytest.mark.slow)]
DIFFUSION = ["txt2img_kl_bert", "uncond_vq"]


@dataclass
class Recorded:
    """A family's arrays, and a pipeline of its checkpoint."""

    family: str
    arrays: dict[str, Any]
    pipeline: Any

    @property
    def condition(self) -> dict[str, Any]:
        if self.family != "txt2img_kl_bert":
            return {}
        return {
            "prompt_ids": self.arrays["token_ids"],
            "negative_prompt_ids": self.arrays["uncond_token_ids"],
            "guidance_scale": float(self.arrays["cfg_scale"]),
        }


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    kept: dict[tuple[str, str], Recorded] = {}

    def open_family(family: str, engine: str) -> Recorded:
        if (family, engine) not in kept:
            source = compvis.load(GOLDEN / family, SourceOptions())
            with np.load(GOLDEN / family / "golden.npz") as file:
                arrays = {name: file[name] for name in file.files}
            pipeline = compvis_models.torch_pipeline(source)
            if engine == "onnx":
                bundle = tmp_path_factory.mktemp(family) / "bundle"
                export_source(source, bundle, ExportOptions())
                pipeline = Pipeline.open(bundle, backend="auto", precision="fp32")
            kept[family, engine] = Recorded(family, arrays, pipeline)
        return kept[family, engine]

    return open_family


def distance(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", DIFFUSION)
@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("plms", 0.0), ("ddim", 1.0)])
def test_latents_and_pictures(opened: Any, family: str, engine: str, sampler: str, eta: float) -> None:
    recorded = opened(family, engine)
    name = f"{sampler}_eta1" if eta else sampler
    noise = {"noise": recorded.arrays["ddim_eta1_noise"]} if eta else {}
    result = recorded.pipeline.generate(
        latents=recorded.arrays["x_T"], steps=8, sampler=sampler, eta=eta, **recorded.condition, **noise
    )
    assert distance(result.latents, recorded.arrays[f"{name}_latent"]) < LATENTS
    pictures = np.stack([np.asarray(image) for image in result.images]).astype(int)
    assert np.abs(pictures - recorded.arrays[f"{name}_image_u8"]).max() <= 1


@pytest.mark.parametrize("engine", ENGINES)
def test_ancestral_sampling(opened: Any, engine: str) -> None:
    recorded = opened("uncond_vq", engine)
    arrays = recorded.arrays
    result = recorded.pipeline.generate(latents=arrays["ddpm_x_T"], noise=arrays["ddpm_noise"], steps=8, sampler="ddpm")
    assert distance(result.latents, arrays["ddpm_latent"]) < ANCESTRAL


@pytest.mark.parametrize("engine", ENGINES)
def test_guidance_of_one_is_no_guidance(opened: Any, engine: str) -> None:
    recorded = opened("txt2img_kl_bert", engine)
    condition = {**recorded.condition, "guidance_scale": 1.0}
    condition.pop("negative_prompt_ids")
    result = recorded.pipeline.generate(latents=recorded.arrays["x_T"], steps=8, sampler="ddim", eta=0.0, **condition)
    assert distance(result.latents, recorded.arrays["ddim_nocfg_latent"]) < LATENTS


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", DIFFUSION)
def test_unet(opened: Any, family: str, engine: str) -> None:
    recorded = opened(family, engine)
    unet, arrays = recorded.pipeline.engine("unet"), recorded.arrays
    context = {"encoder_hidden_states": arrays["cond"]} if "cond" in arrays else {}
    for index, timestep in enumerate(arrays["unet_t"]):
        inputs = {"sample": arrays["unet_x"], "timestep": np.full(2, timestep, np.float32), **context}
        assert distance(unet.run(inputs)["out_sample"], arrays["unet_out"][index]) < UNET
    mixed = {"sample": arrays["unet_x"], "timestep": arrays["unet_tmix"].astype(np.float32), **context}
    assert distance(unet.run(mixed)["out_sample"], arrays["unet_out_tmix"]) < UNET


@pytest.mark.parametrize("engine", ENGINES)
def test_text_encoder(opened: Any, engine: str) -> None:
    recorded = opened("txt2img_kl_bert", engine)
    found = recorded.pipeline.engine("text_encoder").run({"input_ids": recorded.arrays["token_ids"]})
    assert distance(found["last_hidden_state"], recorded.arrays["cond"]) < UNET


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", [*DIFFUSION, "ae_kl"])
def test_encoder_and_decoder(opened: Any, family: str, engine: str) -> None:
    recorded = opened(family, engine)
    arrays, pipeline = recorded.arrays, recorded.pipeline
    kl = "enc_moments" in arrays
    output = "latent_parameters" if kl else "latent_sample"
    for name, expected in (
        ("enc_image", "enc_moments" if kl else "enc_prequant"),
        ("rect_enc_image", "rect_enc_moments"),
    ):
        if name in arrays:
            assert (
                distance(pipeline.engine("vae_encoder").run({"sample": arrays[name]})[output], arrays[expected])
                < ENCODINGS
            )
    latents = (arrays["dec_latent"] / np.float32(pipeline.bundle.latent.scale_factor)).astype(np.float32)
    decoded = pipeline.engine("vae_decoder").run({"latent_sample": latents})["sample"]
    assert distance(decoded, arrays["dec_image"]) < ENCODINGS


@pytest.mark.parametrize("engine", ENGINES)
def test_reconstruction(opened: Any, engine: str) -> None:
    recorded = opened("ae_kl", engine)
    result = recorded.pipeline.reconstruct(recorded.arrays["enc_image_u8"])
    expected = np.clip((recorded.arrays["rec_mode"].transpose(0, 2, 3, 1) + 1) / 2, 0, 1)
    # The original itself moves by 2e-4 between two ways to compute its convolutions.
    assert distance(result.array, expected) < 5e-4
