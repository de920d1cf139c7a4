"""What a model's output means: every kind gives back the data and the noise that the sample was made of."""

from __future__ import annotations

import numpy as np
import pytest

from latentedge.runtime.errors import UsageError
from latentedge.runtime.parametrisation import denoised_at, denoised_of, limited, noise_of

DATA, NOISE = np.random.default_rng(0).standard_normal((2, 2, 3, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("angle", [0.1, 0.8, 1.4])
def test_data_and_noise_come_back(angle: float) -> None:
    alpha, sigma = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    sample = alpha * DATA + sigma * NOISE
    outputs = {"epsilon": NOISE, "sample": DATA, "v_prediction": alpha * NOISE - sigma * DATA}
    for kind, output in outputs.items():
        np.testing.assert_allclose(denoised_of(kind, sample, output, alpha, sigma), DATA, atol=2e-5)
        np.testing.assert_allclose(noise_of(kind, sample, output, alpha, sigma), NOISE, atol=2e-5)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 14.6])
def test_data_comes_back_where_the_noise_is_added_unscaled(sigma: float) -> None:
    sigma32 = np.float32(sigma)
    scale = np.sqrt(sigma32**2 + 1)
    sample = DATA + sigma32 * NOISE
    outputs = {"epsilon": NOISE, "sample": DATA, "v_prediction": (NOISE - sigma32 * DATA) / scale}
    for kind, output in outputs.items():
        np.testing.assert_allclose(denoised_at(kind, sample, output, sigma32), DATA, atol=2e-5)


def test_flow_moves_from_data_to_noise() -> None:
    sigma = np.float32(0.3)
    sample = (1 - sigma) * DATA + sigma * NOISE
    np.testing.assert_allclose(denoised_of("flow_prediction", sample, NOISE - DATA, 1 - sigma, sigma), DATA, atol=1e-6)


def test_an_unknown_kind_is_refused() -> None:
    for call in (denoised_of, noise_of):
        with pytest.raises(UsageError, match="prediction_type 'score' is unknown"):
            call("score", DATA, DATA, 0.5, 0.5)
    with pytest.raises(UsageError, match="prediction_type 'score' is unknown"):
        denoised_at("score", DATA, DATA, 0.5)


def test_each_picture_has_a_threshold_of_its_own() -> None:
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0, "clip_sample": True}
    for scale, bound in ((0.1, 1.0), (1.0, np.quantile(np.abs(DATA[0]), 0.9)), (50.0, 3.0)):
        pictures = np.stack([DATA[0] * np.float32(scale), 100 * DATA[1]])
        expected = np.clip(pictures[0], -bound, bound) / bound
        np.testing.assert_allclose(limited(config, pictures)[0], expected, atol=1e-6)


def test_clipping_is_to_the_configured_range_and_only_where_asked() -> None:
    config = {"clip_sample": True, "clip_sample_range": 0.5}
    assert np.array_equal(limited(config, DATA), np.clip(DATA, -0.5, 0.5))
    assert limited(config, DATA, clip=False) is DATA
    assert limited({}, DATA) is DATA
