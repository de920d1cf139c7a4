"""Every sampler against diffusers itself, where it is installed, on configurations drawn at random from a fixed seed."""

from __future__ import annotations

import inspect
import random
import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

import diffusers

from latentedge.runtime import samplers
from latentedge.runtime.errors import UsageError
from tests.golden.record_samplers import COSINE, LINEAR, SCALED, from_diffusers, model

BETAS = (LINEAR, SCALED, COSINE)
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
OPTIONS: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("leading", "trailing", "linspace"), "steps_offset": (0, 1), "set_alpha_to_one": (True, False),
    "prediction_type": ("epsilon", "v_prediction", "sample"), "clip_sample": (True, False),
    "clip_sample_range": (1.0, 2.5), "thresholding": (False, False, True), "sample_max_value": (1.0, 1.7),
    "rescale_betas_zero_snr": (False, False, True), "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"), "skip_prk_steps": (True, False),
    "interpolation_type": ("linear", "log_linear"), "timestep_type": ("discrete", "continuous"),
    "solver_order": (1, 2, 3), "lower_order_final": (True, False), "euler_at_final": (True, False),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"), "solver_type": ("midpoint", "heun"),
    "predict_x0": (True, False), "disable_corrector": ([], [0]), "original_inference_steps": (50, 100),
    "timestep_scaling": (10.0, 5.0), "shift": (1.0, 3.0), "shift_terminal": (None, 0.1), "invert_sigmas": (False, True),
    "stochastic_sampling": (False, True), "num_train_timesteps": (1000, 500), "lambda_min_clipped": (-5.1,),
    "sigma_schedule": ("karras", "exponential"), "sigma_data": (0.5, 1.0), "rho": (7.0, 5.0),
    "predictor_order": (1, 2, 3), "corrector_order": (1, 2, 3), "use_flow_sigmas": (False, True), "flow_shift": (3.0,),
}  # fmt: skip
OF_CLASS: dict[str, dict[str, tuple[Any, ...]]] = {
    "UniPCMultistepScheduler": {"solver_type": ("bh1", "bh2"), "solver_order": (1, 2, 3, 4), "shift_terminal": (None,)},
    "DEISMultistepScheduler": {"solver_type": ("logrho",), "algorithm_type": ("deis",)},
    "SASolverScheduler": {"algorithm_type": ("data_prediction", "noise_prediction")},
}
ARGUMENTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDIMScheduler": {"eta": (0.0, 0.5, 1.0), "use_clipped_model_output": (False, True)},
    "TCDScheduler": {"eta": (0.0, 0.3, 1.0)},
    "EulerDiscreteScheduler": {"s_churn": (0.0, 3.0), "s_noise": (1.0, 1.01)},
    "EDMEulerScheduler": {"s_churn": (0.0, 3.0), "s_tmin": (0.0, 0.1)},
    "FlowMatchHeunDiscreteScheduler": {"s_churn": (0.0, 3.0)},
    "LMSDiscreteScheduler": {"order": (4, 3)},
}
NAMES = [name for name in samplers.SAMPLERS if hasattr(diffusers, name)]
CLASSES = {name: getattr(diffusers, name) for name in NAMES}


def drawn(name: str, generator: random.Random) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """(config, steps, arguments of step): about half of the options that the class has."""
    parameters = inspect.signature(CLASSES[name].__init__).parameters
    # With cosine betas diffusers' DPM2 has timesteps that are not numbers, or begins at the second of two equal ones.
    betas = BETAS[:2] if name.startswith("KDPM2") else BETAS
    config = dict(generator.choice(betas)) if "beta_schedule" in parameters else {}
    options = {**OPTIONS, **OF_CLASS.get(name, {})}
    config |= {key: generator.choice(options[key]) for key in parameters if key in options and generator.random() < 0.5}
    if (spacing := generator.choice((*SPACINGS, None, None))) in parameters:
        config[spacing] = True
    if config.get("use_flow_sigmas"):
        config["prediction_type"] = "flow_prediction"
    if config.get("rescale_betas_zero_snr"):  # epsilon says nothing of x0 where there is no signal
        config["prediction_type"] = "v_prediction"
    if config.get("use_beta_sigmas") and name.startswith(("KDPM2", "DPMSolverSDE")):
        del config["use_beta_sigmas"]  # their float64 timesteps show the last bits of scipy's quantile
    arguments = {key: generator.choice(values) for key, values in ARGUMENTS.get(name, {}).items()}
    steps = generator.choice((1, 2, 4, 5, 7, 10, 15, 16, 25, 30))
    if name == "IPNDMScheduler":  # of 16 and more values torch takes the arctangents with another library
        steps = min(steps, 14)
    return config, steps, arguments


@pytest.mark.parametrize("name", NAMES)
def test_random_configurations_give_the_samples_of_diffusers(name: str) -> None:
    generator, compared = random.Random(name), 0
    while compared < 6:
        config, steps, arguments = drawn(name, generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = from_diffusers((name, config, steps, arguments))
            except (AssertionError, IndexError, NotImplementedError, RuntimeError, UnboundLocalError, ValueError):
                continue  # what diffusers refuses, or fails on, proves nothing
        compared += 1
        compare(name, config, steps, arguments, expected)


def compare(name: str, config: dict[str, Any], steps: int, arguments: dict[str, Any], expected: Any) -> None:
    """Timesteps and sigmas exactly, samples within 1e-5."""
    told = f"{config} {steps} steps {arguments}"
    options = dict(arguments)
    eta, schedule = options.pop("eta", None), {**config, "_class_name": name}
    plan = samplers.prepare(schedule, None, steps, **options)
    np.testing.assert_array_equal(plan.timesteps, expected["timesteps"], told, strict=True)
    if "sigmas" in expected:
        np.testing.assert_array_equal(plan.sigmas, expected["sigmas"], told, strict=True)
    assert float(plan.init_noise_sigma) == float(expected["init_noise_sigma"]), told
    samples, noise = expected["samples"], expected.get("noise")
    run = samplers.sample(model, samples[0], schedule, None, steps, eta=eta, noise=noise, **options)
    for step, sample in zip(run, samples[1:], strict=True):
        if not np.isfinite(sample).all():  # documented: there this gives a number
            break
        assert np.abs(step.latents - sample).max() <= 1e-5 * np.abs(sample).max(), f"{told} at {step.index}"


@pytest.mark.parametrize("steps", [3, 10, 14, 15])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"])
def test_runs_below_fifteen_steps_end_in_a_lower_order(name: str, steps: int) -> None:
    config = {"final_sigmas_type": "sigma_min"} if name.startswith("DPM") else {}
    compare(name, config, steps, {}, from_diffusers((name, config, steps, {})))


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "SCMScheduler", "DDIMInverseScheduler", "RePaintScheduler"])
def test_a_class_that_is_left_out_is_refused_by_name(name: str) -> None:
    assert hasattr(diffusers, name)
    with pytest.raises(UsageError, match=name):
        samplers.prepare({"_class_name": name}, None, 5)
