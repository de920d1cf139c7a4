"""DPM-Solver++(2S) ancestral, which diffusers does not have, against its definition in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from latentedge.runtime import samplers

SCHEDULE = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "beta_end": 0.012}  # fmt: skip


def epsilon(scaled: Any) -> Any:
    return np.tanh(0.7 * scaled) + 0.1 * scaled


def denoised_at(x: Any, sigma: float) -> Any:
    return x - sigma * epsilon(x / np.sqrt(sigma**2 + 1))


def defined(x: Any, sigmas: Any, noise: Any) -> Any:
    """Algorithm 1 of Lu et al. 2022 with r = 1/2, to sigma_down, then noise of sigma_up."""
    for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        up = min(following, np.sqrt(following**2 * (sigma**2 - following**2) / sigma**2))
        down = np.sqrt(following**2 - up**2)
        if down == 0:
            return denoised_at(x, sigma)
        h = np.log(sigma) - np.log(down)
        middle = sigma * np.exp(-h / 2)
        halfway = middle / sigma * x - np.expm1(-h / 2) * denoised_at(x, sigma)
        x = down / sigma * x - np.expm1(-h) * denoised_at(halfway, middle) + noise[index] * up
    raise AssertionError("the last sigma is 0")


@pytest.mark.parametrize(("name", "steps"), [("dpmpp_2s_ancestral", 7), ("dpmpp_2s_a_karras", 12)])
def test_the_samples_are_those_of_the_definition(name: str, steps: int) -> None:
    generator = np.random.default_rng(0)
    plan = samplers.prepare(SCHEDULE, name, steps)
    start = (generator.standard_normal((1, 4, 3, 3)) * plan.init_noise_sigma).astype(np.float32)
    noise = generator.standard_normal((steps, *start.shape)).astype(np.float32)
    *_, last = samplers.sample(lambda x, t: epsilon(x).astype(np.float32), start, SCHEDULE, name, steps, noise=noise)
    expected = defined(start.astype(np.float64), plan.tables["sigma"].astype(np.float64), noise.astype(np.float64))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(last.latents, expected, atol=2e-5)
