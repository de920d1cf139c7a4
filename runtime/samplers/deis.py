"""DEIS: exponential integrator with Lagrange polynomials in the logarithm of rho."""

from __future__ import annotations

from typing import Any

import numpy as np

from latentedge.runtime.samplers.base import Call, Update
from latentedge.runtime.samplers.dpm_solver import converted, point
from latentedge.runtime.schedules import F32, exp32


def _antiderivative_2(t: Any, b: Any, c: Any) -> Any:
    """The integral up to ``t`` of the polynomial in log rho that is 1 at ``b`` and 0 at ``c``."""
    return t * (-np.log(c) + np.log(t) - F32(1)) / (np.log(b) - np.log(c))


def _antiderivative_3(t: Any, b: Any, c: Any, d: Any) -> Any:
    """The integral up to ``t`` of the polynomial in log rho that is 1 at ``b`` and 0 at ``c`` and ``d``."""
    log_t, log_b, log_c, log_d = np.log(t), np.log(b), np.log(c), np.log(d)
    inner = log_c * (log_d - log_t + F32(1)) - log_d * log_t + log_d + np.square(log_t) - F32(2) * log_t + F32(2)
    return t * inner / ((log_b - log_c) * (log_b - log_d))


def deis(call: Call) -> Update:
    """rho-AB-DEIS over log rho, orders 1 to 3: Zhang & Chen 2022 (arXiv 2204.13902), section 3.3, equation 15."""
    noise, denoised = converted(call, False)
    alpha, sigma, _ = here = point(call, call.index)
    noise = (call.latents - alpha * denoised) / sigma
    wanted, count = int(call.config["solver_order"]), len(call.plan.timesteps)
    outputs = call.history.keep(noise, wanted)
    short = bool(call.config["lower_order_final"]) and count < 15
    order = min(len(outputs), max(count - call.index, 1) if short else wanted)
    end = point(call, call.index + 1)
    if order == 1:
        growth = end.sigma * (exp32(end.half_log_snr - here.half_log_snr) - F32(1))
        latents = end.alpha / here.alpha * call.latents - growth * noise
        return call.done(latents, denoised, outputs=outputs)
    points = [point(call, call.index - k) for k in range(order)]
    rho, target = [p.sigma / p.alpha for p in points], end.sigma / end.alpha
    primitive = _antiderivative_2 if order == 2 else _antiderivative_3
    total = call.latents / here.alpha
    for k in range(order):
        nodes = [rho[(k + j) % order] for j in range(order)]
        weight = primitive(target, *nodes) - primitive(rho[0], *nodes)
        total = total + weight * outputs[-1 - k]
    return call.done(end.alpha * total, denoised, outputs=outputs)
