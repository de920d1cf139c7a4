"""Plans: which timesteps and sigmas a run visits, for each family of samplers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from latentedge.runtime.errors import UsageError
from latentedge.runtime.schedules import (
    F32,
    Array,
    Config,
    alpha_sigma,
    alphas_cumprod,
    ancestral_split,
    exp32,
    linspace,
    log32,
    respaced,
    sigma_table,
    spaced,
    timestep_of_sigma,
)


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

    @cached_property
    def levels(self) -> tuple[Array, Array]:
        """(alpha, sigma), float32 [T] each: how much of the signal and of the noise a sample holds at each timestep."""
        return np.sqrt(self.alphas_cumprod), np.sqrt(F32(1) - self.alphas_cumprod)

    def scaled_input(self, sample: Array, index: int) -> Array:
        """The sample as the model takes it at evaluation ``index``: in sigma space divided by sqrt(sigma**2 + 1)."""
        if self.space != "sigma":
            return sample
        if (data := self.tables.get("sigma_data")) is not None:  # EDM: divided by the standard deviation of the sample
            return np.asarray(sample * (F32(1) / np.sqrt(np.square(self.input_sigmas[index]) + F32(data**2))))
        return np.asarray(sample / np.sqrt(np.square(self.input_sigmas[index]) + F32(1)))

    def begin(self, strength: float) -> int:
        """The index of the first evaluation when a picture is changed by ``strength``, 0 (not at all) to 1 (drawn anew).

        ``int(steps * strength)`` steps are made. At strength 0 that is none: the index is ``len(timesteps)``.
        """
        if not 0 <= strength <= 1:
            raise UsageError(f"strength must be between 0 and 1, found {strength}")
        kept, count = min(int(self.steps * strength), self.steps), len(self.timesteps)
        if "origin_cut" in self.tables and strength > 0:  # the plan itself is cut to the strength
            return 0
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


def _given(config: Config, name: str) -> Array | None:
    return None if config.get(name) is None else np.asarray(config[name])


def final_sigma(config: Config, sigma_min: Any) -> Any:
    """The sigma after the last evaluation: 0, or ``sigma_min``, as final_sigmas_type says."""
    match config["final_sigmas_type"]:
        case "zero":
            return 0.0
        case "sigma_min":
            return sigma_min
        case other:
            raise UsageError(f"final_sigmas_type {other!r} is unknown", "use zero or sigma_min")


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
    cut = {} if config.get("strength") is None else {"origin_cut": True}
    return on_table(config, steps, timesteps, alphas_cumprod(config), **cut)


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
    return timesteps, np.append(sigmas, final_sigma(config, table[0])), acp


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
    to_last = name in ("DEISMultistepScheduler", "SASolverScheduler")
    final = lowest if sigmas is None or not (unipc or to_last) else sigmas[-1]
    sigmas = np.interp(timesteps, np.arange(len(table)), table) if sigmas is None else sigmas
    sigmas = np.append(sigmas, final if to_last else final_sigma(config, final)).astype(F32)
    space = "alpha" if name == "SASolverScheduler" else "solver"  # where the reference looks up a picture's noise
    return Plan(config, steps, timesteps.astype(np.int64), sigmas, 1.0, space, acp)


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
