"""UniPC: a predictor and a corrector of any order that share their model evaluations."""

from __future__ import annotations

from typing import Any

import numpy as np

from latentedge.runtime.samplers.base import Call, Update
from latentedge.runtime.samplers.dpm_solver import Point, converted, point
from latentedge.runtime.schedules import F32, Array, expm1_32


def _order(call: Call, index: int, calls: int) -> int:
    wanted = int(call.config["solver_order"])
    left = len(call.plan.timesteps) - index if call.config["lower_order_final"] else wanted
    return min(wanted, left, calls + 1)


def _weights(ratios: list[Any], hh: Any, scale: Any) -> tuple[Array, Array]:
    """The linear system of Zhao et al. 2023, equation 5: powers of the ratios, and the phi functions to match."""
    nodes = np.array([*ratios, F32(1)], F32)
    phi, factorial, targets, powers = expm1_32(hh) / hh - F32(1), 1, [], [np.ones_like(nodes)]
    for i in range(1, len(nodes) + 1):
        targets.append(phi * F32(factorial) / scale)
        factorial *= i + 1
        phi = phi / hh - F32(1 / factorial)
        powers.append(powers[-1] * nodes)
    return np.stack(powers[:-1]), np.array(targets, F32)


def _solved(matrix: Array, targets: Array) -> Array:
    return np.asarray(np.linalg.solve(matrix.astype(np.float64), targets.astype(np.float64)).astype(F32))


def _update(
    call: Call, sample: Array, start: Point, end: Point, past: list[tuple[Point, Array]], newest: Array,
    corrected: Array | None,
) -> Array:  # fmt: skip
    """Both updates: ``past`` holds earlier points and outputs; ``corrected`` is the output at ``end``, if known."""
    of_data = bool(call.config["predict_x0"])
    h = end.half_log_snr - start.half_log_snr
    hh = -h if of_data else h
    growth = end.alpha if of_data else end.sigma
    kept = end.sigma / start.sigma if of_data else end.alpha / start.alpha
    latents = kept * sample
    if not np.isfinite(h):  # to sigma 0: the limit of the first-order step is the denoised sample
        denoised = newest if of_data else (sample - start.sigma * newest) / start.alpha
        return np.asarray(denoised)
    latents = latents - growth * expm1_32(hh) * newest
    ratios = [(p.half_log_snr - start.half_log_snr) / h for p, _ in past]
    differences = [(output - newest) / ratio for (_, output), ratio in zip(past, ratios, strict=True)]
    scale = hh if call.config["solver_type"] == "bh1" else expm1_32(hh)
    matrix, targets = _weights(ratios, hh, scale)
    if corrected is not None:
        differences.append(corrected - newest)
    size = len(differences)
    if size == 0:
        return np.asarray(latents)
    weights = np.full(1, F32(0.5)) if size == 1 else _solved(matrix[:size, :size], targets[:size])
    total = sum(weight * difference for weight, difference in zip(weights, differences, strict=True))
    return np.asarray(latents - growth * scale * total)


def unipc(call: Call) -> Update:
    """UniPC-p: Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 to 8; the corrector refines the sample just reached."""
    integrand, denoised = converted(call, not call.config["predict_x0"])
    history, i, sample = call.history, call.index, call.latents
    if i > 0 and i - 1 not in (call.config["disable_corrector"] or ()) and history.sample is not None:
        order = _order(call, i - 1, history.calls - 1)
        past = [(point(call, i - 1 - k), history.outputs[-1 - k]) for k in range(1, order)]
        start, end = point(call, i - 1), point(call, i)
        sample = _update(call, history.sample, start, end, past, history.outputs[-1], integrand)
    outputs = history.keep(integrand, int(call.config["solver_order"]))
    past = [(point(call, i - k), outputs[-1 - k]) for k in range(1, _order(call, i, history.calls))]
    latents = _update(call, sample, point(call, i), point(call, i + 1), past, integrand, None)
    return call.done(latents, denoised, outputs=outputs, sample=sample)
