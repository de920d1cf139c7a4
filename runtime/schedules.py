"""Noise schedules: betas, and which timesteps and sigmas a run visits.

A schedule is a mapping with the field names of diffusers' ``scheduler_config.json``; a missing field has the default
of the class that ``_class_name`` names. Every table is float32 (the precision the reference implementations compute
in), because a sampler's coefficients cancel and only the same rounding gives the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    "TCDScheduler": _CONSISTENCY,
    "DPMSolverMultistepScheduler": _SOLVER,
    "DPMSolverSinglestepScheduler": {**_SOLVER, "lower_order_final": False},
    "DEISMultistepScheduler": {**_SOLVER, "solver_type": "logrho"},
    "UniPCMultistepScheduler": {**_SOLVER, "solver_type": "bh2", "predict_x0": True, "disable_corrector": ()},
    "FlowMatchEulerDiscreteScheduler": {"shift": 1.0, "time_shift_type": "exponential"},
    "FlowMatchHeunDiscreteScheduler": {"shift": 1.0},
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


@dataclass(frozen=True)
class Plan:
    """What one run visits, fixed before the first evaluation; index ``i`` is the model's ``i``-th evaluation.

    ``timesteps`` [n], in the dtype in which the model gets them (int64, float32 or float64); ``sigmas`` float32
    [n + 1 or more], as diffusers lists them; ``init_noise_sigma``, what N(0, 1) is multiplied by to start;
    ``alphas_cumprod`` float32 [T]; ``tables``, what one sampler needs beyond that. ``space`` says how a sample holds
    its noise: ``alpha`` and ``solver`` (variance preserving), ``sigma`` (x0 + sigma * noise), ``flow``
    ((1 - sigma) * x0 + sigma * noise). ``order``: evaluations in a step.
    """

    config: Config
    steps: int
    timesteps: Array
    sigmas: Array
    init_noise_sigma: Any
    space: str
    alphas_cumprod: Array = field(default_factory=lambda: np.ones(1, F32))
    tables: Mapping[str, Any] = field(default_factory=dict)
    order: int = 1

    @property
    def input_sigmas(self) -> Array:
        """Float32 [n]: the sigma of each evaluation, midpoints included."""
        return np.asarray(self.tables.get("input_sigmas", self.sigmas[: len(self.timesteps)]))

    def begin(self, strength: float) -> int:
        """The index of the first evaluation when a picture is changed by ``strength``, 0 (not at all) to 1 (drawn anew).

        ``int(steps * strength)`` steps are made. At strength 0 that is none: the index is ``len(timesteps)``.
        """
        if not 0 <= strength <= 1:
            raise UsageError(f"strength must be between 0 and 1, found {strength}")
        kept, count = min(int(self.steps * strength), self.steps), len(self.timesteps)
        if kept == 0:
            return count
        if not self._compvis:
            return (self.steps - kept) * self.order
        if self.config["_class_name"] == "PNDMScheduler" and strength < 1:
            raise UsageError("CompVis's PLMS cannot start midway", "use the ddim sampler, or strength 1")
        return 0 if strength == 1 else count - kept

    @property
    def _compvis(self) -> bool:
        return "compvis" in self.tables

    def add_noise(self, denoised: Array, noise: Array, index: int) -> Array:
        """Float32 [N, ...]: ``denoised`` mixed with N(0, 1) ``noise`` to the level of evaluation ``index``.

        ``index == len(timesteps)`` is after the last evaluation, and gives ``denoised`` back.
        """
        if index == len(self.timesteps):
            return denoised.astype(F32)
        sigma = self.input_sigmas[index]
        if self.space == "sigma":
            return np.asarray(denoised + noise * sigma, F32)
        if self.space == "alpha":
            signal = self.alphas_cumprod[int(self.timesteps[index])]
            return np.asarray(np.sqrt(signal) * denoised + np.sqrt(F32(1) - signal) * noise, F32)
        alpha, sigma = alpha_sigma(sigma, self.space == "flow" or bool(self.config.get("use_flow_sigmas")))
        return np.asarray(alpha * denoised + sigma * noise, F32)

    def noised_start(self, denoised: Array, noise: Array, begin: int) -> Array:
        """The sample from which a partial run begins; CompVis noises to the level one evaluation before ``begin``."""
        shift = 1 if self._compvis and 0 < begin < len(self.timesteps) else 0
        return self.add_noise(denoised, noise, begin - shift)


def linspace(start: float, end: float, count: int, dtype: Any = F32) -> Array:
    """``count`` float32 or float64 points, rounded as torch rounds them: from both ends, multiplied and added as one."""
    wide: Any = np.float64 if dtype is F32 else np.longdouble
    step = wide((dtype(end) - dtype(start)) / dtype(max(count - 1, 1)))
    i = np.arange(count).astype(wide)
    ascending, descending = wide(dtype(start)) + step * i, wide(dtype(end)) - step * (count - 1 - i)
    return np.asarray(np.where(i < count // 2, ascending, descending).astype(dtype))


def log32(x: Any) -> Any:
    """The natural logarithm of float32 values, correctly rounded."""
    return F32(np.log(np.float64(x)))


def exp32(x: Any) -> Any:
    """The exponential of float32 values, correctly rounded."""
    return F32(np.exp(np.float64(x)))


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


def cumulative(values: Array) -> Array:
    """Float32 [T]: the cumulative product of ``1 - values``, accumulated in float64."""
    return np.asarray(np.cumprod((F32(1) - values).astype(np.float64)).astype(F32))


def alphas_cumprod(config: Config, zero_snr_floor: float = 0.0) -> Array:
    """Float32 [T]: the signal's variance at each training timestep.

    ``rescale_betas_zero_snr`` applies algorithm 1 of Lin et al. 2023 (arXiv 2305.08891); the last entry is then
    ``zero_snr_floor``, since samplers that divide by it need 2**-24 where the others take 0.
    """
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
    low = np.clip(np.searchsorted(log_sigmas, wanted, side="right") - 1, 0, len(log_sigmas) - 2)
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


def _given(config: Config, name: str) -> Array | None:
    return None if config.get(name) is None else np.asarray(config[name])


def _final_sigma(config: Config, sigma_min: Any) -> Any:
    match config["final_sigmas_type"]:
        case "zero":
            return 0.0
        case "sigma_min":
            return sigma_min
        case other:
            raise UsageError(f"final_sigmas_type {other!r} is unknown", "use zero or sigma_min")


def sigma_table(acp: Array) -> Array:
    """Float32 [T]: sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod)."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.sqrt((F32(1) - acp) / acp))


def discrete(config: Config, steps: int) -> Plan:
    """Whole training timesteps, for samplers that step between entries of ``alphas_cumprod`` (DDIM, DDPM)."""
    given = _given(config, "timesteps")
    timesteps = (spaced(config, steps).round() if given is None else given).astype(np.int64)
    return on_table(config, steps, timesteps, alphas_cumprod(config))


def on_table(config: Config, steps: int, timesteps: Array, acp: Array, **tables: Any) -> Plan:
    """A plan whose sigmas are those of its whole timesteps."""
    sigmas = np.append(sigma_table(acp)[timesteps], F32(0))
    return Plan(config, steps, timesteps, sigmas, 1.0, "alpha", acp, tables)


def pndm(config: Config, steps: int) -> Plan:
    """Liu et al. 2022: twelve Runge-Kutta evaluations unless ``skip_prk_steps``, then one a step."""
    ascending = spaced(config, steps).round()[::-1].astype(np.int64)
    half = int(config["num_train_timesteps"]) // steps // 2
    if config.get("skip_prk_steps"):
        prk, rest = ascending[:0], np.concatenate([ascending[:-1], ascending[-2:-1], ascending[-1:]])[::-1]
    elif steps < 4:
        raise UsageError(f"PNDM needs 4 or more steps, found {steps}", "raise steps or set skip_prk_steps")
    else:
        prk = (ascending[-4:].repeat(2) + np.tile([0, half], 4))[:-1].repeat(2)[1:-1][::-1]
        rest = ascending[:-3][::-1]
    return on_table(config, steps, np.concatenate([prk, rest]), alphas_cumprod(config), prk=prk)


def consistency(config: Config, steps: int) -> Plan:
    """Timesteps of the distillation schedule (Luo et al. 2023), of which ``steps`` are taken evenly."""
    total, original = int(config["num_train_timesteps"]), int(config["original_inference_steps"])
    origin = np.arange(1, int(original * config.get("strength", 1.0)) + 1) * (total // original) - 1
    given = _given(config, "timesteps")
    if given is None and steps > len(origin):
        raise UsageError(f"{steps} steps asked for, the distillation schedule has {len(origin)}", "use fewer steps")
    picks = np.floor(np.linspace(0, len(origin), num=steps, endpoint=False)).astype(np.int64)
    timesteps = origin[::-1][picks] if given is None else given.astype(np.int64)
    return on_table(config, steps, timesteps, alphas_cumprod(config))


def _sigma_steps(config: Config, steps: int, timestep_type: Any) -> tuple[Array, Array, Array]:
    """(timesteps, sigmas and the final one, alphas_cumprod) of the samplers that work in sigma; not yet rounded."""
    acp = alphas_cumprod(config, 2.0**-24)
    table = sigma_table(acp)
    logs = np.log(table)
    if (sigmas := _given(config, "sigmas")) is not None:
        sigmas = sigmas.astype(F32)
        return timestep_of_sigma(sigmas[:-1], logs), sigmas, acp
    given = _given(config, "timesteps")
    timesteps = (spaced(config, steps) if given is None else given).astype(timestep_type)
    sigmas = np.interp(timesteps, np.arange(len(table)), table)
    if config.get("interpolation_type") == "log_linear":
        sigmas = exp32(linspace(np.log(table[-1]), np.log(table[0]), steps + 1))
    if (changed := respaced(config, sigmas[0], sigmas[-1], steps)) is not None:
        sigmas, timesteps = changed, timestep_of_sigma(changed, logs)
    return timesteps, np.append(sigmas, _final_sigma(config, table[0])), acp


def _sigma_plan(config: Config, steps: int, timesteps: Array, sigmas: Array, acp: Array, **tables: Any) -> Plan:
    largest = sigmas.max()
    if config["timestep_spacing"] not in ("linspace", "trailing"):
        largest = np.sqrt(F32(np.square(largest) + F32(1)))
    return Plan(config, steps, timesteps, sigmas, largest, "sigma", acp, tables)


def sigma_space(config: Config, steps: int) -> Plan:
    """One evaluation a step at the sigma of each timestep (Euler, LMS)."""
    timesteps, sigmas, acp = _sigma_steps(config, steps, F32)
    if config.get("timestep_type") == "continuous" and config["prediction_type"] == "v_prediction":
        timesteps = F32(0.25) * log32(sigmas[:-1].astype(F32))
    return _sigma_plan(config, steps, timesteps.astype(F32), sigmas.astype(F32), acp)


def _both_ends(values: Array) -> Array:
    """The first value once and each later one twice: a step's end is evaluated again as the next one's start."""
    return np.concatenate([values[:1], values[1:].repeat(2)])


def heun(config: Config, steps: int) -> Plan:
    """Two evaluations for each step but the last, at both of its ends."""
    timesteps, sigmas, acp = _sigma_steps(config, steps, F32)
    doubled = np.append(_both_ends(sigmas[:-1]), sigmas[-1]).astype(F32)
    return _sigma_plan(config, steps, _both_ends(timesteps).astype(F32), doubled, acp)


def _between(first: Array, second: Array) -> Array:
    """Alternately an entry of ``first`` (one longer) and of ``second``."""
    return np.append(np.stack([first[:-1], second], axis=-1).ravel(), first[-1])


def midpoint(config: Config, steps: int) -> Plan:
    """Two evaluations for each step but the last, the second at the geometric mean of its sigmas (DPM2)."""
    timesteps, exact, acp = _sigma_steps(config, steps, F32)
    timesteps = timesteps.round() if config.get("use_karras_sigmas") else timesteps
    sigmas = exact.astype(F32)
    up, down = ancestral_split(sigmas[:-1], sigmas[1:])
    with np.errstate(divide="ignore", invalid="ignore"):
        first, last = log32(sigmas[1:]), log32(sigmas[:-1])
        if config["_class_name"] != "KDPM2DiscreteScheduler":  # ancestral: towards sigma_down
            first, last = last, log32(down)
        middle = exp32(last - (last - first) * F32(0.5))
    middle[-1] = 0
    times = timestep_of_sigma(middle[:-1], np.log(sigma_table(acp)), F32).astype(timesteps.dtype)
    listed = np.concatenate([sigmas[:1], sigmas[1:].repeat(2), sigmas[-1:]])
    tables = {"sigma": sigmas, "middle": middle, "up": up, "down": down}
    inputs = _between(sigmas[:-1], middle[:-1])
    return _sigma_plan(config, steps, _between(timesteps, times), listed, acp, input_sigmas=inputs, **tables)


def ancestral_split(sigma: Any, sigma_next: Any) -> tuple[Any, Any]:
    """(sigma_up, sigma_down): the noise to add and the sigma to reach first, so that their squares sum to the next's.

    The variance of the DDPM posterior, written in sigma. Where the difference of squares vanishes in float32,
    sigma_down is its closed form, sigma_next**2 / sigma.
    """
    here, there = np.square(sigma), np.square(sigma_next)
    up = np.sqrt(there * (here - there) / here)
    rest = there - np.square(up)
    return up, np.where(rest > 0, np.sqrt(np.maximum(rest, F32(0))), there / sigma).astype(F32)[()]


def midpoint_sde(config: Config, steps: int) -> Plan:
    """Two evaluations for each step but the last, the second halfway in log sigma; timesteps in float64."""
    timesteps, exact, acp = _sigma_steps(config, steps, np.float64)
    logs = -np.log(exact[:-1])
    times = timestep_of_sigma(np.exp(-(logs[:-1] + np.diff(logs) * 0.5)), np.log(sigma_table(acp)))
    sigmas = exact.astype(F32)
    t, t_next = -log32(sigmas[:-2]), -log32(sigmas[1:-1])
    middle = exp32(-(t + (t_next - t) * F32(0.5)))
    doubled = np.append(_both_ends(sigmas[:-1]), sigmas[-1])
    inputs = _between(sigmas[:-1], middle)
    return _sigma_plan(config, steps, _between(timesteps, times), doubled, acp, middle=middle, input_sigmas=inputs)


def _lu_sigmas(log_sigmas: Array, steps: int) -> Array:
    """Even in half log-SNR: Lu et al. 2022 (DPM-Solver), section 3.4."""
    high, low = float(log_sigmas[-1]), float(log_sigmas[0])
    return np.exp(high + np.linspace(0, 1, steps) * (low - high))


def solver(config: Config, steps: int) -> Plan:
    """Whole timesteps and their sigmas, for the exponential integrators (DPM-Solver, UniPC, DEIS)."""
    name, total = config["_class_name"], int(config["num_train_timesteps"])
    acp = alphas_cumprod(config, 2.0**-24)
    table = sigma_table(acp)
    logs, lowest = np.log(table), table[0]
    with np.errstate(divide="ignore"):
        lambdas = log32(np.sqrt(acp)) - log32(np.sqrt(F32(1) - acp))
    clipped = int(np.searchsorted(lambdas[::-1], config["lambda_min_clipped"]))
    given = _given(config, "timesteps")
    timesteps = spaced(config, steps, 1, total - clipped).round() if given is None else given
    sigmas = respaced(config, table[-1], lowest, steps)
    if sigmas is None and config.get("use_lu_lambdas"):
        sigmas = _lu_sigmas(logs, steps)
    unipc = name == "UniPCMultistepScheduler"
    if sigmas is not None and unipc and config.get("use_flow_sigmas") and config.get("use_karras_sigmas"):
        sigmas = sigmas / (sigmas + 1)
        timesteps = sigmas * total
    elif sigmas is not None:
        timesteps = timestep_of_sigma(sigmas, logs)
        cosine = name == "DPMSolverMultistepScheduler" and config["beta_schedule"] == "squaredcos_cap_v2"
        whole = any(config.get(f"use_{kind}") for kind in ("karras_sigmas", "lu_lambdas", "ays_sigmas"))
        timesteps = timesteps.round() if whole and not cosine else timesteps
    elif config.get("use_flow_sigmas"):
        sigmas = _flow_solver_sigmas(config, steps)
        timesteps = sigmas * total
    deis = name == "DEISMultistepScheduler"
    final = lowest if sigmas is None or not (unipc or deis) else sigmas[-1]
    sigmas = np.interp(timesteps, np.arange(len(table)), table) if sigmas is None else sigmas
    sigmas = np.append(sigmas, final if deis else _final_sigma(config, final)).astype(F32)
    return Plan(config, steps, timesteps.astype(np.int64), sigmas, 1.0, "solver", acp)


def _flow_solver_sigmas(config: Config, steps: int) -> Array:
    """Float64 [steps]: flow-matching sigmas, shifted (Esser et al. 2024, equation 23)."""
    total, unipc = config["num_train_timesteps"], config["_class_name"] == "UniPCMultistepScheduler"
    ramp = np.linspace(1, 1 / total, steps + 1)
    mu, shift = config.get("mu"), config["flow_shift"]
    if not unipc:
        shift = math.exp(mu) if mu is not None else shift
        return np.asarray(np.flip(shift * (1.0 - ramp) / (1 + (shift - 1) * (1.0 - ramp)))[:-1])
    given = _given(config, "sigmas")
    sigmas = flow_shifted(config, ramp[:-1] if given is None else given.astype(np.float64), shift)
    if abs(sigmas[0] - 1) < 1e-6:  # alpha is 0 there, and its logarithm is taken
        sigmas[0] -= 1e-6
    return sigmas


def flow_shifted(config: Config, sigmas: Array, shift: float) -> Array:
    """Sigmas moved towards noise by ``shift``, or by ``mu`` where the config shifts with the picture's size."""
    if config.get("use_dynamic_shifting"):
        if (mu := config.get("mu")) is None:
            raise UsageError("use_dynamic_shifting needs mu", "give mu in the schedule, from the picture's size")
        weight = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        sigmas = np.asarray(weight / (weight + (1 / sigmas - 1) ** 1.0))
    else:
        sigmas = np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))
    if terminal := config.get("shift_terminal"):
        rest = 1 - sigmas
        sigmas = 1 - rest / (rest[-1] / (1 - terminal))
    return sigmas


def flow(config: Config, steps: int) -> Plan:
    """Sigmas from 1 to 0 of a flow-matching model (Euler, Heun); timesteps are sigma * T in float32."""
    total, shift = config["num_train_timesteps"], config["shift"]
    ends = np.array([total, 1], F32) / F32(total)
    if not config.get("use_dynamic_shifting"):  # the ends are shifted once here and again with the rest below
        ends = F32(shift) * ends / (F32(1) + F32(shift - 1) * ends)
    given, times = _given(config, "sigmas"), _given(config, "timesteps")
    timesteps = np.linspace(float(ends[0]) * total, float(ends[1]) * total, steps) if times is None else times
    sigmas = timesteps.astype(np.float64 if times is None else F32) / total if given is None else given.astype(F32)
    sigmas = flow_shifted(config, sigmas, shift)
    changed = respaced(config, float(sigmas[0]), float(sigmas[-1]), len(sigmas))
    sigmas = (sigmas if changed is None else changed).astype(F32)
    timesteps = sigmas * F32(total) if times is None else times.astype(F32)
    if config.get("invert_sigmas"):
        sigmas = F32(1) - sigmas
        timesteps = sigmas * F32(total)
    final = F32(1 if config.get("invert_sigmas") else 0)
    if config["_class_name"] == "FlowMatchHeunDiscreteScheduler":
        timesteps = np.concatenate([timesteps[:1], timesteps[1:].repeat(2)])
        sigmas = np.concatenate([sigmas[:1], sigmas[1:].repeat(2)])
    return Plan(config, steps, timesteps, np.append(sigmas, final), 1.0, "flow")
