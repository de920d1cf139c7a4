"""Drawing with the torch modules: what the trainer's grids and the evaluation use."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from examples.emoji import diffusion, training
from examples.emoji.captions import encode
from latentedge.runtime.samplers import sample


class Denoiser(nn.Module):
    """U-Net and text encoder, trained together."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__()
        self.unet = training.build(parameters["unet_config"])
        self.text_encoder = training.build(parameters["cond_stage_config"])

    def forward(self, latents: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Denoiser output for latents [batch, channels, 16, 16], timesteps [batch] and token ids [batch, tokens]."""
        result: Tensor = self.unet(latents, timesteps, self.text_encoder(input_ids))
        return result


@torch.no_grad()
def draw_latents(
    denoiser: Denoiser,
    input_ids: Tensor,
    noise: np.ndarray,
    schedule: dict[str, Any],
    *,
    sampler: str,
    steps: int,
    guidance_scale: float,
) -> np.ndarray:
    """Latents in the model's scale, shaped as ``noise``; ``input_ids`` holds the empty prompts, then the prompts."""
    context = denoiser.text_encoder(input_ids)

    def predict(noisy: np.ndarray, timestep: float) -> np.ndarray:
        latents = torch.from_numpy(noisy).repeat(2, 1, 1, 1)
        both = denoiser.unet(latents, torch.full((len(latents),), float(timestep)), context)
        unconditional, conditional = both.float().chunk(2)
        guided: np.ndarray = (unconditional + guidance_scale * (conditional - unconditional)).numpy()
        return guided

    *_, last = sample(predict, noise, schedule, sampler, steps)
    return last.latents


@torch.no_grad()
def draw(
    denoiser: Denoiser,
    first_stage: Any,
    tokenizer: Tokenizer,
    sentences: list[str],
    *,
    parameters: dict[str, Any],
    scale_factor: float,
    sampler: str = "ddim",
    steps: int = 20,
    guidance_scale: float = 2.5,
    seed: int = 0,
    batch_size: int = 32,
) -> np.ndarray:
    """Pictures, uint8 [sentences, 64, 64, 3]."""
    schedule = diffusion.scheduler_config(parameters)
    random = np.random.default_rng(seed)
    drawn = []
    for start in range(0, len(sentences), batch_size):
        some = sentences[start : start + batch_size]
        ids = torch.from_numpy(encode(tokenizer, [""] * len(some) + some))
        noise = random.standard_normal((len(some), parameters["channels"], 16, 16)).astype(np.float32)
        latents = draw_latents(
            denoiser, ids, noise, schedule, sampler=sampler, steps=steps, guidance_scale=guidance_scale
        )
        drawn.append(training.to_pictures(first_stage.decode(torch.from_numpy(latents) / scale_factor)))
    return np.concatenate(drawn)
