"""Samplers against the recorded runs of the original implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from latentedge.runtime import samplers
from latentedge.runtime.errors import LatentEdgeError, UsageError

GOLDEN = Path(__file__).parent.parent / "golden" / "samplers"
START = np.random.default_rng(1234).standard_normal((1, 3, 4, 4)).astype(np.float32)
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COMPVIS = {
    "_class_name": "DDIMScheduler",
    "dialect": "compvis",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
}
EXACT = json.loads((GOLDEN / "exact.json").read_text(encoding="utf-8"))
RECORDED = json.loads((GOLDEN / "diffusers.json").read_text(encoding="utf-8"))


def model(sample: npt.NDArray[Any], timestep: float) -> npt.NDArray[np.float32]:
    wide = np.asarray(sample, np.float64)
    return (0.3 * wide * np.cos(timestep / 1000.0) + 0.1 * np.sin(wide)).astype(np.float32)


def relative(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def exact() -> dict[str, npt.NDArray[Any]]:
    return dict(np.load(GOLDEN / "exact.npz"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, npt.NDArray[Any]]:
    return dict(np.load(GOLDEN / "diffusers.npz"))


@pytest.fixture(scope="module")
def compvis() -> dict[str, npt.NDArray[Any]]:
    return dict(np.load(GOLDEN / "compvis.npz"))


def replay(case: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], key: str) -> None:
    """Every intermediate sample, within 1e-5 of the recorded one; the draws used up."""
    schedule = {**case["config"], "_class_name": case["class"]}
    options = dict(case["step"])
    eta, noise, expected = options.pop("eta", 0.0), arrays.get(f"{key}/noise"), arrays[f"{key}/samples"]
    steps = list(samplers.sample(model, expected[0], schedule, None, case["steps"], eta=eta, noise=noise, **options))
    assert len(steps) == len(expected) - 1
    assert steps[-1].history.draws == (0 if noise is None else len(noise))
    assert max(relative(s.latents, e) for s, e in zip(steps, expected[1:], strict=True)) < 1e-5
    if f"{key}/pred_x0" in arrays:
        predicted = arrays[f"{key}/pred_x0"]
        assert max(relative(s.denoised, e) for s, e in zip(steps, predicted, strict=True)) < 1e-5
    assert [s.timestep for s in steps] == arrays[f"{key}/timesteps"].tolist()


@pytest.mark.parametrize("number", range(len(EXACT)), ids=[case["name"] for case in EXACT])
def test_the_samples_and_the_plan_are_those_of_diffusers(number: int, exact: dict[str, npt.NDArray[Any]]) -> None:
    case = EXACT[number]
    replay(case, exact, str(number))
    plan = samplers.prepare({**case["config"], "_class_name": case["class"]}, None, case["steps"])
    np.testing.assert_array_equal(plan.timesteps, exact[f"{number}/timesteps"], strict=True)
    if f"{number}/sigmas" in exact:
        np.testing.assert_array_equal(plan.sigmas, exact[f"{number}/sigmas"], strict=True)
    assert float(plan.init_noise_sigma) == float(exact[f"{number}/init_noise_sigma"])


@pytest.mark.parametrize("number", range(len(RECORDED)), ids=[f"{i}-{c['class']}" for i, c in enumerate(RECORDED)])
def test_every_sampler_and_option_follows_diffusers(number: int, recorded: dict[str, npt.NDArray[Any]]) -> None:
    case, key = RECORDED[number], str(number)
    replay(case, recorded, key)
    plan = samplers.prepare({**case["config"], "_class_name": case["class"]}, None, case["steps"])
    np.testing.assert_array_equal(plan.timesteps, recorded[f"{key}/timesteps"], strict=True)
    if f"{key}/sigmas" in recorded:
        np.testing.assert_array_equal(plan.sigmas, recorded[f"{key}/sigmas"], strict=True)
    assert float(plan.init_noise_sigma) == float(recorded[f"{key}/init_noise_sigma"])


@pytest.mark.parametrize(
    ("name", "steps", "eta"), [("ddim", 8, 0.0), ("ddim", 30, 1.0), ("plms", 1, 0.0), ("plms", 8, 0.0)]
)
def test_ddim_and_plms_in_the_dialect_of_compvis(
    name: str, steps: int, eta: float, compvis: dict[str, npt.NDArray[Any]]
) -> None:
    key = f"{name}.{steps}.{eta}"
    found = list(samplers.sample(model, START, COMPVIS, name, steps, eta=eta, noise=compvis.get(f"{key}/noise")))
    assert [s.timestep for s in found] == compvis[f"{key}/timesteps"].tolist()
    found = found[1:] if name == "plms" else found  # its first evaluation has no counterpart in x_inter
    assert len(found) == len(compvis[f"{key}/x_inter"])
    for step, sample, denoised in zip(found, compvis[f"{key}/x_inter"], compvis[f"{key}/pred_x0"], strict=True):
        assert relative(step.latents, sample) < 5e-6
        assert relative(step.denoised, denoised) < 5e-6


@pytest.mark.parametrize("steps", [10, 16])
def test_dpm_solver_as_compvis_calls_it(steps: int, compvis: dict[str, npt.NDArray[Any]]) -> None:
    key = f"dpm_solver.{steps}.0.0"
    found = list(samplers.sample(model, START, COMPVIS, "dpm_solver", steps))
    np.testing.assert_array_equal(np.array([s.timestep for s in found], np.float32), compvis[f"{key}/timesteps"])
    assert relative(found[-1].latents, compvis[f"{key}/final"]) < 5e-6


@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddim_eta1", 1.0)])
def test_a_recorded_trajectory_of_a_latent_diffusion_model(name: str, eta: float) -> None:
    arrays = np.load(GOLDEN / "compvis_model.npz")
    samples, denoised = arrays[f"model/{name}_x_inter"], arrays[f"model/{name}_pred_x0"]
    signal = dict(zip(arrays["model/ddim_timesteps"].tolist(), arrays["model/alphas_cumprod"][1::125], strict=True))
    answers = iter(denoised)

    def replayed(sample: npt.NDArray[Any], timestep: float) -> npt.NDArray[Any]:
        a = signal[int(timestep)].astype(np.float64)
        return np.asarray((sample - np.sqrt(a) * next(answers)) / np.sqrt(1 - a))

    noise = arrays["model/ddim_eta1_noise"] if eta else None
    found = list(samplers.sample(replayed, samples[0], COMPVIS, None, 8, eta=eta, noise=noise))
    assert max(relative(s.latents, e) for s, e in zip(found, samples[1:], strict=True)) < 5e-6


def test_ancestral_sampling_visits_the_last_timesteps_and_leaves_the_last_draw_unused() -> None:
    noise = np.random.default_rng(5).standard_normal((6, *START.shape)).astype(np.float32)
    found = list(samplers.sample(model, START, COMPVIS, "ddpm", 6, noise=noise))
    assert [s.timestep for s in found] == [5, 4, 3, 2, 1, 0]
    assert found[-1].history.draws == 6
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    bar = np.cumprod(1 - betas)
    expected = START.astype(np.float64)
    for t, draw in zip(range(5, -1, -1), noise, strict=True):
        before = bar[t - 1] if t else 1.0
        x0 = (expected - np.sqrt(1 - bar[t]) * model(expected, t)) / np.sqrt(bar[t])
        mean = betas[t] * np.sqrt(before) * x0 + (1 - before) * np.sqrt(1 - betas[t]) * expected
        std = np.sqrt(betas[t] * (1 - before) / (1 - bar[t]))
        expected = mean / (1 - bar[t]) + (std * draw if t else 0.0)
    assert relative(found[-1].latents, expected) < 2e-5  # float32 tables against float64 ones


@pytest.mark.parametrize(
    ("strength", "timesteps", "level"), [(1.0, [876, 751], 0), (0.5, [376, 251], 3), (0.2, [1], 6), (0.0, [], 8)]
)
def test_compvis_noises_one_level_above_where_it_starts(strength: float, timesteps: list[int], level: int) -> None:
    plan = samplers.prepare(COMPVIS, None, 8)
    begin = plan.begin(strength)
    noised = plan.noised_start(START, np.ones_like(START), begin)
    np.testing.assert_array_equal(noised, plan.add_noise(START, np.ones_like(START), level))
    found = [s.timestep for s in samplers.sample(model, noised, COMPVIS, None, 8, begin=begin)]
    assert found[:2] == timesteps


@pytest.mark.parametrize(
    ("name", "class_name", "options"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("k_euler_a", "EulerAncestralDiscreteScheduler", {}),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 2}),
        ("dpm++_2m", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmpp_2s_a", "DPMSolver2SAncestral", {}),
        ("euler_sgm_uniform", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
        ("UniPCMultistepScheduler", "UniPCMultistepScheduler", {}),
    ],
)
def test_names_are_those_that_users_know(name: str, class_name: str, options: dict[str, Any]) -> None:
    config = samplers.prepare(SCALED, name, 5).config
    assert config["_class_name"] == class_name
    assert {key: config[key] for key in options} == options


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(UsageError, match="eulr") as caught:
        samplers.prepare(SCALED, "eulr", 5)
    assert all(name in str(caught.value.hint) for name in samplers.names())


def test_a_sampler_named_by_the_user_keeps_the_schedule_and_does_not_clip_latents() -> None:
    config = {**SCALED, "_class_name": "PNDMScheduler", "steps_offset": 1, "timestep_spacing": "leading"}
    plan = samplers.prepare(config, "ddim", 4)
    assert plan.timesteps.tolist() == [751, 501, 251, 1]
    assert not plan.config.get("clip_sample")
    assert samplers.prepare({**SCALED, "_class_name": "DDIMScheduler"}, None, 4).config["clip_sample"]


@pytest.mark.parametrize(
    ("schedule", "steps", "words"),
    [
        ({"_class_name": "NoScheduler"}, 5, "NoScheduler"),
        ({"_class_name": "PNDMScheduler", "prediction_type": "sample"}, 5, "prediction_type"),
        ({"_class_name": "PNDMScheduler"}, 3, "4 or more"),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "sample"}, 5, "prediction_type"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, 5, "final_sigmas_type"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver"}, 5, "algorithm_type"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, 5, "solver_order"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh3"}, 5, "solver_type"),
        ({"_class_name": "LCMScheduler"}, 51, "51 steps"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, 5, "mu"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, 5, "only one"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "round"}, 5, "round"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "odd"}, 5, "odd"),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "odd"}, 5, "odd"),
        ({"_class_name": "DDIMScheduler"}, 0, "steps"),
        ({"_class_name": "DDIMScheduler"}, 1001, "steps"),
        ({**COMPVIS}, 501, "1000"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(schedule: dict[str, Any], steps: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        samplers.sample(model, START, schedule, None, steps)


def test_draws_that_do_not_fit_or_run_out_are_refused() -> None:
    with pytest.raises(UsageError, match="holds 2 draws"):
        list(samplers.sample(model, START, SCALED, "euler_a", 4, noise=np.zeros((2, *START.shape), np.float32)))
    with pytest.raises(UsageError, match="shape"):
        list(samplers.sample(model, START, SCALED, "euler_a", 4, noise=np.zeros((9, 1, 3, 5, 5), np.float32)))
    with pytest.raises(UsageError, match="eta"):
        samplers.sample(model, START, SCALED, "ddim", 4, eta=1.5)
    third = {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"}
    with pytest.raises(UsageError, match="third order"):
        list(samplers.sample(model, START, {**SCALED, **third}, "DPMSolverMultistepScheduler", 20))
    with pytest.raises(LatentEdgeError, match="shape"):
        list(samplers.sample(lambda x, t: x[:, :1], START, SCALED, "ddim", 4))


def test_a_learned_variance_takes_the_second_half_of_the_channels() -> None:
    config = {**SCALED, "_class_name": "DDPMScheduler", "clip_sample": False}
    noise = np.random.default_rng(5).standard_normal((9, *START.shape)).astype(np.float32)

    def two(share: float) -> Any:
        return lambda x, t: np.concatenate([model(x, t), np.full_like(x, share)], axis=1)

    def last(kind: str, function: Any) -> npt.NDArray[Any]:
        run = samplers.sample(function, START, {**config, "variance_type": kind}, None, 10, noise=noise)
        return [step.latents for step in run][-1]

    np.testing.assert_allclose(last("learned_range", two(1.0)), last("fixed_large", model), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(last("learned_range", two(-1.0)), last("fixed_small", model), rtol=1e-4, atol=1e-4)
    assert relative(last("learned_range", two(1.0)), last("fixed_small", model)) > 1e-3


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc", "dpm_solver", "lcm"])
def test_every_sampler_takes_the_alphas_of_a_compvis_checkpoint(name: str) -> None:
    recorded = np.load(GOLDEN / "compvis_model.npz")["model/alphas_cumprod"]
    np.testing.assert_array_equal(samplers.prepare(COMPVIS, name, 5).alphas_cumprod, recorded, strict=True)
    plain = {key: value for key, value in COMPVIS.items() if key != "dialect"}
    assert not np.array_equal(samplers.prepare(plain, "euler", 5).alphas_cumprod, recorded)
