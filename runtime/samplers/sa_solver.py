"""SA-Solver: a stochastic Adams predictor and corrector that share their model evaluations."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np

from latentedge.runtime.samplers.base import Call, Update
from latentedge.runtime.samplers.dpm_solver import Point, converted, point
from latentedge.runtime.schedules import F32, Array, exp32

NOISY = (200, 800)  # the training timesteps between which the reference adds noise (tau 1); outside it is an ODE


def _moments(count: int, start: Any, end: Any, tau: int, of_data: bool) -> list[Any]:
    """The integrals from ``start`` to ``end`` of x**k exp((1 + tau**2) x), or of x**k exp(-x), for k below ``count``."""
    weight, sign = (F32(1 + tau * tau), F32(-1)) if of_data else (F32(1), F32(1))
    start, end = weight * start, weight * end

    def polynomials(x: Any) -> list[Any]:
        cube = x * x * x + F32(3) * sign * (x * x) + F32(6) * x + F32(6) * sign
        return [F32(1), x + sign, x * x + F32(2) * sign * x + F32(2), cube]

    pairs = list(zip(polynomials(start), polynomials(end), strict=True))[:count]
    if of_data:
        decay = exp32(-(end - start))
        return [exp32(end) * (last - first * decay) / weight ** F32(k + 1) for k, (first, last) in enumerate(pairs)]
    return [exp32(-end) * (first * exp32(end - start) - last) for first, last in pairs]


def _coefficients(nodes: list[Any], moments: list[Any]) -> list[Any]:
    """The weight of the output at each node: its Lagrange polynomial, expanded, integrated by the moments."""
    found = []
    for i, node in enumerate(nodes):
        others = nodes[:i] + nodes[i + 1 :]
        scale = math.prod([node - other for other in others], start=F32(1))
        total = F32(0)
        for k in range(len(nodes)):  # the elementary symmetric polynomials are the coefficients, highest power first
            symmetric = sum((math.prod(chosen, start=F32(1)) for chosen in combinations(others, k)), start=F32(0))
            total = total + (-symmetric if k % 2 else symmetric) / scale * moments[len(nodes) - 1 - k]
        found.append(total)
    return found


def _update(
    call: Call, sample: Array, start: Point, end: Point, nodes: list[Point], outputs: list[Array], tau: int,
    noise: Array, correcting: bool,
) -> Array:  # fmt: skip
    """One step from ``start`` to ``end`` with the ``outputs`` at ``nodes``, newest first."""
    of_data, two = call.config["algorithm_type"] == "data_prediction", F32(2)
    h, weight = end.half_log_snr - start.half_log_snr, F32(1 + tau * tau)
    logs = [node.half_log_snr for node in nodes]
    moments = _moments(len(nodes), start.half_log_snr, end.half_log_snr, tau, of_data)
    weights = _coefficients(logs, moments)
    if of_data and len(nodes) == 2:  # a term of third order, which the reference adds for runs of few steps
        rest = h * weight - F32(1) + exp32(-(weight * h))
        if correcting:
            added = h / two - rest / (np.square(weight) * h)
        else:
            added = (np.square(h) / two - rest / np.square(weight)) / (start.half_log_snr - logs[1])
        added = exp32(weight * end.half_log_snr) * added
        weights = [weights[0] + added, weights[1] - added]
    if of_data:
        growth, std = weight * end.sigma * exp32(F32(-tau) * end.half_log_snr), np.sqrt(F32(1) - exp32(-two * tau * h))
        kept = exp32(F32(-tau) * h) * (end.sigma / start.sigma)
    else:
        growth, std = -weight * end.alpha, F32(tau) * np.sqrt(exp32(two * h) - F32(1))
        kept = end.alpha / start.alpha
    total = sum((growth * w * output for w, output in zip(weights, outputs, strict=True)), start=F32(0))
    return np.asarray(kept * sample + total + end.sigma * std * noise, F32)


def _orders(call: Call, index: int, calls: int) -> tuple[int, int]:
    """(predictor's, corrector's) order after ``calls`` evaluations; the corrector is the next evaluation's."""
    predictor, corrector = int(call.config["predictor_order"]), int(call.config["corrector_order"])
    left = len(call.plan.timesteps) - index if call.config["lower_order_final"] else predictor + corrector
    warm = min(calls, max(predictor, corrector - 1))
    return min(predictor, left, warm + 1), min(corrector, left + 1, warm + 2)


def _tau(call: Call, index: int) -> int:
    return int(NOISY[0] <= int(call.plan.timesteps[index]) <= NOISY[1])


def sa_solver(call: Call) -> Update:
    """SA-Solver: Xue et al. 2023 (arXiv 2309.05019), algorithm 1; the corrector refines the sample just reached."""
    integrand, denoised = converted(call, call.config["algorithm_type"] == "noise_prediction")
    past, i, sample = call.history, call.index, call.latents
    if i > 0 and past.sample is not None and past.partial is not None:
        order = _orders(call, i - 1, past.calls - 1)[1]
        nodes, outputs = [point(call, i - k) for k in range(order)], [integrand, *past.outputs[::-1]][:order]
        start = point(call, i - 1)
        sample = _update(call, past.sample, start, nodes[0], nodes, outputs, _tau(call, i - 1), past.partial, True)
    kept = past.keep(integrand, max(int(call.config["predictor_order"]), int(call.config["corrector_order"]) - 1))
    order, noise = _orders(call, i, past.calls)[0], call.draw()
    nodes, outputs = [point(call, i - k) for k in range(order)], list(kept[::-1][:order])
    latents = _update(call, sample, nodes[0], point(call, i + 1), nodes, outputs, _tau(call, i), noise, False)
    return call.done(latents, denoised, outputs=kept, sample=sample, partial=noise)
