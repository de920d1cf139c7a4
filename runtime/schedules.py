"""Noise schedules: betas, spaced timesteps, and the ways to space sigmas.

A schedule is a mapping with the field names of diffusers' ``scheduler_config.json``; a missing field has the default
of the class that ``_class_name`` names. Every table is float32 (the precision the reference implementations compute
in), because a sampler's coefficients cancel and only the same rounding gives the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from latentedge.runtime.errors import UsageError

Array = npt.NDArray[Any]
Config = Mapping[str, Any]
F32 = np.float32

COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon", "steps_offset": 0, "timestep_spacing": "linspace", "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "final_sigmas_type": "zero",
}  # fmt: skip
_LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_CONSISTENCY = {**_LATENT_BETAS, "beta_schedule": "scaled_linear", "original_inference_steps": 50,
                "set_alpha_to_one": True, "timestep_scaling": 10.0}  # fmt: skip
_SOLVER = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True,
           "flow_shift": 1.0, "lambda_min_clipped": -math.inf, "time_shift_type": "exponential"}  # fmt: skip
_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0}
# What each class assumes for a field that its config leaves out (facts of diffusers 0.42 signatures).
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"timestep_spacing": "leading", "clip_sample": True, "set_alpha_to_one": True},
    "DDPMScheduler": {"timestep_spacing": "leading", "clip_sample": True, "variance_type": "fixed_small"},
    "PNDMScheduler": {"timestep_spacing": "leading"},
    "HeunDiscreteScheduler": _LATENT_BETAS,
    "KDPM2DiscreteScheduler": _LATENT_BETAS,
    "KDPM2AncestralDiscreteScheduler": _LATENT_BETAS,
    "DPMSolverSDEScheduler": _LATENT_BETAS,
    "LCMScheduler": _CONSISTENCY,
    "TCDScheduler": {**_CONSISTENCY, "eta": 0.3},
    "DPMSolverMultistepScheduler": _SOLVER,
    "DPMSolverSinglestepScheduler": {**_SOLVER, "lower_order_final": False},
    "DEISMultistepScheduler": {**_SOLVER, "solver_type": "logrho"},
    "UniPCMultistepScheduler": {**_SOLVER, "solver_type": "bh2", "predict_x0": True, "disable_corrector": ()},
    "FlowMatchEulerDiscreteScheduler": {"shift": 1.0, "time_shift_type": "exponential"},
    "FlowMatchHeunDiscreteScheduler": {"shift": 1.0},
    "FlowMatchLCMScheduler": {"shift": 1.0, "time_shift_type": "exponential"},
    "DDIMParallelScheduler": {"timestep_spacing": "leading", "clip_sample": True, "set_alpha_to_one": True},
    "DDPMParallelScheduler": {"timestep_spacing": "leading", "clip_sample": True, "variance_type": "fixed_small"},
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {**_SOLVER, **_EDM},
    "SASolverScheduler": {**_SOLVER, "algorithm_type": "data_prediction", "predictor_order": 2, "corrector_order": 2},
}
# Sabour et al. 2024 (Align Your Steps), ten-step optima; other step counts interpolate log sigma.
ALIGN_YOUR_STEPS = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113),
}


def alpha_sigma(sigma: Any, flow: bool = False) -> tuple[Any, Any]:
    """(alpha, sigma): the weights of signal and noise in a sample whose noise level is ``sigma``."""
    if flow:
        return F32(1) - sigma, sigma
    alpha = F32(1) / np.sqrt(np.square(sigma) + F32(1))
    return alpha, sigma * alpha


def linspace(start: float, end: float, count: int, dtype: Any = F32) -> Array:
    """``count`` float32 or float64 points, rounded as torch rounds them: from both ends, multiplied and added as one."""
    wide: Any = np.float64 if dtype is F32 else np.longdouble
    step = wide((dtype(end) - dtype(start)) / dtype(max(count - 1, 1)))
    i = np.arange(count).astype(wide)
    ascending, descending = wide(dtype(start)) + step * i, wide(dtype(end)) - step * (count - 1 - i)
    return np.asarray(np.where((i < count // 2) | (count == 1), ascending, descending).astype(dtype))


def log32(x: Any) -> Any:
    """The natural logarithm of float32 values, correctly rounded."""
    return F32(np.log(np.float64(x)))


def exp32(x: Any) -> Any:
    """The exponential of float32 values, correctly rounded."""
    return F32(np.exp(np.float64(x)))


def expm1_32(x: Any) -> Any:
    """exp(x) - 1 of float32 values, correctly rounded."""
    return F32(np.expm1(np.float64(x)))


def _capped_betas(alpha_bar: Any, count: int) -> Array:
    ratios = [min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), 0.999) for i in range(count)]
    return np.array(ratios, F32)


def _laplace(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def betas(config: Config) -> Array:
    """Float32 [T]: the variance of the noise that each training timestep adds, before any zero-SNR rescaling."""
    name, count = config["beta_schedule"], config["num_train_timesteps"]
    start, end = config["beta_start"], config["beta_end"]
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], F32)
    match name:
        case "linear":
            return linspace(start, end, count)
        case "scaled_linear":
            return np.asarray(linspace(start**0.5, end**0.5, count) ** 2)
        case "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, equation 17
            return _capped_betas(lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, count)
        case "exp":
            return _capped_betas(lambda t: math.exp(t * -12.0), count)
        case "laplace":
            return _capped_betas(_laplace, count)
        case "sigmoid":
            ramp = 1 / (1 + np.exp(-linspace(-6, 6, count).astype(np.float64)))
            return np.asarray(ramp.astype(F32) * F32(end - start) + F32(start))
    known = "linear, scaled_linear, squaredcos_cap_v2, exp, laplace, sigmoid"
    raise UsageError(f"beta_schedule {name!r} is unknown", f"use one of {known}, or give trained_betas")


def exact_betas(config: Config) -> Array:
    """Float64 [T]: betas as CompVis's code computes them; ``scaled_linear`` is its "linear"."""
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], np.float64)
    start, end, count = config["beta_start"], config["beta_end"], int(config["num_train_timesteps"])
    match config["beta_schedule"]:
        case "linear":
            return linspace(start, end, count, np.float64)
        case "scaled_linear":
            return np.asarray(linspace(start**0.5, end**0.5, count, np.float64) ** 2)
        case "sqrt":
            return np.sqrt(linspace(start, end, count, np.float64))
        case "squaredcos_cap_v2":
            bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.asarray(np.clip(1 - bar[1:] / bar[:-1], 0, 0.999))
    raise UsageError(f"beta_schedule {config['beta_schedule']!r} is unknown", "use linear, scaled_linear or sqrt")


def cumulative(values: Array) -> Array:
    """Float32 [T]: the cumulative product of ``1 - values``, accumulated in float64."""
    return np.asarray(np.cumprod((F32(1) - values).astype(np.float64)).astype(F32))


def alphas_cumprod(config: Config, zero_snr_floor: float = 0.0) -> Array:
    """Float32 [T]: the signal's variance at each training timestep.

    ``rescale_betas_zero_snr`` applies algorithm 1 of Lin et al. 2023 (arXiv 2305.08891); the last entry is then
    ``zero_snr_floor``, since samplers that divide by it need 2**-24 where the others take 0. A CompVis checkpoint
    holds the float32 of a float64 product.
    """
    if config.get("dialect") == "compvis" and not config.get("rescale_betas_zero_snr"):
        return np.asarray(np.cumprod(1.0 - exact_betas(config)).astype(F32))
    values = betas(config)
    if not config.get("rescale_betas_zero_snr"):
        return cumulative(values)
    root = np.sqrt(cumulative(values))
    shifted = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = np.square(shifted)
    result = cumulative(F32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]]))
    result[-1] = zero_snr_floor or result[-1]
    return result


def spaced(config: Config, steps: int, extra: int = 0, last: int | None = None) -> Array:
    """Float64 [steps], descending: Lin et al. 2023, table 2; ``linspace`` is not rounded here.

    ``extra`` points are laid out at the low end and dropped: multistep solvers end there, without an evaluation.
    """
    total = int(config["num_train_timesteps"])
    last = total if last is None else last
    match config["timestep_spacing"]:
        case "linspace":
            return np.linspace(0, last - 1, steps + extra)[::-1][:steps].copy()
        case "leading":
            ramp = np.arange(steps + extra) * (last // (steps + extra))
            return np.asarray(ramp[::-1][:steps].astype(np.float64) + config["steps_offset"])
        case "trailing":
            return np.asarray(np.arange(last, 0, -total / steps).round() - 1)
        case other:
            raise UsageError(f"timestep_spacing {other!r} is unknown", "use leading, trailing or linspace")


def timestep_of_sigma(sigmas: Array, log_sigmas: Array, index_type: Any = np.float64) -> Array:
    """The fractional training timestep of each sigma, by linear interpolation of log sigma."""
    wanted = np.log(np.maximum(sigmas, 1e-10, dtype=sigmas.dtype))
    reached = (log_sigmas <= wanted[:, None])[:, ::-1]  # a table rescaled to zero SNR need not rise at its end
    low = np.where(reached.any(axis=1), len(log_sigmas) - 1 - reached.argmax(axis=1), 0).clip(0, len(log_sigmas) - 2)
    below, above = log_sigmas[low], log_sigmas[low + 1]
    weight = np.clip((below - wanted) / (below - above), 0, 1)
    index = low.astype(index_type)
    return np.asarray((1 - weight) * index + weight * (index + 1))


def _beta_quantile(p: float, a: float) -> float:
    """The ``p`` quantile of Beta(a, a): Newton's method on the power series of its distribution function."""
    if p > 0.5:
        return 1.0 - _beta_quantile(1.0 - p, a)
    log_beta = 2 * math.lgamma(a) - math.lgamma(2 * a)
    x = min((p * a * math.exp(log_beta)) ** (1 / a), 0.5) if p else 0.0
    for _ in range(60 if p else 0):
        term, total = 1.0, 1.0 / a
        for n in range(1, 80):
            term *= (n - a) / n * x
            total += term / (a + n)
        value = math.exp(a * math.log(x) - log_beta) * total
        step = (value - p) / math.exp((a - 1) * math.log(x * (1 - x)) - log_beta)
        x = min(max(x - step, x / 2), 0.5)
        if abs(step) <= 1e-16 * x:
            break
    return x


def respaced(config: Config, first: Any, last: Any, steps: int) -> Array | None:
    """Float64 [steps] sigmas where the config asks for a spacing of its own, else None.

    Karras et al. 2022, equation 5 (rho 7); exponential: even in log sigma; beta: quantiles of Beta(0.6, 0.6),
    Lee et al. 2024 (arXiv 2407.12173); align-your-steps: the table above.
    """
    chosen = [f"use_{k}_sigmas" for k in ("karras", "exponential", "beta", "ays") if config.get(f"use_{k}_sigmas")]
    if len(chosen) > 1:
        raise UsageError(f"only one sigma schedule can be used, found {', '.join(chosen)}", "leave one of them true")
    high, low = (config.get("sigma_max"), config.get("sigma_min"))
    high, low = float(first if high is None else high), float(last if low is None else low)
    ramp = np.linspace(0, 1, steps)
    match chosen:
        case ["use_karras_sigmas"]:
            ends = high ** (1 / 7.0), low ** (1 / 7.0)
            return np.asarray((ends[0] + ramp * (ends[1] - ends[0])) ** 7.0)
        case ["use_exponential_sigmas"]:
            return np.exp(np.linspace(math.log(high), math.log(low), steps))
        case ["use_beta_sigmas"]:
            return np.array([low + _beta_quantile(p, 0.6) * (high - low) for p in 1 - ramp])
        case ["use_ays_sigmas"]:
            table = np.log(ALIGN_YOUR_STEPS[config.get("ays_model") or "sd"])
            return np.exp(np.interp(ramp, np.linspace(0, 1, len(table)), table))
    return None


def sigma_table(acp: Array) -> Array:
    """Float32 [T]: sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod)."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.sqrt((F32(1) - acp) / acp))


def ancestral_split(sigma: Any, sigma_next: Any) -> tuple[Any, Any]:
    """(sigma_up, sigma_down): the noise to add and the sigma to reach first, so that their squares sum to the next's.

    The variance of the DDPM posterior, written in sigma. Where the difference of squares vanishes in float32,
    sigma_down is its closed form, sigma_next**2 / sigma.
    """
    here, there = np.square(sigma), np.square(sigma_next)
    up = np.sqrt(there * (here - there) / here)
    rest = there - np.square(up)
    return up, np.where(rest > 0, np.sqrt(np.maximum(rest, F32(0))), there / sigma).astype(F32)[()]
