"""The samplers of CompVis's repositories, where their rules differ: DDIM, PLMS, ancestral DDPM and DPM-Solver."""

from __future__ import annotations

from typing import Any

import numpy as np

from latentedge.runtime.errors import UsageError
from latentedge.runtime.parametrisation import denoised_of, noise_of
from latentedge.runtime.samplers.base import Call, Update
from latentedge.runtime.samplers.dpm_solver import Point, exponential_step
from latentedge.runtime.samplers.plans import Plan, on_table
from latentedge.runtime.samplers.plms import adams_bashforth
from latentedge.runtime.schedules import F32, Array, Config, alphas_cumprod, exact_betas, exp32, linspace, log32


def timesteps(config: Config, steps: int) -> Array:
    """Int64, descending: range(0, T, T // steps) + 1, which is more than ``steps`` where T does not divide."""
    total = int(config["num_train_timesteps"])
    ascending = np.arange(0, total, total // steps) + 1
    if ascending[-1] >= total:
        raise UsageError(
            f"CompVis's schedule has no timestep {ascending[-1]}, which {steps} steps ask for (it ends at {total - 1})",
            f"use a number of steps that divides {total}",
        )
    return ascending[::-1].astype(np.int64)


def ddim_plan(config: Config, steps: int) -> Plan:
    """The timesteps above; see ``Plan.begin`` for where CompVis starts from a picture."""
    return on_table(config, steps, timesteps(config, steps), alphas_cumprod(config), compvis=True)


def plms_plan(config: Config, steps: int) -> Plan:
    """The second timestep twice: the first step evaluates the model at both of its ends."""
    listed = timesteps(config, steps)
    second = listed[1:2] if len(listed) > 1 else listed
    return on_table(
        config, steps, np.concatenate([listed[:1], second, listed[1:]]), alphas_cumprod(config), compvis=True
    )


def ddpm_plan(config: Config, steps: int) -> Plan:
    """The last ``steps`` training timesteps, each one visited; a whole run has T steps.

    ``ancestral_tables``: a checkpoint's own, by the original's names, where they are not what its betas give.
    """
    betas = exact_betas(config)
    stored = config.get("ancestral_tables") if config.get("trained_betas") is not None else None
    tables = {name: np.asarray(values).astype(F32) for name, values in (stored or ancestral_tables(betas)).items()}
    bar = np.cumprod(1.0 - betas).astype(F32)
    return on_table(config, steps, np.arange(steps - 1, -1, -1), bar, compvis=True, **tables)


def ancestral_tables(betas: Array) -> dict[str, Array]:
    """Float64 [T] each, by the original's names: what sample, noise and x0 are weighted with, and log variances."""
    bar = np.cumprod(1.0 - betas)
    before = np.append(1.0, bar[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):  # a schedule may begin without noise, or end without signal
        variance = betas * (1.0 - before) / (1.0 - bar)
        return {
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / bar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / bar - 1),
            "posterior_mean_coef1": betas * np.sqrt(before) / (1.0 - bar),
            "posterior_mean_coef2": (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - bar),
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        }


def _step(call: Call, sample: Array, noise: Array, here: int, there: int) -> tuple[Array, Array]:
    """(the sample at ``there``, x0): DDIM's equation 12; below the last timestep alpha is that of timestep 0."""
    there = max(there, 0)
    (alpha, sigma), (alpha_there, sigma_there) = call.level(here), call.level(there)
    denoised = (sample - sigma * noise) / alpha
    if call.eta == 0:
        return alpha_there * denoised + sigma_there * noise, denoised
    a, a_there = float(call.alpha(here)), float(call.alpha(there))
    std = F32(call.eta * np.sqrt((1 - a_there) / (1 - a) * (1 - a / a_there)))
    latents = alpha_there * denoised + np.sqrt(F32(1) - call.alpha(there) - np.square(std)) * noise
    return latents + std * call.draw(), denoised


def _noise(call: Call) -> Array:
    return noise_of(call.kind, call.latents, call.output, *call.level(call.timestep))


def ddim(call: Call) -> Update:
    """DDIM: Song et al. 2021 (arXiv 2010.02502), equation 12, ending at alphas_cumprod[0]; x0 is never clipped."""
    return call.done(*_step(call, call.latents, _noise(call), call.timestep, call.next_timestep))


def plms(call: Call) -> Update:
    """PLMS: Liu et al. 2022 (arXiv 2202.09778), algorithm 2 with a pseudo Euler first step of two evaluations."""
    if call.eta:
        raise UsageError(f"PLMS is deterministic, found eta {call.eta}", "use eta 0, or ddim")
    noise, past, first = _noise(call), call.history, call.history.calls == 0
    there = call.next_timestep if first or past.calls > 1 else call.timestep
    there = -1 if len(call.plan.timesteps) == 2 else there  # one step only: it ends the run
    if past.calls == 1 and past.sample is not None:
        here = int(call.plan.timesteps[call.index - 1])
        mean = (past.outputs[0] + noise) / F32(2)
        return call.done(*_step(call, past.sample, mean, here, there), outputs=past.outputs)
    outputs = past.keep(noise, 4)
    step = _step(call, call.latents, adams_bashforth(outputs), call.timestep, there)
    return call.done(*step, outputs=outputs, sample=call.latents if first else None)


def ddpm(call: Call) -> Update:
    """Ancestral sampling: Ho et al. 2020 (arXiv 2006.11239), algorithm 2; a draw is taken at t = 0 and not used."""
    tables, t = call.plan.tables, call.timestep
    denoised = denoised_of(call.kind, call.latents, call.output, *call.level(t))
    if call.kind == "epsilon":
        weights = tables["sqrt_recip_alphas_cumprod"][t], tables["sqrt_recipm1_alphas_cumprod"][t]
        denoised = weights[0] * call.latents - weights[1] * call.output
    latents = tables["posterior_mean_coef1"][t] * denoised + tables["posterior_mean_coef2"][t] * call.latents
    noise = call.draw()
    if t > 0:
        latents = latents + exp32(F32(0.5) * tables["posterior_log_variance_clipped"][t]) * noise
    return call.done(latents, denoised)


def dpm_solver_plan(config: Config, steps: int) -> Plan:
    """Even in continuous time from 1 to 1 / T, log alpha linear between training timesteps; timesteps fractional."""
    total = int(config["num_train_timesteps"])
    acp = alphas_cumprod(config)
    times = linspace(1.0, 1.0 / total, steps + 1)
    logs = F32(0.5) * log32(acp)
    log_alpha = np.interp(times, linspace(0.0, 1.0, total + 1)[1:], logs).astype(F32)
    alpha, sigma = exp32(log_alpha), np.sqrt(F32(1) - exp32(F32(2) * log_alpha))
    listed = (times[:-1] - F32(1 / total)) * F32(1000)
    points = [Point(a, s, m - F32(0.5) * log32(np.square(s))) for a, s, m in zip(alpha, sigma, log_alpha, strict=True)]
    return Plan(config, steps, listed, sigma / alpha, 1.0, "solver", acp, {"points": points})


def dpm_solver(call: Call) -> Update:
    """DPM-Solver++(2M) over even times: Lu et al. 2022 (arXiv 2211.01095), algorithm 2, as CompVis's SD calls it."""
    points: list[Any] = call.plan.tables["points"]
    here, end = points[call.index], points[call.index + 1]
    denoised = denoised_of(call.kind, call.latents, call.output, here.alpha, here.sigma)
    outputs = call.history.keep(denoised, 2)
    short = call.last and call.plan.steps < 15
    slopes: tuple[Array, ...] = (denoised,)
    if len(outputs) == 2 and not short:
        ratio = (here.half_log_snr - points[call.index - 1].half_log_snr) / (end.half_log_snr - here.half_log_snr)
        slopes = (denoised, F32(1) / ratio * (denoised - outputs[0]))
    latents = exponential_step("dpmsolver++", call.latents, here, end, slopes, False, None)
    return call.done(latents, denoised, outputs=outputs)
