"""Record the sampler goldens beside this file from the original implementations; run by hand, not by the tests.

    python tests/golden/record_samplers.py diffusers
    python tests/golden/record_samplers.py compvis --repository PATH   # a checkout of CompVis/stable-diffusion

Needs diffusers, torch, scipy and torchsde (diffusers), or torch, einops and omegaconf (CompVis). The model is the
function ``model`` below; noise comes from numpy and is recorded in the order in which it was drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent / "samplers"
SHAPE = (1, 3, 4, 4)
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
ENDING = {"final_sigmas_type": "sigma_min"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# (class, config, steps, arguments of step)
Case = tuple[str, dict[str, Any], int, dict[str, Any]]
_MULTI, _SINGLE, _UNIPC, _DEIS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
_SIGMA = (
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
CASES: list[Case] = [
    ("DDIMScheduler", {**LINEAR, "timestep_spacing": "trailing"}, 7, {"eta": 0.5}),
    ("DDIMScheduler", {**SCALED, **V, "thresholding": True, "sample_max_value": 2.0}, 6, {}),
    ("DDIMScheduler", {**SCALED, **X0, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, 6, {}),
    ("DDPMScheduler", {**LINEAR, "clip_sample": False, "variance_type": "fixed_large"}, 7, {}),
    ("DDPMScheduler", {**SCALED, **V, "variance_type": "fixed_small_log", "timestep_spacing": "linspace"}, 6, {}),
    ("PNDMScheduler", {**SCALED}, 6, {}),
    ("PNDMScheduler", {**LINEAR, **V, "skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 1}, 7, {}),
    ("IPNDMScheduler", {}, 6, {}),
    ("LCMScheduler", {**SCALED, **V, "clip_sample": True}, 4, {}),
    ("LCMScheduler", {**SCALED, "original_inference_steps": 100, "timestep_scaling": 5.0}, 5, {}),
    ("TCDScheduler", {**SCALED}, 4, {"eta": 0.3}),
    ("TCDScheduler", {**SCALED, **X0}, 5, {"eta": 1.0}),
    ("EulerDiscreteScheduler", {**SCALED, "timestep_spacing": "leading", "steps_offset": 1}, 7, {}),
    ("EulerDiscreteScheduler", {**LINEAR, **X0, "use_beta_sigmas": True}, 6, {}),
    ("EulerDiscreteScheduler", {**LINEAR, **V, "interpolation_type": "log_linear", "final_sigmas_type": "sigma_min"}, 6, {}),
    ("EulerDiscreteScheduler", {**LINEAR, **V, "timestep_type": "continuous"}, 6, {}),
    ("EulerDiscreteScheduler", {**SCALED}, 6, {"s_churn": 3.0, "s_noise": 1.003, "s_tmin": 0.05}),
    ("EulerAncestralDiscreteScheduler", {**SCALED, "timestep_spacing": "trailing"}, 7, {}),
    ("HeunDiscreteScheduler", {**LINEAR, **X0, "clip_sample": True, "clip_sample_range": 2.0}, 5, {}),
    ("LMSDiscreteScheduler", {**SCALED}, 6, {"order": 3}),
    *[(name, {**SCALED, **V}, 5, {}) for name in _SIGMA],
    *[(name, {**SCALED, f"use_{kind}_sigmas": True}, 5, {}) for name in _SIGMA for kind in ("karras", "exponential")],
    *[
        (name, {**SCALED, "algorithm_type": kind, "solver_order": order, "solver_type": solver,
                "final_sigmas_type": "zero" if kind.endswith("++") else "sigma_min"}, 16, {})
        for name, kinds in (
            (_MULTI, ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")),
            (_SINGLE, ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")),
        )
        for kind in kinds
        for order in ((2,) if kind == "sde-dpmsolver" else (2, 3))
        for solver in ("midpoint", "heun")
    ],
    *[(name, {**LINEAR, **V, "lower_order_final": final}, 7, {}) for name in (_MULTI, _SINGLE) for final in (True, False)],
    *[(name, {**LINEAR, **X0, option: True}, 6, {}) for name in (_MULTI, _SINGLE)
      for option in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")],
    *[(name, {**FLOW}, 6, {}) for name in (_MULTI, _SINGLE, _UNIPC, _DEIS)],
    (_MULTI, {**LINEAR, "use_lu_lambdas": True}, 6, {}),
    (_MULTI, {**COSINE, "lambda_min_clipped": -5.1, "euler_at_final": True}, 6, {}),
    (_MULTI, {**SCALED, "thresholding": True, "timestep_spacing": "leading", "steps_offset": 1}, 6, {}),
    *[(_UNIPC, {**SCALED, "solver_order": order, "solver_type": kind, "predict_x0": x0, **ENDING}, 7, {})
      for order in (1, 2, 3) for kind in ("bh1", "bh2") for x0 in (True, False)],
    (_UNIPC, {**LINEAR, **V, "use_karras_sigmas": True, "disable_corrector": [0]}, 6, {}),
    *[(_DEIS, {**SCALED, "solver_order": order}, 16, {}) for order in (1, 2, 3)],
    (_DEIS, {**LINEAR, **V, "use_karras_sigmas": True}, 6, {}),
    *[("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, **extra}, 5, {})
      for extra in ({}, {"use_karras_sigmas": True}, {"stochastic_sampling": True}, {"invert_sigmas": True},
                    {"shift_terminal": 0.1})],
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, 5, {}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 1.5}, 5, {"s_churn": 3.0, "s_noise": 1.01}),
    ("FlowMatchLCMScheduler", {"shift": 2.0}, 4, {}),
    ("DDIMParallelScheduler", {**SCALED, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 6, {}),
    ("DDPMParallelScheduler", {**SCALED, "clip_sample": False}, 6, {}),
    ("IPNDMScheduler", {}, 10, {}),
    *[(_UNIPC, {**SCALED, "solver_order": 4, "solver_type": kind, **ENDING}, 25, {}) for kind in ("bh1", "bh2")],
    *[("EDMEulerScheduler", config, 6, step) for config, step in (
        ({}, {"s_churn": 3.0}), ({"sigma_schedule": "exponential", **V, "sigma_data": 1.0}, {}))],
    *[("EDMDPMSolverMultistepScheduler", {"solver_order": order, "algorithm_type": kind, "solver_type": solver}, 9, {})
      for order, kind, solver in ((2, "dpmsolver++", "midpoint"), (2, "sde-dpmsolver++", "heun"),
                                  (3, "dpmsolver++", "midpoint"))],
    *[("SASolverScheduler", {**SCALED, "algorithm_type": kind, "predictor_order": order, "corrector_order": order}, 9, {})
      for kind in ("data_prediction", "noise_prediction") for order in (2, 3, 4)],
    (_MULTI, {**SCALED, **V, "use_lu_lambdas": True, "rescale_betas_zero_snr": True}, 6, {}),
]  # fmt: skip


def model(sample: npt.NDArray[Any], timestep: float) -> npt.NDArray[np.float32]:
    """A smooth stand-in for a denoiser, in float64, rounded."""
    wide = np.asarray(sample, np.float64)
    return (0.3 * wide * np.cos(timestep / 1000.0) + 0.1 * np.sin(wide)).astype(np.float32)


def start() -> npt.NDArray[np.float32]:
    """The N(0, 1) array that every run begins from."""
    return np.random.default_rng(1234).standard_normal(SHAPE).astype(np.float32)


class Recorder:
    """Stands in for torch's noise and keeps each draw."""

    def __init__(self) -> None:
        self.draws: list[npt.NDArray[np.float32]] = []
        self._generator = np.random.default_rng(99)

    def __call__(self, shape: Any, *_: Any, **__: Any) -> Any:
        import torch

        self.draws.append(self._generator.standard_normal(tuple(shape)).astype(np.float32))
        return torch.from_numpy(self.draws[-1])


@contextmanager
def correctly_rounded(recorder: Recorder, module: Any) -> Iterator[None]:
    """torch's square roots, logarithms and exponentials to the nearest float32, on any processor; its noise recorded."""
    import torch

    def nearest(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(x: Any, *rest: Any) -> Any:
            plain = isinstance(x, torch.Tensor) and x.dtype == torch.float32 and not rest
            return original(x.double()).float() if plain else original(x, *rest)

        return function

    def power(x: Any, exponent: Any) -> Any:
        return torch.sqrt(x) if x.dtype == torch.float32 and exponent == 0.5 else original_power(x, exponent)

    original_power = torch.Tensor.__pow__
    patches: list[tuple[Any, str, Any]] = [(torch.Tensor, "__pow__", power)]
    for name in ("sqrt", "log", "exp", "expm1", "sin"):
        patches += [(owner, name, nearest(getattr(owner, name))) for owner in (torch, torch.Tensor)]
    patches.append((torch, "randn_like", lambda x, **_: recorder(x.shape)))
    patches += [(module, "randn_tensor", recorder)] if hasattr(module, "randn_tensor") else []
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, function in patches:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def from_diffusers(case: Case) -> dict[str, npt.NDArray[Any]]:
    """One run of a diffusers scheduler."""
    import diffusers

    recorder = Recorder()
    module = sys.modules[getattr(diffusers, case[0]).__module__]
    with correctly_rounded(recorder, module):
        return _run(getattr(diffusers, case[0]), case, recorder)


def _run(scheduler_class: Any, case: Case, recorder: Recorder) -> dict[str, npt.NDArray[Any]]:
    import torch

    name, config, steps, arguments = case
    scheduler = scheduler_class(**config)
    scheduler.set_timesteps(steps)
    if name == "DPMSolverSDEScheduler":
        scheduler.noise_sampler = lambda *_: recorder(SHAPE)
    sample = torch.from_numpy(start()) * getattr(scheduler, "init_noise_sigma", 1.0)
    samples = [sample.numpy()]
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        output = torch.from_numpy(model(scaled.numpy(), float(timestep)))
        sample = scheduler.step(output, timestep, sample, **arguments).prev_sample
        samples.append(sample.numpy())
    arrays = {"samples": np.array(samples), "timesteps": scheduler.timesteps.numpy()}
    arrays["init_noise_sigma"] = np.float64(getattr(scheduler, "init_noise_sigma", 1.0))
    if hasattr(scheduler, "sigmas"):
        arrays["sigmas"] = scheduler.sigmas.numpy()
    if recorder.draws:
        arrays["noise"] = np.array(recorder.draws)
    return arrays


def record_diffusers() -> None:
    """Write diffusers.npz and diffusers.json."""
    arrays = {f"{i}/{key}": value for i, case in enumerate(CASES) for key, value in from_diffusers(case).items()}
    np.savez_compressed(HERE / "diffusers.npz", **arrays)  # type: ignore[arg-type]
    listed = [{"class": c, "config": config, "steps": steps, "step": step} for c, config, steps, step in CASES]
    (HERE / "diffusers.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


class Wrapped:
    """What CompVis's samplers need of a latent diffusion model."""

    def __init__(self) -> None:
        import torch
        from ldm.modules.diffusionmodules.util import make_beta_schedule

        betas = make_beta_schedule("linear", 1000, 0.0015, 0.0195)
        cumulative = np.cumprod(1 - betas)
        self.num_timesteps, self.device = 1000, torch.device("cpu")
        self.betas = torch.tensor(betas, dtype=torch.float32)
        self.alphas_cumprod = torch.tensor(cumulative, dtype=torch.float32)
        self.alphas_cumprod_prev = torch.tensor(np.append(1.0, cumulative[:-1]), dtype=torch.float32)
        self.timesteps: list[float] = []

    def apply_model(self, sample: Any, timestep: Any, _: Any = None) -> Any:
        import torch

        self.timesteps.append(float(timestep[0]))
        return torch.from_numpy(model(sample.numpy(), float(timestep[0])))


def record_compvis(repository: Path) -> None:
    """Write compvis.npz: x_inter, pred_x0, the final sample, the timesteps and the noise of each run."""
    sys.path.insert(0, str(repository))
    import torch
    from ldm.models.diffusion import ddim, dpm_solver, plms

    arrays: dict[str, npt.NDArray[Any]] = {}
    for kind in (ddim.DDIMSampler, plms.PLMSSampler, dpm_solver.DPMSolverSampler):
        kind.register_buffer = lambda self, name, value: setattr(self, name, value)
    runs = [
        ("ddim", 8, 0.0),
        ("ddim", 30, 1.0),
        ("plms", 1, 0.0),
        ("plms", 8, 0.0),
        ("dpm_solver", 10, 0.0),
        ("dpm_solver", 16, 0.0),
    ]
    for name, steps, eta in runs:
        wrapped, recorder = Wrapped(), Recorder()
        ddim.noise_like = plms.noise_like = recorder
        shared = {"S": steps, "batch_size": 1, "shape": SHAPE[1:], "x_T": torch.from_numpy(start())}
        key = f"{name}.{steps}.{eta}"
        if name == "dpm_solver":
            final, _ = dpm_solver.DPMSolverSampler(wrapped).sample(conditioning=torch.zeros(1, 1), **shared)
        else:
            sampler = ddim.DDIMSampler(wrapped) if name == "ddim" else plms.PLMSSampler(wrapped)
            final, between = sampler.sample(conditioning=None, verbose=False, log_every_t=1, eta=eta, **shared)
            arrays[f"{key}/x_inter"] = torch.stack(between["x_inter"][1:]).numpy()
            arrays[f"{key}/pred_x0"] = torch.stack(between["pred_x0"][1:]).numpy()
        arrays[f"{key}/final"], arrays[f"{key}/timesteps"] = final.numpy(), np.array(wrapped.timesteps, np.float32)
        if eta:
            arrays[f"{key}/noise"] = np.array(recorder.draws)
    np.savez_compressed(HERE / "compvis.npz", **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", choices=["diffusers", "compvis"])
    parser.add_argument("--repository", type=Path)
    chosen = parser.parse_args()
    record_diffusers() if chosen.source == "diffusers" else record_compvis(chosen.repository)
