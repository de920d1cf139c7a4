"""Properties that every sampler has: exact on a perfect model, its order, restart, batches, partial runs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentedge.runtime import samplers
from latentedge.runtime.noise import NoiseStream
from latentedge.runtime.samplers import Plan
from latentedge.runtime.schedules import alpha_sigma

Array = npt.NDArray[Any]
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COMPVIS = {**SCALED, "dialect": "compvis"}
EXPONENTIAL = {**SCALED, "use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}
NAMES = samplers.names()
FLOWS = ("flow_euler", "flow_heun")


def noise(shape: tuple[int, ...], seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def smooth(sample: Array, timestep: float) -> Array:
    wide = np.asarray(sample, np.float64)
    return (0.3 * wide * np.cos(timestep / 1000.0) + 0.1 * np.sin(wide)).astype(np.float32)


def perfect(plan: Plan, data: Array, name: str) -> Callable[[Array, float], Array]:
    """A model that knows the data point: what it predicts leads there from any sample."""
    levels = enumerate(plan.input_sigmas.astype(np.float64))

    def model(sample: Array, _: float) -> Array:
        index, sigma = next(levels)
        if name in FLOWS:
            return np.asarray((sample - data) / sigma)
        alpha, weight = 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)
        if name == "ipndm":  # its model predicts the velocity; the first noise level has no signal at all
            alpha, weight = float(plan.tables["alphas"][index]), float(plan.tables["weights"][index])
            return np.asarray(alpha * (sample - alpha * data) / weight - weight * data)
        return np.asarray((sample - alpha * data) / weight)

    return model


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ipndm"])
@given(steps=st.integers(4, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_a_perfect_model_leads_to_the_data_point(name: str, steps: int, seed: int) -> None:
    data = noise((1, 2, 3, 3), seed)
    plan = samplers.prepare(SCALED, name, steps)
    begin = noise(data.shape, seed + 1) * np.float32(plan.init_noise_sigma)
    run = list(samplers.sample(perfect(plan, data, name), begin, SCALED, name, steps, noise=NoiseStream("numpy", seed)))
    # float32 noise of the starting scale divided by the smallest alpha, 0.07
    np.testing.assert_allclose(run[-1].denoised, data, atol=2e-4)
    if plan.sigmas[-1] == 0 and name not in ("ddim", "plms", "pndm", "tcd"):  # these end at timestep 0, not at noise 0
        np.testing.assert_allclose(run[-1].latents, data, atol=2e-4)


def test_ipndm_nears_the_data_point_although_its_first_noise_level_has_no_signal() -> None:
    data = noise((1, 2, 3, 3), 1)

    def error(steps: int) -> float:
        plan = samplers.prepare(SCALED, "ipndm", steps)
        run = list(samplers.sample(perfect(plan, data, "ipndm"), noise(data.shape), SCALED, "ipndm", steps))
        return float(np.abs(run[-1].latents - data).max())

    assert error(10) > 0.1  # the first step is still in the polynomial of four
    assert error(40) < 1e-5


def gaussian_error(name: str, schedule: dict[str, Any], steps: int, stop: int | None) -> float:
    """The largest error at evaluation ``stop`` (None: the last) for data N(0.3, 0.36), whose ODE has a closed form."""
    plan = samplers.prepare(schedule, name, steps)
    sigmas = plan.input_sigmas.astype(np.float64)
    index = len(sigmas) - 1 if stop is None else int(np.nonzero(plan.timesteps == stop)[0].max())
    known = iter(sigmas)

    def model(sample: Array, _: float) -> Array:
        sigma = next(known)
        return np.asarray(sigma * (sample * np.sqrt(1 + sigma**2) - 0.3) / (0.36 + sigma**2), np.float32)

    def unscaled(sample: Array, sigma: float) -> Array:
        return np.asarray(sample.astype(np.float64) * (1.0 if plan.space == "sigma" else np.sqrt(1 + sigma**2)))

    begin = noise((1, 3, 8, 8), 0) * np.float32(plan.init_noise_sigma)
    run = samplers.sample(model, begin, schedule, name, steps)
    found = next(step.latents for step in run if step.index == index - 1)
    spread = np.sqrt((0.36 + sigmas[index] ** 2) / (0.36 + sigmas[0] ** 2))
    return float(np.abs(unscaled(found, sigmas[index]) - (0.3 + (unscaled(begin, sigmas[0]) - 0.3) * spread)).max())


LEADING = {**SCALED, "timestep_spacing": "leading", "clip_sample": False}
ORDERS: list[tuple[str, dict[str, Any], int, int, int | None, float]] = [
    ("ddim", LEADING, 20, 40, 500, 1),
    ("plms", LEADING, 40, 200, 500, 1.8),
    ("pndm", LEADING, 10, 40, 500, 1.9),
    ("euler", EXPONENTIAL, 24, 48, None, 1),
    ("heun", EXPONENTIAL, 24, 48, None, 2),
    ("dpm2", EXPONENTIAL, 24, 48, None, 2),
    ("lms", EXPONENTIAL, 24, 48, None, 3.5),
    ("dpmpp_2m", EXPONENTIAL, 24, 48, None, 2),
    ("dpmpp_3m", EXPONENTIAL, 24, 48, None, 2.3),
    ("dpmpp_2s", EXPONENTIAL, 24, 48, None, 2),
    ("dpmpp_3s", EXPONENTIAL, 24, 48, None, 3),
    ("unipc", EXPONENTIAL, 24, 48, None, 3),
    ("unipc", {**EXPONENTIAL, "solver_order": 3}, 24, 48, None, 3.5),
    ("deis", EXPONENTIAL, 24, 48, None, 2),
]


@pytest.mark.parametrize(("name", "schedule", "few", "many", "stop", "order"), ORDERS, ids=lambda v: str(v)[:20])
def test_the_error_falls_at_the_order_of_the_sampler(
    name: str, schedule: dict[str, Any], few: int, many: int, stop: int | None, order: float
) -> None:
    coarse, fine = (gaussian_error(name, schedule, steps, stop) for steps in (few, many))
    assert np.log(coarse / fine) / np.log(many / few) == pytest.approx(order, abs=0.2)


def flow_error(name: str, steps: int) -> float:
    """The largest error at sigma 0 for data N(0.3, 0.36) carried along the straight paths of a flow."""
    levels = iter(samplers.prepare({}, name, steps).input_sigmas.astype(np.float64))

    def model(sample: Array, _: float) -> Array:
        sigma = next(levels)
        centred = (sample - (1 - sigma) * 0.3) / ((1 - sigma) ** 2 * 0.36 + sigma**2)
        return np.asarray(sigma * centred - (0.3 + (1 - sigma) * 0.36 * centred), np.float32)

    begin = noise((1, 3, 8, 8), 0)
    *_, last = samplers.sample(model, begin, {}, name, steps)
    return float(np.abs(last.latents - (0.3 + begin * 0.6)).max())


@pytest.mark.parametrize(("name", "order"), [("flow_euler", 1), ("flow_heun", 2)])
def test_the_error_on_a_flow_falls_at_the_order_of_the_sampler(name: str, order: float) -> None:
    errors = [flow_error(name, steps) for steps in (48, 96)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", NAMES)
@given(stop=st.integers(0, 6))
@settings(max_examples=4, deadline=None)
def test_restarting_from_a_saved_step_equals_an_uninterrupted_run(name: str, stop: int) -> None:
    plan = samplers.prepare(SCALED, name, 5)
    begin = noise((1, 2, 3, 3)) * np.float32(plan.init_noise_sigma)
    whole = list(samplers.sample(smooth, begin, SCALED, name, 5, eta=0.0 if name == "plms" else 0.7,
                                 noise=NoiseStream("torch", 8)))  # fmt: skip
    saved = whole[min(stop, len(whole) - 1)]
    rest = list(samplers.sample(smooth, np.zeros_like(begin), SCALED, name, 5, eta=0.0 if name == "plms" else 0.7,
                                noise=NoiseStream("torch", 8), start=saved))  # fmt: skip
    assert len(rest) == len(whole) - saved.index - 1
    for found, expected in zip(rest, whole[saved.index + 1 :], strict=True):
        np.testing.assert_array_equal(found.latents, expected.latents)


@pytest.mark.parametrize("schedule", [SCALED, COMPVIS], ids=["diffusers", "compvis"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_two_equals_two_batches_of_one(name: str, schedule: dict[str, Any]) -> None:
    plan = samplers.prepare(schedule, name, 5)
    begin = noise((2, 2, 3, 3)) * np.float32(plan.init_noise_sigma)

    def last(start: Array, seeds: list[int]) -> Array:
        return list(samplers.sample(smooth, start, schedule, name, 5, noise=NoiseStream("torch", seeds)))[-1].latents

    both = last(begin, [4, 5])
    np.testing.assert_array_equal(both, np.concatenate([last(begin[:1], [4]), last(begin[1:], [5])]))
    assert np.abs(both[0] - both[1]).max() > 1e-3


@pytest.mark.parametrize("schedule", [SCALED, COMPVIS], ids=["diffusers", "compvis"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "plms"])
def test_strength_zero_returns_the_input_and_one_makes_every_step(name: str, schedule: dict[str, Any]) -> None:
    plan, picture = samplers.prepare(schedule, name, 5), noise((1, 2, 3, 3))
    begin = plan.begin(0.0)
    np.testing.assert_array_equal(plan.noised_start(picture, noise(picture.shape, 9), begin), picture)
    assert list(samplers.sample(smooth, picture, schedule, name, 5, begin=begin)) == []
    assert plan.begin(1.0) == 0


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "dpmpp_2m", "unipc", "flow_euler", "ddim"])
def test_noise_is_added_to_the_level_of_the_evaluation(name: str) -> None:
    plan = samplers.prepare(SCALED, name, 6)
    index = plan.begin(0.5)
    assert index == 3 * plan.order
    signal = plan.add_noise(np.ones((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)), index).item()
    spread = plan.add_noise(np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1, 1)), index).item()
    assert spread / signal == pytest.approx(
        plan.input_sigmas[index] / (1 - plan.input_sigmas[index] if plan.space == "flow" else 1), rel=1e-5
    )
    alpha, sigma = alpha_sigma(plan.input_sigmas[index], plan.space == "flow")
    expected = (1, plan.input_sigmas[index]) if plan.space == "sigma" else (alpha, sigma)
    assert (signal, spread) == pytest.approx(expected, rel=1e-5)


def test_a_caller_may_replace_the_latents_of_a_step() -> None:
    begin = noise((1, 2, 3, 3))
    run = samplers.sample(smooth, begin, SCALED, "ddim", 3)
    first = next(run)
    second = run.send(first.latents * 0.5)
    resumed = samplers.sample(smooth, begin, SCALED, "ddim", 3, start=first.replace(latents=first.latents * 0.5))
    np.testing.assert_array_equal(second.latents, next(resumed).latents)


def test_fresh_draws_of_dpmpp_sde_are_increments_of_one_brownian_motion() -> None:
    """The second draw of a step covers the first's interval too; recorded draws are already increments."""
    plan = samplers.prepare(SCALED, "dpmpp_sde", 4)
    sigma, middle, end = plan.sigmas[0], plan.tables["middle"][0], plan.sigmas[1]
    begin, draws = noise((1, 2, 3, 3)) * np.float32(plan.init_noise_sigma), noise((6, 1, 2, 3, 3), 7)
    taken = iter(draws)
    fresh = list(samplers.sample(smooth, begin, SCALED, "dpmpp_sde", 4, noise=lambda shape: next(taken)))
    share = (sigma - middle) / (sigma - end)
    joined = draws.copy()
    joined[1] = np.sqrt(share) * draws[0] + np.sqrt(1 - share) * draws[1]
    recorded = list(samplers.sample(smooth, begin, SCALED, "dpmpp_sde", 4, noise=joined))
    np.testing.assert_allclose(fresh[1].latents, recorded[1].latents, rtol=1e-5, atol=1e-5)


def test_the_loop_allocates_nothing_that_grows_with_steps() -> None:
    def peak(steps: int) -> int:
        start = noise((1, 4, 64, 64))
        tracemalloc.start()
        for _ in samplers.sample(lambda x, t: x, start, SCALED, "dpmpp_3m", steps):
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(4)
    assert peak(60) < peak(10) + start_size() / 2


def start_size() -> int:
    return int(np.zeros((1, 4, 64, 64), np.float32).nbytes)
