"""Where a run starts, and what other schedulers change, noise for noise as diffusers' pipelines do it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import numpy as np
import torch

from latentedge.runtime.errors import UsageError
from tests.export.sources.diffusers_running import Recorder, Spy, recorder
from tests.export.sources.test_diffusers_pictures import TEXT, Case, _Models, compare, mask, picture

__all__ = ["recorder"]

SIZE = {"height": 16, "width": 16}
PAINTED = {**TEXT, "image": picture(), "mask_image": mask(), **SIZE}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# (case, scheduler class and config that replace the model's own)
CASES: dict[str, tuple[Case, tuple[str, dict[str, Any]] | None]] = {
    "masked latents, given and partly kept": (
        Case("inpaint4", {**PAINTED, "num_inference_steps": 5, "strength": 0.7}, draws=2), None),
    "masked latents, full strength by default": (
        Case("inpaint4", {**PAINTED, "num_inference_steps": 3}, draws=2), None),
    "masked latents, ancestral": (
        Case("inpaint4", {**PAINTED, "num_inference_steps": 4, "strength": 0.8}, latents=None, draws=6),
        ("EulerAncestralDiscreteScheduler", BETAS)),
    "masked latents, Heun": (
        Case("inpaint4", {**PAINTED, "num_inference_steps": 3, "strength": 0.7}, draws=2),
        ("HeunDiscreteScheduler", BETAS)),
    "enlarged, Euler": (
        Case("ldm-superres", {"num_inference_steps": 3, "image": picture(32)}, latents=None, draws=1),
        ("EulerDiscreteScheduler", BETAS)),
    "TCD, no randomness unless asked for": (
        Case("sd", {**TEXT, "num_inference_steps": 4}), ("TCDScheduler", BETAS)),
    "TCD, randomness": (
        Case("sd", {**TEXT, "num_inference_steps": 4, "eta": 0.3}, draws=3), ("TCDScheduler", BETAS)),
    "EDM": (Case("sd", {**TEXT, "num_inference_steps": 3}), ("EDMEulerScheduler", {})),
    "EDM, DPM-Solver": (
        Case("sd", {**TEXT, "num_inference_steps": 4}), ("EDMDPMSolverMultistepScheduler", {"sigma_min": 0.1})),
    "SA-Solver": (Case("sd", {**TEXT, "num_inference_steps": 4}, draws=4), ("SASolverScheduler", BETAS)),
    "from a picture, DPM2 ancestral": (
        Case("img2img", {**TEXT, "num_inference_steps": 4, "image": picture(), "strength": 0.6}, latents=None, draws=3),
        ("KDPM2AncestralDiscreteScheduler", BETAS)),
}  # fmt: skip
# Loaded here, before the recorder looks for the modules that draw.
SCHEDULERS = {chosen[0]: getattr(diffusers, chosen[0]) for _, chosen in CASES.values() if chosen is not None}
DISTILLED = diffusers.LatentConsistencyModelImg2ImgPipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    return _Models(tmp_path_factory.mktemp("starts"))


@pytest.mark.parametrize("name", CASES)
def test_the_same_picture(name: str, made: dict[str, Any], recorder: Recorder) -> None:
    case, chosen = CASES[name]
    theirs, ours = made[case.model]
    if chosen is None:
        compare(case, theirs, ours, recorder)
        return
    before, (class_name, config) = theirs.scheduler, chosen
    theirs.scheduler = SCHEDULERS[class_name](**config)
    case.ours["schedule"] = {**config, "_class_name": class_name}
    try:
        compare(case, theirs, ours, recorder)
    finally:
        theirs.scheduler = before


@pytest.mark.parametrize(
    ("model", "call", "size"),
    [
        ("sd", {}, SIZE),
        ("img2img", {"image": picture(), "strength": 0.7}, {}),
        ("inpaint4", {"image": picture(), "mask_image": mask(), "strength": 0.7}, SIZE),
        ("inpaint9", {"image": picture(), "mask_image": mask()}, SIZE),
    ],
)
def test_one_seed_draws_the_same_two_pictures(
    model: str, call: dict[str, Any], size: dict[str, int], made: dict[str, Any]
) -> None:
    """No noise is given: the stream itself and the order of its draws are compared, a stochastic sampler included."""
    theirs, ours = made[model]
    spy, before = Spy(theirs.vae, ours.bundle.latent.scale_factor), theirs.scheduler
    theirs.scheduler = SCHEDULERS["EulerAncestralDiscreteScheduler"](**BETAS)
    generator = torch.Generator().manual_seed(11)
    try:
        theirs(**TEXT, **call, **size, num_inference_steps=3, num_images_per_prompt=2, generator=generator)
    finally:
        theirs.scheduler = before
    own = {"mask" if key == "mask_image" else key: value for key, value in call.items()}
    schedule = {**BETAS, "_class_name": "EulerAncestralDiscreteScheduler"}
    found = ours.generate(**TEXT, **own, **size, steps=3, batch_size=2, seed=11, schedule=schedule).latents
    assert spy.latents is not None
    assert found.shape == spy.latents.shape
    assert np.abs(found - spy.latents).max() <= 2e-4 * np.abs(spy.latents).max()


@pytest.mark.parametrize(("strength", "steps"), [(0.8, 4), (0.5, 2), (0.1, 4)])
def test_a_distilled_model_cuts_its_own_schedule(
    strength: float, steps: int, made: dict[str, Any], recorder: Recorder
) -> None:
    theirs, ours = made["lcm"]
    pipeline = DISTILLED(**theirs.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": TEXT["prompt"], "num_inference_steps": steps, "strength": strength, "image": picture()}
    compare(Case("lcm", {**call, "guidance_scale": 8.5}, latents=None, draws=2 + steps - 1), pipeline, ours, recorder)


def test_a_scheduler_that_is_not_supported_is_refused_by_name(made: dict[str, Any]) -> None:
    _, ours = made["sd"]
    with pytest.raises(UsageError, match="CogVideoXDPMScheduler"):
        ours.generate("cat", steps=2, schedule={"_class_name": "CogVideoXDPMScheduler"})
