"""The diffusion process of stage two: schedule, targets, loss weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# At most this weight for the error of the denoised latents, so that nearly clean timesteps do not dominate.
DENOISED_WEIGHT_LIMIT = 5.0


def alphas_cumprod(parameters: Mapping[str, Any]) -> Tensor:
    """Products of 1 - beta, float32 [timesteps]; CompVis's "linear" is linear in the square root of beta."""
    start, end = parameters["linear_start"] ** 0.5, parameters["linear_end"] ** 0.5
    betas = torch.linspace(start, end, parameters["timesteps"], dtype=torch.float64).square()
    return torch.cumprod(1.0 - betas, dim=0).float()


def scheduler_config(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same schedule in the fields that ``latentedge.runtime.samplers`` reads, with CompVis's rules."""
    return {
        "_class_name": "DDIMScheduler",
        "dialect": "compvis",
        "num_train_timesteps": parameters["timesteps"],
        "prediction_type": "v_prediction",
        "beta_schedule": "scaled_linear",
        "beta_start": parameters["linear_start"],
        "beta_end": parameters["linear_end"],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


def stratified_timesteps(count: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of ``count`` equal parts of 0..timesteps-1, int64 [count]: less noise than plain draws."""
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (places * timesteps).long().clamp(max=timesteps - 1)


def noised(latents: Tensor, noise: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents and the v target (arXiv:2202.00512, appendix D); ``alpha`` [batch] of ``alphas_cumprod``."""
    signal, deviation = alpha.sqrt()[:, None, None, None], (1.0 - alpha).sqrt()[:, None, None, None]
    return signal * latents + deviation * noise, signal * noise - deviation * latents


def v_loss(output: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """Mean squared error of v, which is SNR + 1 times that of the denoised latents, with that factor limited.

    Noisy timesteps keep their full weight: there the caption alone decides what is drawn. (The weights of
    arXiv:2303.09556, min(SNR, limit) / (SNR + 1), all but leave them out.)
    """
    factor = 1.0 / (1.0 - alpha)
    weight = factor.clamp(max=DENOISED_WEIGHT_LIMIT) / factor
    return ((output - target).square().mean(dim=(1, 2, 3)) * weight).mean()
