"""Samplers that step between entries of the training schedule: DDIM, DDPM, LCM and TCD."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from latentedge.runtime.parametrisation import denoised_of, limited, noise_of
from latentedge.runtime.samplers.base import Call, Update
from latentedge.runtime.schedules import F32


def ddim(call: Call) -> Update:
    """DDIM: Song et al. 2021 (arXiv 2010.02502), equations 12 and 16; ``eta`` 0 is deterministic, 1 is DDPM.

    The previous timestep is ``T // steps`` lower, which is not the next entry of every spacing.
    """
    timestep = call.timestep
    previous = timestep - int(call.config["num_train_timesteps"]) // call.plan.steps
    (alpha, sigma), (alpha_previous, sigma_previous) = call.level(timestep), call.level(previous)
    denoised = limited(call.config, denoised_of(call.kind, call.latents, call.output, alpha, sigma))
    noise = noise_of(call.kind, call.latents, call.output, alpha, sigma)
    if call.config.get("use_clipped_model_output"):
        noise = noise_of("sample", call.latents, denoised, alpha, sigma)
    if call.eta == 0:
        return call.done(alpha_previous * denoised + sigma_previous * noise, denoised)
    a, a_previous = call.alpha(timestep), call.alpha(previous)
    variance = (F32(1) - a_previous) / (F32(1) - a) * (F32(1) - a / a_previous)
    std = F32(call.eta) * np.sqrt(np.maximum(variance, F32(0)))
    direction = np.sqrt(np.maximum(F32(1) - a_previous - np.square(std), F32(0))) * noise
    return call.done(alpha_previous * denoised + direction + std * call.draw(), denoised)


def ddpm(call: Call) -> Update:
    """Ancestral sampling: Ho et al. 2020 (arXiv 2006.11239), algorithm 2 with the posterior of equation 7."""
    output, channels = call.output, call.latents.shape[1]
    learned, output = output[:, channels:], output[:, :channels]
    a = call.alpha(call.timestep)
    a_previous = call.alpha(call.next_timestep) if not call.last else F32(1)
    step_alpha = a / a_previous
    beta, rest, rest_previous = F32(1) - step_alpha, F32(1) - a, F32(1) - a_previous
    x0 = denoised_of(call.kind, call.latents, output, *call.level(call.timestep))
    x0 = limited(call.config, x0)
    latents = np.sqrt(a_previous) * beta / rest * x0 + np.sqrt(step_alpha) * rest_previous / rest * call.latents
    if call.timestep > 0:
        small = np.maximum(rest_previous / rest * beta, F32(1e-20))
        latents = latents + _ddpm_std(call.config.get("variance_type"), small, beta, learned) * call.draw()
    return call.done(latents, x0)


def _ddpm_std(kind: str | None, small: Any, large: Any, learned: Any) -> Any:
    """The noise's standard deviation; learned_range interpolates logarithms (Nichol & Dhariwal 2021, equation 15)."""
    match kind:
        case "fixed_large" | "fixed_large_log":
            return np.sqrt(large)
        case "learned":
            return np.sqrt(learned)
        case "learned_range":
            share = (learned + F32(1)) / F32(2)
            return np.exp(F32(0.5) * (share * np.log(large) + (F32(1) - share) * np.log(small)))
    return np.sqrt(small)


def lcm(call: Call) -> Update:
    """Latent consistency model: Luo et al. 2023 (arXiv 2310.04378), algorithm 3, sigma_data 0.5."""
    x0 = limited(call.config, denoised_of(call.kind, call.latents, call.output, *call.level(call.timestep)))
    scaled = F32(call.timestep) * F32(call.config["timestep_scaling"])
    skip, out = F32(0.25) / (np.square(scaled) + F32(0.25)), scaled / np.sqrt(np.square(scaled) + F32(0.25))
    denoised = out * x0 + skip * call.latents
    if call.last:
        return call.done(denoised, denoised)
    alpha_next, sigma_next = call.level(call.next_timestep)
    return call.done(alpha_next * denoised + sigma_next * call.draw(), denoised)


def tcd(call: Call) -> Update:
    """Trajectory consistency distillation: Zheng et al. 2024 (arXiv 2402.19159), algorithm 4; ``eta`` is its gamma."""
    following = 0 if call.last else call.next_timestep
    target = math.floor(F32(1 - call.eta) * F32(following))
    a_next, a_target = call.alpha(following), call.alpha(target)
    (alpha, sigma), (alpha_target, sigma_target) = call.level(call.timestep), call.level(target)
    x0 = denoised_of(call.kind, call.latents, call.output, alpha, sigma)
    noise = noise_of(call.kind, call.latents, call.output, alpha, sigma)
    latents = alpha_target * x0 + sigma_target * noise
    if call.eta > 0 and not call.last:
        kept = a_next / a_target
        latents = np.sqrt(kept) * latents + np.sqrt(F32(1) - kept) * call.draw()
    return call.done(latents, x0)
