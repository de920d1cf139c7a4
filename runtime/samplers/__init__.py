"""Samplers: a schedule, a parametrisation and an integrator, run over any ``model(sample, timestep)``.

To add one: write its function (see ``base.Call``) and one line in ``SAMPLERS``; a short name is one line in ``NAMES``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from latentedge.runtime import schedules
from latentedge.runtime.errors import LatentEdgeError, UsageError
from latentedge.runtime.samplers import compvis, deis, discrete, dpm_solver, edm, euler, plans, plms, sa_solver, unipc
from latentedge.runtime.samplers.base import Call, Draws, History, Update
from latentedge.runtime.samplers.plans import Plan
from latentedge.runtime.schedules import F32, Array

__all__ = ["SAMPLERS", "Plan", "Step", "names", "prepare", "sample"]

Model = Callable[[Array, float], Array]
ALL = ("epsilon", "v_prediction", "sample")
NO_SAMPLE = ALL[:2]
WITH_FLOW = (*ALL, "flow_prediction")
_SIGMA_ONLY = ("final_sigmas_type", "interpolation_type", "timestep_type", "rescale_betas_zero_snr")
_RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "sigma_min", "sigma_max")
_MULTISTEP_ONLY = ("rescale_betas_zero_snr", "use_lu_lambdas")


@dataclass(frozen=True)
class Sampler:
    """How a run is laid out, how one evaluation is made, and which config fields of other classes it disregards."""

    plan: Callable[[Mapping[str, Any], int], Plan]
    update: Callable[[Call], Update]
    predictions: tuple[str, ...] = ALL
    ignores: tuple[str, ...] = ()
    order: int = 1


SAMPLERS: dict[str, Sampler] = {
    "DDIMScheduler": Sampler(plans.discrete, discrete.ddim),
    "DDPMScheduler": Sampler(plans.discrete, discrete.ddpm, ignores=("set_alpha_to_one",)),
    "PNDMScheduler": Sampler(plans.pndm, plms.pndm, NO_SAMPLE, ("rescale_betas_zero_snr",)),
    "IPNDMScheduler": Sampler(plms.ipndm_plan, plms.ipndm),
    "LCMScheduler": Sampler(plans.consistency, discrete.lcm),
    "TCDScheduler": Sampler(plans.consistency, discrete.tcd),
    "EulerDiscreteScheduler": Sampler(plans.sigma_space, euler.euler, (*ALL, "original_sample")),
    "EulerAncestralDiscreteScheduler": Sampler(
        plans.sigma_space, euler.euler_ancestral, NO_SAMPLE, (*_SIGMA_ONLY[:3], *_RESPACED)
    ),
    "HeunDiscreteScheduler": Sampler(plans.heun, euler.heun, ALL, _SIGMA_ONLY, 2),
    "KDPM2DiscreteScheduler": Sampler(plans.midpoint, euler.dpm2, NO_SAMPLE, _SIGMA_ONLY, 2),
    "KDPM2AncestralDiscreteScheduler": Sampler(plans.midpoint, euler.dpm2, NO_SAMPLE, _SIGMA_ONLY, 2),
    "LMSDiscreteScheduler": Sampler(plans.sigma_space, euler.lms, ALL, _SIGMA_ONLY),
    "DPMSolverSDEScheduler": Sampler(plans.midpoint_sde, euler.dpmpp_sde, NO_SAMPLE, _SIGMA_ONLY, 2),
    "DPMSolver2SAncestral": Sampler(plans.midpoint, euler.dpmpp_2s_ancestral, ALL, _SIGMA_ONLY, 2),
    "DPMSolverMultistepScheduler": Sampler(plans.solver, dpm_solver.multistep, WITH_FLOW),
    "DPMSolverSinglestepScheduler": Sampler(
        plans.solver, dpm_solver.singlestep, WITH_FLOW, (*_MULTISTEP_ONLY, "timestep_spacing", "steps_offset")
    ),
    "UniPCMultistepScheduler": Sampler(
        plans.solver, unipc.unipc, WITH_FLOW, ("use_lu_lambdas", "lambda_min_clipped", "algorithm_type")
    ),
    "DEISMultistepScheduler": Sampler(
        plans.solver, deis.deis, WITH_FLOW, (*_MULTISTEP_ONLY, "lambda_min_clipped", "algorithm_type")
    ),
    "FlowMatchEulerDiscreteScheduler": Sampler(plans.flow, euler.flow_euler, (*WITH_FLOW, "flow")),
    "FlowMatchHeunDiscreteScheduler": Sampler(plans.flow, euler.flow_heun, (*WITH_FLOW, "flow"), (), 2),
    "FlowMatchLCMScheduler": Sampler(plans.flow, euler.flow_lcm, (*WITH_FLOW, "flow")),
    "DDIMParallelScheduler": Sampler(plans.discrete, discrete.ddim),
    "DDPMParallelScheduler": Sampler(plans.discrete, discrete.ddpm, ignores=("set_alpha_to_one",)),
    "EDMEulerScheduler": Sampler(edm.edm_plan, edm.edm_euler, NO_SAMPLE),
    "EDMDPMSolverMultistepScheduler": Sampler(edm.edm_plan, dpm_solver.multistep, NO_SAMPLE),
    "SASolverScheduler": Sampler(plans.solver, sa_solver.sa_solver, WITH_FLOW, (*_MULTISTEP_ONLY, "final_sigmas_type")),
    "CompVisDPMSolver": Sampler(compvis.dpm_solver_plan, compvis.dpm_solver),
}
# What takes a class's place where the schedule has ``"dialect": "compvis"``.
COMPVIS: dict[str, Sampler] = {
    "DDIMScheduler": Sampler(compvis.ddim_plan, compvis.ddim),
    "PNDMScheduler": Sampler(compvis.plms_plan, compvis.plms),
    "DDPMScheduler": Sampler(compvis.ddpm_plan, compvis.ddpm),
}
_MULTISTEP = "DPMSolverMultistepScheduler"
_FORMS: dict[str, tuple[Any, ...]] = {"solver_type": ("midpoint", "heun"), "solver_order": (1, 2, 3)}
# The values that a class knows of its options.
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    _MULTISTEP: {**_FORMS, "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")},
    "DPMSolverSinglestepScheduler": {**_FORMS, "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")},
    "EDMDPMSolverMultistepScheduler": {**_FORMS, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
    "SASolverScheduler": {"algorithm_type": ("data_prediction", "noise_prediction"),
                          "predictor_order": (1, 2, 3, 4), "corrector_order": (1, 2, 3, 4)},
    "UniPCMultistepScheduler": {"solver_type": ("bh1", "bh2")},
    "DEISMultistepScheduler": {"solver_order": (1, 2, 3)},
}  # fmt: skip
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm": ("PNDMScheduler", {}),
    "ipndm": ("IPNDMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm_solver": ("CompVisDPMSolver", {}),
    "dpmpp_2m": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_3m": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmpp_2m_sde": (_MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp_3m_sde": (_MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_3s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmpp_2s_ancestral": ("DPMSolver2SAncestral", {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_lcm": ("FlowMatchLCMScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
}
SUFFIXES: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "ays": {"use_ays_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}
ALIASES = {"euler_a": "euler_ancestral", "dpm2_a": "dpm2_ancestral", "kdpm2": "dpm2", "uni_pc": "unipc",
           "kdpm2_ancestral": "dpm2_ancestral", "kdpm2_a": "dpm2_ancestral", "dpmpp_2s_a": "dpmpp_2s_ancestral",
           "dpmpp2m": "dpmpp_2m", "dpmpp2s_a": "dpmpp_2s_ancestral", "flow": "flow_euler", "flowmatch": "flow_euler",
           "dpmpp2mv2": "dpmpp_2m", "k_euler_a": "euler_ancestral", "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_ancestral",
           "dpm_2_a": "dpm2_ancestral", "dpmpp": "dpmpp_2m", "flow_match_euler": "flow_euler"}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One model evaluation: ``latents`` is the sample after it, ``denoised`` the x0 it implied, both float32 [N, ...].

    ``timestep`` and ``sigma`` are those of the evaluation; ``index`` counts evaluations from the schedule's start.
    ``history`` is what ``sample(..., start=step)`` needs to go on from here.
    """

    index: int
    timestep: float
    sigma: float
    latents: Array
    denoised: Array
    last: bool
    history: History

    def replace(self, **changes: Any) -> Step:
        """The same step with other ``latents``, as a mask that puts a picture back needs."""
        return replace(self, **changes)


def names() -> list[str]:
    """The sampler names, without aliases and without the suffixes that choose a sigma schedule."""
    return sorted(NAMES)


def _named(sampler: str) -> tuple[str, dict[str, Any]]:
    """The class and the options that a name stands for: any case, spaces or ``+``, ``k_`` before, a suffix after."""
    if sampler in SAMPLERS:
        return sampler, {}
    name = re.sub(r"[^a-z0-9]+", "_", sampler.lower().replace("+", "p")).strip("_").removeprefix("k_")
    options: dict[str, Any] = {}
    for suffix, chosen in SUFFIXES.items():
        if name.endswith("_" + suffix):
            name, options = name.removesuffix("_" + suffix), chosen
    name = ALIASES.get(name, name)
    if name not in NAMES:
        choices = f"{', '.join(names())}; after a name {', '.join('_' + s for s in SUFFIXES)} chooses the sigmas"
        raise UsageError(f"sampler {sampler!r} is unknown", f"choose from {choices}")
    return NAMES[name][0], {**NAMES[name][1], **options}


def same(first: str | None, second: str | None) -> bool:
    """Whether two samplers, by name or class, are the same; ``UsageError`` for an unknown name."""
    return first == second or (first is not None and second is not None and _named(first)[0] == _named(second)[0])


def _configured(schedule: Mapping[str, Any], sampler: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    own = schedule.get("_class_name")
    if sampler is None and own not in SAMPLERS:
        raise UsageError(f"the schedule's _class_name {own!r} is not supported", f"use one of {', '.join(SAMPLERS)}")
    name, options = (str(own), {}) if sampler is None else _named(sampler)
    default = dict(schedules.DEFAULTS.get(name, {}))
    if own != name:  # a class's clipping to [-1, 1] is for pixels; a latent's schedule asks for it or does without
        default.pop("clip_sample", None)
    kept = {k: v for k, v in schedule.items() if k not in SAMPLERS[name].ignores}
    config = {**schedules.COMMON, **default, **kept, **options, **given, "_class_name": name}
    solver = str(config.get("solver_type", ""))
    if "DPMSolver" in name:
        config["solver_type"] = "midpoint" if solver in ("logrho", "bh1", "bh2") else solver
        config["algorithm_type"] = str(config.get("algorithm_type")).replace("deis", "dpmsolver++")
    elif name == "UniPCMultistepScheduler":
        config["solver_type"] = "bh2" if solver in ("midpoint", "heun", "logrho") else solver
    elif name == "SASolverScheduler" and own != name:  # the field has other values in the classes that share it
        config["algorithm_type"] = "data_prediction"
    _check(config)
    return config


def _check(config: Mapping[str, Any]) -> None:
    """Refuse what the samplers cannot do, before a step is made."""
    name, algorithm, final = str(config["_class_name"]), config.get("algorithm_type"), config["final_sigmas_type"]
    choices = {"prediction_type": SAMPLERS[name].predictions, **CHOICES.get(name, {})}
    if "algorithm_type" in choices and algorithm in ("dpmsolver", "sde-dpmsolver"):
        choices["final_sigmas_type"] = ("sigma_min",)
    if name == "EDMDPMSolverMultistepScheduler" and config["solver_order"] == 3:
        choices["algorithm_type"] = ("dpmsolver++",)
    if name == "UniPCMultistepScheduler" and not config.get("use_flow_sigmas"):
        choices["shift_terminal"] = (None,)
    of_noise = algorithm in ("dpmsolver", "sde-dpmsolver", "noise_prediction") or config.get("predict_x0") is False
    if config["prediction_type"] == "flow_prediction" and of_noise:
        choices["prediction_type"] = ALL
    for option, allowed in choices.items():
        if config.get(option) not in allowed:
            listed = ", ".join(str(value) for value in allowed)
            found = f"{option} {config.get(option)!r}" + (f" with {algorithm}" if final == "zero" and algorithm else "")
            raise UsageError(f"{name} does not support {found}", f"use one of {listed}")


def prepare(schedule: Mapping[str, Any], sampler: str | None, steps: int, **options: Any) -> Plan:
    """The timesteps, sigmas and starting scale of a run; see ``sample`` for the arguments."""
    config = _configured(schedule, sampler, options)
    total = int(config["num_train_timesteps"])
    if config.get("timesteps") is not None:
        steps = len(config["timesteps"])
    elif config.get("sigmas") is not None:
        ends = config["_class_name"] in ("EulerDiscreteScheduler",)
        steps = len(config["sigmas"]) - ends
    if not 1 <= steps <= total:
        raise UsageError(f"steps must be between 1 and {total}, found {steps}")
    return replace(_sampler(config).plan(config, steps), order=_sampler(config).order)


def _sampler(config: Mapping[str, Any]) -> Sampler:
    name = str(config["_class_name"])
    return COMPVIS[name] if config.get("dialect") == "compvis" and name in COMPVIS else SAMPLERS[name]


def sample(
    model: Model, latents: Array, schedule: Mapping[str, Any], sampler: str | None, steps: int, *, eta: float | None = None,
    noise: Any = None, begin: int = 0, start: Step | None = None, **options: Any,
) -> Generator[Step, Array | None, None]:  # fmt: skip
    """Run ``sampler`` (None: as ``schedule["_class_name"]`` says) and yield one ``Step`` for each model evaluation.

    ``latents`` float32 [N, ...] is where the run starts: N(0, 1) times ``Plan.init_noise_sigma``, or a picture with
    ``Plan.noised_start``. ``model(sample, timestep)`` gets the sample scaled as it was trained to, and an int or a
    float. ``eta`` is the randomness of DDIM (0 to 1) and gamma of TCD; None is 0 and 0.3. ``noise`` is where
    stochastic samplers draw from: an array [k, N, ...] of recorded draws, a callable of the shape, an object with
    ``normal(shape)``, a numpy Generator, or None for torch's stream of seed 0. ``begin`` is the index of the first
    evaluation. ``start``, an earlier Step of the same run, goes on after it; its noise stream is given as at the
    run's start.
    ``options`` go before the schedule's fields: ``timesteps``, ``sigmas``, ``mu``, ``order``, ``s_churn``...
    A caller may ``send`` other latents to replace those of the step just yielded.
    Raises UsageError, at once, for what the sampler cannot do, and LatentEdgeError where the model's output misfits.
    """
    plan = prepare(schedule, sampler, steps, **options)
    return follow(model, plan, latents, eta=eta, noise=noise, begin=begin, start=start)


def follow(
    model: Model, plan: Plan, latents: Array, *, eta: float | None = None, noise: Any = None, begin: int = 0,
    start: Step | None = None,
) -> Generator[Step, Array | None, None]:  # fmt: skip
    """``sample`` with a plan that ``prepare`` made."""
    latents, history = np.asarray(latents, F32), History()
    if start is not None:
        latents, history, begin = np.asarray(start.latents, F32), start.history, start.index + 1
    if not 0 <= begin <= len(plan.timesteps):
        raise UsageError(f"begin must be between 0 and {len(plan.timesteps)}, found {begin}")
    eta = float(plan.config.get("eta", 0.0)) if eta is None else eta
    if not 0 <= eta <= 1:
        raise UsageError(f"eta must be between 0 and 1, found {eta}")
    return _run(model, plan, latents, history, begin, eta, Draws(noise, latents.shape, history.draws))


def _run(
    model: Model, plan: Plan, latents: Array, history: History, begin: int, eta: float, draws: Draws
) -> Generator[Step, Array | None, None]:
    update, channels = _sampler(plan.config).update, latents.shape[1]
    timesteps, sigmas = plan.timesteps.tolist(), plan.sigmas.tolist()
    learned = str(plan.config.get("variance_type")).startswith("learned")
    for index in range(begin, len(timesteps)):
        timestep = timesteps[index]
        output = np.asarray(model(plan.scaled_input(latents, index), timestep), F32)
        if learned and update is not discrete.ddpm:
            output = output[:, :channels]
        if output.shape != latents.shape and not learned:
            raise LatentEdgeError(f"the model gave shape {output.shape} for a sample of shape {latents.shape}")
        call = Call(plan, index, latents, output, history, eta, draws)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # at sigma 0 log-SNR is infinite
            latents, denoised, history = update(call)
        sent = yield Step(index, timestep, sigmas[index], latents, denoised, index == len(timesteps) - 1, history)
        latents = latents if sent is None else np.asarray(sent, F32)
