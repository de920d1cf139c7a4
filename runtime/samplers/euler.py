"""Samplers over sigma: Euler, Heun, DPM2, their ancestral forms, LMS, DPM++ SDE, and flow-matching Euler and Heun."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from latentedge.runtime.parametrisation import denoised_at, limited
from latentedge.runtime.samplers.base import Call, Update
from latentedge.runtime.schedules import F32, Array, ancestral_split, exp32, log32


def churned(call: Call, sigma: Any) -> tuple[Array, Any]:
    """(latents, sigma_hat) with noise added back: Karras et al. 2022 (arXiv 2206.00364), algorithm 2, lines 4 to 6."""
    options = call.config
    inside = options.get("s_tmin", 0.0) <= sigma <= options.get("s_tmax", math.inf)
    gamma = min(options.get("s_churn", 0.0) / (len(call.plan.sigmas) - 1), 2**0.5 - 1) if inside else 0.0
    if gamma <= 0:
        return call.latents, sigma
    sigma_hat = sigma * F32(gamma + 1)
    noise = call.draw() * F32(options.get("s_noise", 1.0))
    return call.latents + noise * np.sqrt(np.square(sigma_hat) - np.square(sigma)), sigma_hat


def euler(call: Call) -> Update:
    """Euler: Karras et al. 2022, algorithm 2 without the correction; churn where the schedule sets ``s_churn``."""
    sample, sigma_hat = churned(call, call.sigma)
    at = sigma_hat if call.kind == "epsilon" else call.sigma
    denoised = denoised_at(call.kind, sample, call.output, at)
    return call.done(sample + (sample - denoised) / sigma_hat * (call.sigma_next - sigma_hat), denoised)


def euler_ancestral(call: Call) -> Update:
    """Euler to sigma_down, then noise of sigma_up: algorithm 1 of Song et al. 2021 (arXiv 2011.13456) in sigma."""
    denoised = denoised_at(call.kind, call.latents, call.output, call.sigma)
    up, down = ancestral_split(call.sigma, call.sigma_next)
    latents = call.latents + (call.latents - denoised) / call.sigma * (down - call.sigma)
    return call.done(latents + call.draw() * up, denoised)


def heun(call: Call) -> Update:
    """Heun: Karras et al. 2022, algorithm 1; an Euler step, then the mean of the slopes at both of its ends."""
    denoised = denoised_at(call.kind, call.latents, call.output, call.plan.input_sigmas[call.index])
    if call.config.get("clip_sample"):
        denoised = limited({**call.config, "thresholding": False}, denoised)
    slope = (call.latents - denoised) / call.sigma
    start = call.history.sample
    if start is None:
        latents = call.latents + slope * (call.sigma_next - call.sigma)
        return call.done(latents, denoised, outputs=(slope,), sample=call.latents)
    before = call.plan.sigmas[call.index - 1]
    return call.done(start + (call.history.outputs[0] + slope) / F32(2) * (call.sigma - before), denoised)


def dpm2(call: Call) -> Update:
    """DPM-Solver-2: Lu et al. 2022 (arXiv 2206.00927), algorithm 1; the midpoint rule in log sigma.

    The ancestral form aims at sigma_down and adds noise of sigma_up after the second evaluation.
    """
    tables, step = call.plan.tables, call.index // 2
    at = call.plan.input_sigmas[call.index]
    denoised = denoised_at(call.kind, call.latents, call.output, at)
    slope, start = (call.latents - denoised) / at, call.history.sample
    sigma, middle = tables["sigma"][step], tables["middle"][step]
    if start is None:
        return call.done(call.latents + slope * (middle - sigma), denoised, sample=call.latents)
    if call.config["_class_name"] == "KDPM2DiscreteScheduler":
        return call.done(start + slope * (tables["sigma"][step + 1] - sigma), denoised)
    latents = start + slope * (tables["down"][step] - sigma)
    return call.done(latents + call.draw() * tables["up"][step], denoised)


def dpmpp_2s_ancestral(call: Call) -> Update:
    """DPM-Solver++(2S) to sigma_down: Lu et al. 2022 (arXiv 2211.01095), algorithm 1, with k-diffusion's noise."""
    tables, step, start = call.plan.tables, call.index // 2, call.history.sample
    denoised = denoised_at(call.kind, call.latents, call.output, call.plan.input_sigmas[call.index])
    sigma, middle, down = (tables[name][step] for name in ("sigma", "middle", "down"))
    if start is None:
        return call.done(middle / sigma * (call.latents - denoised) + denoised, denoised, sample=call.latents)
    return call.done(down / sigma * (start - denoised) + denoised + call.draw() * tables["up"][step], denoised)


def _kronrod_rule() -> tuple[Array, Array]:
    """(nodes, weights) of the 21-point Gauss-Kronrod rule on [-1, 1]; the weights integrate its Legendre basis."""
    added = np.array(
        [0.9956571630258081, 0.9301574913557082, 0.7808177265864169, 0.5627571346686047, 0.2943928627014602]
    )
    nodes = np.concatenate([np.polynomial.legendre.leggauss(10)[0], added, -added, [0.0]])
    basis = np.polynomial.legendre.legvander(nodes, 20).T
    return nodes, np.linalg.solve(basis, np.eye(21)[0] * 2)


def _lagrange_integral(rule: tuple[Array, Array], nodes: Array, chosen: int, end: Any) -> float:
    """The integral from the first node to ``end`` of the polynomial that is 1 at ``chosen`` and 0 at the other nodes.

    The integrand is evaluated in float32 at the rule's points, as the reference does: its coefficients cancel.
    """
    centre, half = 0.5 * (float(nodes[0]) + float(end)), 0.5 * (float(end) - float(nodes[0]))
    points = (centre + half * rule[0]).astype(F32)
    values = np.ones_like(points)
    for other in np.delete(nodes, chosen):
        values = values * ((points - other) / (nodes[chosen] - other))
    return float(half * np.sum(rule[1] * values.astype(np.float64)))


def lms(call: Call) -> Update:
    """Linear multistep over sigma: Adams-Bashforth with the polynomial through up to ``order`` past slopes (4)."""
    wanted = int(call.config.get("order") or 4)
    denoised = denoised_at(call.kind, call.latents, call.output, call.sigma)
    slopes = call.history.keep((call.latents - denoised) / call.sigma, wanted)
    nodes, rule = call.plan.sigmas[call.index - np.arange(min(call.index + 1, wanted))], _kronrod_rule()
    weights = [F32(_lagrange_integral(rule, nodes, i, call.sigma_next)) for i in range(len(slopes))]
    total = sum(weight * slope for weight, slope in zip(weights, slopes[::-1], strict=True))
    return call.done(call.latents + total, denoised, outputs=slopes)


def dpmpp_sde(call: Call) -> Update:
    """DPM-Solver++ (SDE), singlestep with a midpoint: Lu et al. 2022 (arXiv 2211.01095), in k-diffusion's form.

    Both halves of a step see the same Brownian motion, so fresh draws of the second half are joined to the first's;
    recorded draws are increments already.
    """
    at = call.plan.input_sigmas[call.index]
    denoised = denoised_at(call.kind, call.latents, call.output, at)
    start = call.history.sample
    sigma, sigma_next = call.sigma, call.sigma_next
    if start is not None:
        sigma, sigma_next = call.plan.sigmas[call.index - 1], call.sigma
    if sigma_next == 0:
        return call.done(call.latents + (call.latents - denoised) / sigma * (sigma_next - sigma), denoised)
    t, noise = -log32(sigma), call.draw()
    middle = call.plan.tables["middle"][call.index // 2]
    if start is not None and not call.draw.recorded and call.history.partial is not None:
        share = (sigma - middle) / (sigma - sigma_next)
        noise = np.sqrt(share) * call.history.partial + np.sqrt(F32(1) - share) * noise
    t_target = -log32(middle) if start is None else -log32(sigma_next)
    sigma_from, sigma_to = exp32(-t), exp32(-t_target)
    up = min(sigma_to, ancestral_split(sigma_from, sigma_to)[0])
    t_down = -log32(np.sqrt(np.square(sigma_to) - np.square(up)))
    base = call.latents if start is None else start
    decay = F32(np.expm1(np.float64(t - t_down)))
    latents = exp32(-t_down) / sigma_from * base - decay * denoised
    latents = latents + noise * F32(call.config.get("s_noise", 1.0)) * up
    if start is None:
        return call.done(latents, denoised, sample=call.latents, partial=noise)
    return call.done(latents, denoised)


def flow_euler(call: Call) -> Update:
    """Rectified flow: Liu et al. 2022 (arXiv 2209.03003), algorithm 1; ``stochastic_sampling`` renoises each step."""
    if call.config.get("stochastic_sampling"):
        return flow_lcm(call)
    denoised = call.latents - call.sigma * call.output
    return call.done(call.latents + (call.sigma_next - call.sigma) * call.output, denoised)


def flow_lcm(call: Call) -> Update:
    """Consistency sampling on a flow: Luo et al. 2023 (arXiv 2310.04378), algorithm 3; every step renoises x0."""
    denoised = call.latents - call.sigma * call.output
    return call.done((F32(1) - call.sigma_next) * denoised + call.sigma_next * call.draw(), denoised)


def flow_heun(call: Call) -> Update:
    """Heun's rule on the flow's velocity; churn as for Euler, drawn for both evaluations of a step."""
    start = call.history.sample
    before = call.sigma if start is None else call.plan.sigmas[call.index - 1]
    sample, sigma_hat = churned(call, before)
    denoised = sample - call.output * call.sigma
    slope = (sample - denoised) / (sigma_hat if start is None else call.sigma)
    if start is None:
        step = np.asarray(call.sigma_next - sigma_hat)
        return call.done(sample + slope * step, denoised, outputs=(slope,), sample=sample, partial=step)
    return call.done(start + F32(0.5) * (call.history.outputs[0] + slope) * call.history.partial, denoised)
