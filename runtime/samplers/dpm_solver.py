"""DPM-Solver and DPM-Solver++ in all forms: multistep, singlestep, deterministic and stochastic."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from latentedge.runtime.errors import UsageError
from latentedge.runtime.parametrisation import denoised_of, limited, noise_of, preconditioned
from latentedge.runtime.samplers.base import Call, Update
from latentedge.runtime.schedules import F32, Array, alpha_sigma, exp32, log32


class Point(NamedTuple):
    """One noise level: signal weight, noise weight, and half the log of their squared ratio."""

    alpha: Any
    sigma: Any
    half_log_snr: Any


def point(call: Call, index: int) -> Point:
    """The noise level of entry ``index`` of the plan's sigmas."""
    if call.plan.space == "sigma":
        return Point(F32(1), call.plan.sigmas[index], -log32(call.plan.sigmas[index]))
    alpha, sigma = alpha_sigma(call.plan.sigmas[index], bool(call.config.get("use_flow_sigmas")))
    with np.errstate(divide="ignore"):
        return Point(alpha, sigma, log32(alpha) - log32(sigma))


def converted(call: Call, of_noise: bool) -> tuple[Array, Array]:
    """(what the solver integrates, the denoised sample): x0 for the ``++`` forms, else the noise; thresholded."""
    alpha, sigma, _ = point(call, call.index)
    if call.kind == "flow_prediction":
        sigma = call.sigma
    if call.plan.space == "sigma":
        raw = preconditioned(call.kind, call.latents, call.output, sigma, call.plan.tables["sigma_data"])
    else:
        raw = denoised_of(call.kind, call.latents, call.output, alpha, sigma)
    denoised = limited(call.config, raw, clip=False)
    if not of_noise:
        return denoised, denoised
    if call.config.get("thresholding") and call.config["_class_name"] != "UniPCMultistepScheduler":
        return (call.latents - alpha * denoised) / sigma, denoised
    return noise_of(call.kind, call.latents, call.output, alpha, sigma), denoised


def exponential_step(
    kind: str, sample: Array, start: Point, end: Point, slopes: tuple[Array, ...], heun: bool, noise: Array | None
) -> Array:
    """One step from ``start`` to ``end``, ``slopes`` holding the integrand and its first derivatives in log-SNR.

    Lu et al. 2022 (arXiv 2206.00927), equation 3.6, and (arXiv 2211.01095), equations 4.1 and 4.4: the integral of
    exp(-lambda) times a Taylor polynomial; with ``heun`` its exact first-order term, else half the zeroth-order one.
    """
    if kind == "sde-dpmsolver" and len(slopes) == 3:
        raise UsageError("sde-dpmsolver has no third order", "use solver_order 2, or sde-dpmsolver++")
    h = end.half_log_snr - start.half_log_snr
    one, two = F32(1), F32(2)
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "dpmsolver++":
            growth, decay = end.alpha, exp32(-h) - one
            first, second = decay / h + one, (decay + h) / np.square(h) - F32(0.5)
            latents = end.sigma / start.sigma * sample - growth * decay * slopes[0]
            terms = (-F32(0.5) * (growth * decay), growth * first, -growth * second)
        elif kind == "sde-dpmsolver++":
            growth, decay = end.alpha, one - exp32(-two * h)
            first, second = decay / (-two * h) + one, (decay - two * h) / np.square(two * h) - F32(0.5)
            latents = end.sigma / start.sigma * exp32(-h) * sample + growth * decay * slopes[0]
            terms = (F32(0.5) * (growth * decay), growth * first, growth * second)
            noise_scale = end.sigma * np.sqrt(one - exp32(-two * h))
        else:
            growth, decay, double = end.sigma, exp32(h) - one, two if kind == "sde-dpmsolver" else one
            first, second = decay / h - one, (decay - h) / np.square(h) - F32(0.5)
            latents = end.alpha / start.alpha * sample - double * (growth * decay) * slopes[0]
            terms = (-double * F32(0.5) * (growth * decay), -double * (growth * first), -growth * second)
            noise_scale = growth * np.sqrt(exp32(two * h) - one) if noise is not None else one
    if len(slopes) == 2:
        latents = latents + (terms[1] if heun else terms[0]) * slopes[1]
    if len(slopes) == 3:
        latents = latents + terms[1] * slopes[1] + terms[2] * slopes[2]
    return np.asarray(latents if noise is None else latents + noise_scale * noise)


def multistep(call: Call) -> Update:
    """DPM-Solver++(2M) and (3M): Lu et al. 2022 (arXiv 2211.01095), algorithm 2; also the SDE and the epsilon forms.

    Low orders begin a run, end a short one, and make the step to sigma 0, where log-SNR is infinite.
    """
    config, count, i = call.config, len(call.plan.timesteps), call.index
    kind, wanted = str(config["algorithm_type"]), int(config["solver_order"])
    short = bool(config["lower_order_final"]) and count < 15
    integrand, denoised = converted(call, not kind.endswith("++"))
    outputs = call.history.keep(integrand, wanted)
    noise = call.draw() if kind.startswith("sde") else None
    order = min(wanted, len(outputs))
    if call.last and (config.get("euler_at_final") or short or config["final_sigmas_type"] == "zero"):
        order = 1
    elif i == count - 2 and short:
        order = min(order, 2)
    end, points = point(call, i + 1), [point(call, i - k) for k in range(order)]
    h = end.half_log_snr - points[0].half_log_snr
    newest = outputs[::-1]
    slopes: tuple[Array, ...] = (integrand,)
    if order >= 2:
        r0 = (points[0].half_log_snr - points[1].half_log_snr) / h
        d0 = F32(1) / r0 * (newest[0] - newest[1])
        slopes = (integrand, d0)
    if order == 3:
        r1 = (points[1].half_log_snr - points[2].half_log_snr) / h
        d1 = F32(1) / r1 * (newest[1] - newest[2])
        slopes = (integrand, d0 + r0 / (r0 + r1) * (d0 - d1), F32(1) / (r0 + r1) * (d0 - d1))
    latents = exponential_step(kind, call.latents, points[0], end, slopes, config["solver_type"] == "heun", noise)
    return call.done(latents, denoised, outputs=outputs)


def orders(steps: int, order: int, lower_final: bool, to_zero: bool) -> list[int]:
    """The order of each evaluation of a singlestep run: rising to ``order`` in each group, lower at the end."""
    group = list(range(1, order + 1))
    listed = (group * steps)[:steps]
    if lower_final and order > 1 and steps % order == 0:
        listed = [*group * (steps // order - 1), *group[: order - 1], 1]
    if to_zero:
        listed[-1] = 1
    return listed


def singlestep(call: Call) -> Update:
    """DPM-Solver++(2S) and (3S): Lu et al. 2022 (arXiv 2211.01095), algorithm 1; each group starts from its sample."""
    config, i, steps = call.config, call.index, call.plan.steps
    kind, wanted = str(config["algorithm_type"]), int(config["solver_order"])
    to_zero = config["final_sigmas_type"] == "zero"
    lower = bool(config["lower_order_final"]) or steps % wanted != 0 or to_zero
    integrand, denoised = converted(call, not kind.endswith("++"))
    outputs = call.history.keep(integrand, wanted)
    noise = call.draw() if kind.startswith("sde") else None
    order = min(orders(steps, wanted, lower, to_zero)[i], len(outputs))
    sample = call.latents if order == 1 or call.history.sample is None else call.history.sample
    end, points = point(call, i + 1), [point(call, i - k) for k in range(order)]
    start, heun = points[-1], config["solver_type"] == "heun"
    h = end.half_log_snr - start.half_log_snr
    newest = outputs[::-1][:order]
    slopes: tuple[Array, ...] = (newest[-1],)
    if order >= 2:
        r0 = (points[0].half_log_snr - start.half_log_snr) / h
        d0 = F32(1) / r0 * (newest[0] - newest[-1])
        slopes = (newest[-1], d0)
    if order == 3 and heun:
        r1 = (points[1].half_log_snr - start.half_log_snr) / h
        d1 = F32(1) / r1 * (newest[1] - newest[-1])
        slopes = (newest[-1], (r0 * d1 - r1 * d0) / (r0 - r1), F32(2) * (d0 - d1) / (r0 - r1))
    latents = exponential_step(kind, sample, start, end, slopes, heun or order == 3, noise)
    return call.done(latents, denoised, outputs=outputs, sample=sample)
