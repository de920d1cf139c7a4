"""Schedules: tables and timesteps against recorded ones, and the facts that define each spacing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentedge.runtime import samplers, schedules
from latentedge.runtime.errors import UsageError
from latentedge.runtime.samplers import compvis

GOLDEN = Path(__file__).parent.parent / "golden" / "samplers"
LINEAR = {**schedules.COMMON}
SCALED = {**LINEAR, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {**LINEAR, "beta_schedule": "squaredcos_cap_v2"}
TABLES = {"linear": LINEAR, "scaled_linear": SCALED, "squaredcos_cap_v2": COSINE}


@pytest.mark.parametrize("name", TABLES)
def test_betas_and_their_cumulative_products_are_recorded_ones_to_the_bit(name: str) -> None:
    recorded, config = np.load(GOLDEN / "exact.npz"), TABLES[name]
    zero = {**config, "rescale_betas_zero_snr": True}
    np.testing.assert_array_equal(schedules.betas(config), recorded[f"tables/{name}/betas"], strict=True)
    cumulative = recorded[f"tables/{name}/alphas_cumprod"]
    np.testing.assert_array_equal(schedules.alphas_cumprod(config), cumulative, strict=True)
    # rescaling takes square roots, which were recorded with a library that does not round them correctly
    for floor, key in ((0.0, "alphas_cumprod_zsnr"), (2.0**-24, "alphas_cumprod_zsnr_euler")):
        found, expected = schedules.alphas_cumprod(zero, floor), recorded[f"tables/{name}/{key}"]
        np.testing.assert_allclose(found, expected, rtol=5e-7)
        assert found[-1] == expected[-1] == floor


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_tables_of_compvis_are_recorded_ones_to_the_bit(name: str) -> None:
    recorded = np.load(GOLDEN / "compvis_model.npz")
    start, end = recorded[f"{name}_start_end"]
    config = {**SCALED, "beta_start": start, "beta_end": end}
    np.testing.assert_array_equal(schedules.exact_betas(config), recorded[f"{name}_betas_f64"], strict=True)
    np.testing.assert_array_equal(
        schedules.alphas_cumprod({**config, "dialect": "compvis"}), recorded[f"{name}_alphas_cumprod"], strict=True
    )


@pytest.mark.parametrize(("name", "key"), [("linear", "betas_sqrt_linear_1e-4_2e-2"), ("sqrt", "betas_sqrt_1e-4_2e-2"),
                                           ("squaredcos_cap_v2", "betas_cosine")])  # fmt: skip
def test_the_other_betas_of_compvis(name: str, key: str) -> None:
    found = schedules.exact_betas({**LINEAR, "beta_schedule": name})
    np.testing.assert_allclose(found, np.load(GOLDEN / "compvis_model.npz")[key], rtol=1e-11)


@pytest.mark.parametrize("steps", [8, 20, 30, 50, 100, 200, 250, 400])
def test_the_timesteps_of_compvis(steps: int) -> None:
    recorded = np.load(GOLDEN / "compvis_model.npz")[f"timesteps_S{steps}"]
    np.testing.assert_array_equal(compvis.timesteps(LINEAR, steps), recorded[::-1], strict=True)


@pytest.mark.parametrize("steps", [333, 501, 999])
def test_steps_on_which_compvis_asks_for_a_timestep_past_the_end_are_refused(steps: int) -> None:
    with pytest.raises(UsageError, match="ends at 999"):
        compvis.timesteps(LINEAR, steps)


def test_spacings_are_those_of_the_table() -> None:
    """Lin et al. 2023, table 2, for T = 1000 and 10 steps."""
    leading = schedules.spaced({**LINEAR, "timestep_spacing": "leading"}, 10)
    trailing = schedules.spaced({**LINEAR, "timestep_spacing": "trailing"}, 10)
    assert leading.tolist() == list(range(900, -1, -100))
    assert trailing.tolist() == list(range(999, 0, -100))
    assert schedules.spaced(LINEAR, 10).round().tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


@given(steps=st.integers(2, 60), spacing=st.sampled_from(["karras", "exponential", "beta", "ays"]))
@settings(deadline=None)
def test_respaced_sigmas_fall_from_the_first_to_the_last(steps: int, spacing: str) -> None:
    config = {**SCALED, f"use_{spacing}_sigmas": True}
    sigmas = schedules.respaced(config, 14.615, 0.152, steps)
    assert sigmas is not None
    assert len(sigmas) == steps
    np.testing.assert_allclose(sigmas[[0, -1]], [14.615, 0.152], rtol=1e-12)
    assert (np.diff(sigmas) < 0).all()


def test_respaced_sigmas_have_their_defining_property() -> None:
    def spaced(kind: str) -> Any:
        return schedules.respaced({**SCALED, f"use_{kind}_sigmas": True}, 14.0, 0.03, 11)

    np.testing.assert_allclose(np.diff(np.log(spaced("exponential")), 2), 0, atol=1e-12)
    np.testing.assert_allclose(np.diff(spaced("karras") ** (1 / 7), 2), 0, atol=1e-12)
    np.testing.assert_allclose(spaced("beta")[5], (14.0 + 0.03) / 2, rtol=1e-12)  # the median of a symmetric law


def test_the_beta_quantile_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    levels = np.concatenate([np.linspace(0, 1, 101), [1e-9, 1e-4, 0.9999]])
    found = [schedules._beta_quantile(float(p), 0.6) for p in levels]
    np.testing.assert_allclose(found, stats.beta.ppf(levels, 0.6, 0.6), rtol=1e-13, atol=1e-16)


def test_align_your_steps_is_its_table_at_ten_steps_and_interpolates_logarithms_elsewhere() -> None:
    config = {**SCALED, "use_ays_sigmas": True}
    np.testing.assert_allclose(schedules.respaced(config, 1, 1, 10), schedules.ALIGN_YOUR_STEPS["sd"], rtol=1e-12)
    nineteen = schedules.respaced({**config, "ays_model": "sdxl"}, 1, 1, 19)
    assert nineteen is not None
    np.testing.assert_allclose(nineteen[::2], schedules.ALIGN_YOUR_STEPS["sdxl"], rtol=1e-12)
    np.testing.assert_allclose(nineteen[1], np.sqrt(nineteen[0] * nineteen[2]), rtol=1e-12)


@given(index=st.floats(0, 999))
@settings(deadline=None)
def test_the_timestep_of_a_sigma_undoes_the_table(index: float) -> None:
    logs = np.log(schedules.sigma_table(schedules.alphas_cumprod(SCALED)))
    sigma = np.exp(np.interp([index], np.arange(1000), logs.astype(np.float64)))
    assert schedules.timestep_of_sigma(sigma, logs)[0] == pytest.approx(index, abs=2e-4)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc", "deis", "lms"])
def test_a_zero_terminal_snr_schedule_starts_from_pure_noise(name: str) -> None:
    config = {
        **SCALED,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    first = float(samplers.prepare(config, name, 5).input_sigmas[0])
    honoured = name in ("euler", "dpmpp_2m", "unipc")  # the others have no such field, as in diffusers
    assert first == pytest.approx(4096 if honoured else 14.6, rel=0.01)


def test_given_timesteps_and_sigmas_replace_the_spacing() -> None:
    timesteps = [999, 850, 736, 645]
    for name in ("euler", "ddpm", "dpmpp_2m", "heun", "lcm"):
        plan = samplers.prepare(SCALED, name, 10, timesteps=timesteps)
        assert sorted(set(plan.timesteps.tolist()), reverse=True) == timesteps
        assert plan.steps == 4
    plan = samplers.prepare(SCALED, "euler", 10, sigmas=[14.6, 3.0, 0.5, 0.0])
    np.testing.assert_array_equal(plan.sigmas, np.array([14.6, 3.0, 0.5, 0.0], np.float32))


def test_trained_betas_replace_the_named_schedule() -> None:
    values = np.linspace(0.001, 0.02, 50).astype(np.float32)
    config = {"trained_betas": values.tolist(), "num_train_timesteps": 50}
    plan = samplers.prepare(config, "ddim", 5)
    np.testing.assert_allclose(plan.alphas_cumprod, np.cumprod(1 - values.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "transform"), [("exp", "exp"), ("laplace", "laplace"), ("squaredcos_cap_v2", "cosine")]
)
def test_betas_of_a_cumulative_product_follow_diffusers(name: str, transform: str) -> None:
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    expected = module.betas_for_alpha_bar(1000, alpha_transform_type=transform).numpy()
    found = schedules.betas({**LINEAR, "beta_schedule": name})
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sigmoid_betas_follow_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.DDPMScheduler(beta_schedule="sigmoid").betas.numpy()
    np.testing.assert_allclose(schedules.betas({**LINEAR, "beta_schedule": "sigmoid"}), expected, rtol=1e-5)


def test_the_table_of_align_your_steps_is_the_published_one() -> None:
    published = pytest.importorskip("diffusers.schedulers").AysSchedules
    for name, key in (("sd", "StableDiffusionSigmas"), ("sdxl", "StableDiffusionXLSigmas")):
        own = schedules.ALIGN_YOUR_STEPS[name]
        assert list(own) == published[key][: len(own)]
