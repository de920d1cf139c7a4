"""Every kind of diffusers pipeline draws the same picture through the source and the runtime, noise for noise.

The networks run in torch here; that the exported graphs equal them is what the export itself proves
(``test_diffusers_export.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch

from latentedge.export.model import SourceOptions
from latentedge.export.sources import diffusers as source
from latentedge.runtime.pipeline import Pipeline
from tests.export.sources import diffusers_models
from tests.export.sources.diffusers_running import Recorder, Spy, recorder, torch_pipeline

__all__ = ["recorder"]

PROMPT = "The red cat, do a thing at 9!"
NEGATIVE = "a bad cat"


@dataclass(frozen=True)
class Case:
    """Arguments of both calls, those of ours alone, and how many draws diffusers takes."""

    model: str
    call: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    #: Whether both are given the same ``latents``; otherwise the first draw is the start.
    latents: tuple[int, ...] | None = (1, 4, 8, 8)
    draws: int = 0


def picture(side: int = 16, seed: int = 1) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def mask(side: int = 16) -> Image.Image:
    array = np.zeros((side, side), np.uint8)
    array[3:11, 5:14] = 255
    return Image.fromarray(array)


TEXT = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 4.0}
CASES = {
    "sd": Case("sd", {**TEXT, "num_inference_steps": 5}),
    "sd, no guidance": Case("sd", {**TEXT, "guidance_scale": 1.0, "num_inference_steps": 3}),
    "sd, no negative prompt, wide": Case(
        "sd", {"prompt": PROMPT, "guidance_scale": 3.0, "num_inference_steps": 3, "height": 16, "width": 24},
        latents=(1, 4, 8, 12),
    ),
    "sd, odd latent": Case(
        "sd", {**TEXT, "num_inference_steps": 2, "height": 24, "width": 16}, latents=(1, 4, 12, 8)
    ),
    "sd, two prompts": Case(
        "sd",
        {"prompt": [PROMPT, "at"], "negative_prompt": [NEGATIVE, ""], "guidance_scale": 4.0, "num_inference_steps": 3},
        latents=(2, 4, 8, 8),
    ),
    "sd2": Case("sd2", {**TEXT, "num_inference_steps": 4}),
    "sd2, rescaled guidance": Case("sd2", {**TEXT, "num_inference_steps": 4, "guidance_rescale": 0.7}),
    "sdxl": Case("sdxl", {**TEXT, "num_inference_steps": 3}),
    "sdxl, zeros": Case("sdxl", {"prompt": PROMPT, "guidance_scale": 4.0, "num_inference_steps": 3}),
    "sdxl, sizes": Case(
        "sdxl",
        {**TEXT, "num_inference_steps": 3, "guidance_rescale": 0.5, "original_size": (20, 24),
         "crops_coords_top_left": (2, 3), "target_size": (16, 18), "negative_original_size": (8, 9),
         "negative_target_size": (12, 16)},
        {"time_ids": np.float32([[20, 24, 2, 3, 16, 18]]), "negative_time_ids": np.float32([[8, 9, 0, 0, 12, 16]])},
    ),
    "lcm": Case("lcm", {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 8.5}, draws=3),
    "lcm, one step": Case("lcm", {"prompt": PROMPT, "num_inference_steps": 1, "guidance_scale": 3.0}),
    "turbo": Case("turbo", {"prompt": PROMPT, "num_inference_steps": 1, "guidance_scale": 0.0}),
    "turbo, four steps": Case("turbo", {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 0.0}),
    "inpaint9": Case(
        "inpaint9",
        {**TEXT, "num_inference_steps": 4, "image": picture(), "mask_image": mask(), "height": 16, "width": 16},
        draws=1,
    ),
    "inpaint9, resized": Case(
        "inpaint9",
        {**TEXT, "num_inference_steps": 3, "image": picture(21), "mask_image": mask(21), "height": 16, "width": 24},
        latents=(1, 4, 8, 12),
        draws=1,
    ),
    "inpaint9, strength": Case(
        "inpaint9",
        {**TEXT, "num_inference_steps": 5, "strength": 0.6, "image": picture(), "mask_image": mask(), "height": 16,
         "width": 16},
        latents=None,
        draws=3,
    ),
    "inpaint4": Case(
        "inpaint4",
        {**TEXT, "num_inference_steps": 4, "image": picture(), "mask_image": mask(), "height": 16, "width": 16},
        latents=None,
        draws=3,
    ),
    "inpaint4, strength": Case(
        "inpaint4",
        {**TEXT, "num_inference_steps": 5, "strength": 0.7, "image": picture(), "mask_image": mask(), "height": 16,
         "width": 16},
        latents=None,
        draws=3,
    ),
    "img2img": Case(
        "img2img", {**TEXT, "num_inference_steps": 5, "image": picture(), "strength": 0.6}, latents=None, draws=2
    ),
    "img2img, default strength": Case(
        "img2img", {**TEXT, "num_inference_steps": 5, "image": picture(21)}, latents=None, draws=2
    ),
    "sdxl img2img": Case(
        "sdxl-img2img", {**TEXT, "num_inference_steps": 6, "image": picture(), "strength": 0.5}, latents=None, draws=2
    ),
    "sdxl inpaint9, default strength": Case(
        "sdxl-inpaint9",
        {**TEXT, "num_inference_steps": 5, "image": picture(), "mask_image": mask(), "height": 16, "width": 16},
        latents=None,
        draws=3,
    ),
    "sdxl inpaint9, full strength": Case(
        "sdxl-inpaint9",
        {**TEXT, "num_inference_steps": 3, "strength": 1.0, "image": picture(), "mask_image": mask(), "height": 16,
         "width": 16},
        draws=1,
    ),
    "sdxl refiner": Case(
        "sdxl-refiner", {**TEXT, "num_inference_steps": 10, "image": picture()}, latents=None, draws=2
    ),
    "sdxl refiner, no negative prompt": Case(
        "sdxl-refiner",
        {"prompt": PROMPT, "guidance_scale": 4.0, "num_inference_steps": 6, "image": picture(), "strength": 0.5},
        latents=None,
        draws=2,
    ),
    "sdxl refiner, scores": Case(
        "sdxl-refiner",
        {**TEXT, "num_inference_steps": 4, "image": picture(), "strength": 0.5, "aesthetic_score": 4.0,
         "negative_aesthetic_score": 1.0},
        {"time_ids": np.float32([[16, 16, 0, 0, 4]]), "negative_time_ids": np.float32([[16, 16, 0, 0, 1]])},
        latents=None,
        draws=2,
    ),
    "ip2p": Case(
        "ip2p", {**TEXT, "num_inference_steps": 4, "image": picture(), "image_guidance_scale": 1.7}, draws=4
    ),
    "ip2p, own size": Case(
        "ip2p", {**TEXT, "num_inference_steps": 2, "image": picture(25)}, latents=(1, 4, 12, 12), draws=2
    ),
    "ip2p, no guidance": Case(
        "ip2p", {**TEXT, "guidance_scale": 1.0, "num_inference_steps": 2, "image": picture()}, draws=2
    ),
    "taesd": Case("taesd", {**TEXT, "num_inference_steps": 3}),
    "ldm-text2im": Case(
        "ldm-text2im", {"prompt": "the red cat 9", "guidance_scale": 5.0, "num_inference_steps": 4, "eta": 0.3},
        draws=4,
    ),
    "ldm-text2im, no guidance": Case(
        "ldm-text2im", {"prompt": "the red cat 9", "guidance_scale": 1.0, "num_inference_steps": 3}
    ),
    "ldm-text2im, half guidance": Case(
        "ldm-text2im", {"prompt": "the red cat 9", "guidance_scale": 0.5, "num_inference_steps": 3}
    ),
    "ldm-superres": Case(
        "ldm-superres", {"num_inference_steps": 3, "image": picture(40)}, latents=None, draws=1
    ),
    "ldm-superres, eta": Case(
        "ldm-superres", {"num_inference_steps": 3, "image": picture(32), "eta": 1.0}, latents=None, draws=4
    ),
    "ldm-uncond": Case("ldm-uncond", {"num_inference_steps": 4}, latents=None, draws=1),
    "ldm-uncond, resampled in blocks": Case("ldm-uncond-resnet", {"num_inference_steps": 3}, latents=None, draws=1),
    "ldm-uncond, eta": Case("ldm-uncond", {"num_inference_steps": 4, "eta": 1.0}, latents=None, draws=5),
}  # fmt: skip
RENAMED = {"num_inference_steps": "steps", "mask_image": "mask"}
#: SDXL's sizes, which are ``time_ids`` here.
SIZES = (
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "negative_original_size",
    "negative_target_size",
    "aesthetic_score",
    "negative_aesthetic_score",
)
#: Where the LDM pipelines keep their first stage.
LDM_FIRST_STAGE = "vqvae"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each model once: diffusers' pipeline and ours, by name, on demand."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("diffusers")
    return _Models(root)


class _Models(dict[str, Any]):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, name: str) -> tuple[Any, Any]:
        folder = self._root / name
        theirs = diffusers_models.save(name, folder)
        assert source.matches(folder, SourceOptions())
        model = source.load(folder, SourceOptions())
        self[name] = (theirs, torch_pipeline(model, self._root / f"{name}.bundle"))
        return self[name]


@pytest.mark.parametrize("name", CASES)
def test_the_same_picture(name: str, made: dict[str, Any], recorder: Recorder) -> None:
    theirs, ours = made[CASES[name].model]
    compare(CASES[name], theirs, ours, recorder)


def compare(case: Case, theirs: Any, ours: Pipeline, recorder: Recorder) -> None:
    """Run both with the same noise; latents within 1e-4 of their largest value, 8-bit pictures within one level."""
    call, own = dict(case.call), {}
    if case.latents is not None:
        latents = np.random.default_rng(7).standard_normal(case.latents).astype(np.float32)
        call["latents"] = torch.from_numpy(latents)
        own["latents"] = latents
    first_stage = getattr(theirs, LDM_FIRST_STAGE, None) or theirs.vae
    with torch.random.fork_rng():
        torch.manual_seed(3)
        spy = Spy(first_stage, ours.bundle.latent.scale_factor)
        expected = theirs(**call, output_type="pil").images
    own |= {RENAMED.get(key, key): value for key, value in case.call.items() if key not in SIZES} | case.ours
    assert len(recorder.draws) == case.draws
    if case.draws:
        own["noise"] = recorder.noise(case.draws)
    result = ours.generate(**own)
    assert spy.latents is not None
    scale = max(1.0, float(np.abs(spy.latents).max()))
    latents = _in_the_models_scale(spy.latents, first_stage, case)
    assert np.abs(result.latents - latents).max() <= 1e-4 * scale
    assert len(result.images) == len(expected)
    for found, wanted in zip(result.images, expected, strict=True):
        difference = np.asarray(found).astype(int) - np.asarray(wanted).astype(int)
        assert np.asarray(wanted).std() > 2, "a flat picture shows nothing"
        assert np.abs(difference).max() <= 1


def _in_the_models_scale(latents: Any, first_stage: Any, case: Case) -> Any:
    """What was decoded, before SDXL's statistics by channel were put on it."""
    if not case.model.startswith("sdxl"):
        return latents
    config = first_stage.config
    mean, std = (
        np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    return (latents / config.scaling_factor - mean) / std * config.scaling_factor


def test_every_model_is_drawn() -> None:
    assert {case.model for case in CASES.values()} == set(diffusers_models.MAKERS)
