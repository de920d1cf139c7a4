"""Linear multistep samplers over epsilon: PNDM (with and without Runge-Kutta) and IPNDM."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from latentedge.runtime.parametrisation import denoised_of, noise_of
from latentedge.runtime.samplers.base import Call, Update
from latentedge.runtime.samplers.plans import Plan
from latentedge.runtime.schedules import F32, Array, Config, linspace


def adams_bashforth(outputs: tuple[Array, ...]) -> Array:
    """The extrapolated output of 1 to 4 evenly spaced ones, newest last: Liu et al. 2022, equation 12."""
    newest = outputs[::-1]
    match len(outputs):
        case 1:
            return newest[0]
        case 2:
            return np.asarray((F32(3) * newest[0] - newest[1]) / F32(2))
        case 3:
            return np.asarray((F32(23) * newest[0] - F32(16) * newest[1] + F32(5) * newest[2]) / F32(12))
    total = F32(55) * newest[0] - F32(59) * newest[1] + F32(37) * newest[2] - F32(9) * newest[3]
    return np.asarray(F32(1 / 24) * total)


def _transfer(call: Call, sample: Array, timestep: int, previous: int, output: Array) -> Array:
    """Liu et al. 2022 (arXiv 2202.09778), equation 11: from ``timestep`` to ``previous`` along ``output``."""
    a, a_previous = call.alpha(timestep), call.alpha(previous)
    noise = noise_of(call.kind, sample, output, *call.level(timestep))
    scale = a * np.sqrt(F32(1) - a_previous) + np.sqrt(a * (F32(1) - a) * a_previous)
    return np.asarray(np.sqrt(a_previous / a) * sample - (a_previous - a) * noise / scale)


def pndm(call: Call) -> Update:
    """PNDM: Liu et al. 2022, algorithm 2; with skip_prk_steps the first step averages two evaluations instead."""
    denoised = denoised_of(call.kind, call.latents, call.output, *call.level(call.timestep))
    if call.history.calls < len(call.plan.tables["prk"]):
        return _runge_kutta(call, denoised)
    step, past = int(call.config["num_train_timesteps"]) // call.plan.steps, call.history
    if past.calls == 1:  # the step just made is made again with the average of both its ends
        output, start = (call.output + past.outputs[-1]) / F32(2), past.sample
        assert start is not None
        latents = _transfer(call, start, call.timestep + step, call.timestep, output)
        return call.done(latents, denoised, outputs=past.outputs)
    outputs = past.keep(call.output, 4)
    latents = _transfer(call, call.latents, call.timestep, call.timestep - step, adams_bashforth(outputs))
    return call.done(latents, denoised, outputs=outputs, sample=call.latents if past.calls == 0 else None)


def _runge_kutta(call: Call, denoised: Array) -> Update:
    """One of the four evaluations of a Runge-Kutta step: Liu et al. 2022, equation 13."""
    past, stage = call.history, call.history.calls % 4
    half = int(call.config["num_train_timesteps"]) // call.plan.steps // 2
    previous = call.timestep - (0 if stage % 2 else half)
    timestep = int(call.plan.tables["prk"][past.calls // 4 * 4])
    start = call.latents if stage == 0 or past.sample is None else past.sample
    total = F32(1 / 6 if stage in (0, 3) else 1 / 3) * call.output
    total = total if past.partial is None else past.partial + total
    outputs = past.keep(call.output, 4) if stage == 0 else past.outputs
    latents = _transfer(call, start, timestep, previous, total if stage == 3 else call.output)
    return call.done(latents, denoised, outputs=outputs, sample=start, partial=None if stage == 3 else total)


def _arctangent(x: Array) -> Array:
    """The arctangent of float32 values from 0 to infinity as fdlibm rounds it, which the reference's timesteps show.

    Ng et al. 1993, "fdlibm", s_atan: the argument is moved near 0 by one of five known angles, then a polynomial.
    """
    ranges = [x < F32(0.4375), x < F32(0.6875), x < F32(1.1875), x < F32(2.4375)]
    one, two, half3 = F32(1), F32(2), F32(1.5)
    moved = [x, (two * x - one) / (two + x), (x - one) / (x + one), (x - half3) / (one + half3 * x)]
    z = np.select(ranges, moved, -one / x)
    angle = np.select(ranges, [F32(0), F32(0.46364760399), F32(0.78539812565), F32(0.98279368877)], F32(1.5707962513))
    rest = np.select(ranges, [F32(0), F32(5.0121582440e-9), F32(3.7748947079e-8), F32(3.4473217170e-8)],
                     F32(7.5497894159e-8))  # fmt: skip
    terms = [0.33333334327, -0.20000000298, 0.14285714924, -0.11111110449, 0.090908870101, -0.076918758452,
             0.066610731184, -0.058335702866, 0.049768779427, -0.036531571299, 0.016285819933]  # fmt: skip
    square = z * z
    fourth, sums = square * square, [np.zeros_like(z), np.zeros_like(z)]
    for i in reversed(range(len(terms))):
        sums[i % 2] = F32(terms[i]) + fourth * sums[i % 2]
    bend = z * (square * sums[0] + fourth * sums[1])
    return np.asarray(np.where(ranges[0], z - bend, angle - ((bend - rest) - z)), F32)


def ipndm_plan(config: Config, steps: int) -> Plan:
    """Timesteps in (0, 1]; noise weight sin(t pi / 2)**2, so that the schedule needs no betas."""
    ramp = np.append(linspace(1, 0, steps + 1)[:-1], F32(0))
    given: Any = config.get("trained_betas")
    angles = (ramp * F32(math.pi) / F32(2)).astype(np.float64)
    weights = np.sin(angles).astype(F32) ** 2 if given is None else np.asarray(given, F32)
    alphas = np.sqrt(F32(1) - np.square(weights))
    with np.errstate(divide="ignore", invalid="ignore"):
        timesteps = (_arctangent(weights / alphas) / F32(math.pi) * F32(2))[:-1]
    sigmas = weights / np.maximum(alphas, F32(1e-8))
    return Plan(config, steps, timesteps, sigmas, 1.0, "solver", tables={"weights": weights, "alphas": alphas})


def ipndm(call: Call) -> Update:
    """Improved PNDM: Zhang & Chen 2022 (arXiv 2204.13902), algorithm 2, fourth order, no warm-up."""
    weights, alphas = call.plan.tables["weights"], call.plan.tables["alphas"]
    here, there = call.index, call.index + 1
    outputs = call.history.keep(call.latents * weights[here] + call.output * alphas[here], 4)
    direction = adams_bashforth(outputs)
    denoised = (call.latents - weights[here] * direction) / max(alphas[here], F32(1e-8))
    return call.done(alphas[there] * denoised + direction * weights[there], denoised, outputs=outputs)
