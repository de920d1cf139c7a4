"""Guidance: the combinations, rescaling, the interval and the embedding of the scale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentedge.runtime import guidance, samplers
from latentedge.runtime.errors import UsageError
from latentedge.runtime.parametrisation import noise_of
from latentedge.runtime.schedules import alpha_sigma

DRAWS = np.random.default_rng(2).standard_normal((3, 2, 4, 5, 5)).astype(np.float32)


@given(scale=st.floats(-2, 20))
def test_classifier_free_guidance_extrapolates_from_the_unconditional(scale: float) -> None:
    found = guidance.classifier_free(scale)([DRAWS[0], DRAWS[1]])
    expected = (1 - scale) * DRAWS[0].astype(np.float64) + scale * DRAWS[1].astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert found.dtype == np.float32


def test_a_scale_of_one_is_the_conditional() -> None:
    np.testing.assert_allclose(guidance.classifier_free(1.0)([DRAWS[0], DRAWS[1]]), DRAWS[1], atol=1e-6)
    np.testing.assert_array_equal(guidance.only([DRAWS[1]]), DRAWS[1])


def test_full_rescale_gives_each_picture_the_conditionals_deviation() -> None:
    plain = guidance.classifier_free(7.5)([DRAWS[0], DRAWS[1]])
    found = guidance.classifier_free(7.5, 1.0)([DRAWS[0], DRAWS[1]])
    for i in range(2):
        assert np.std(found[i], ddof=1) == pytest.approx(np.std(DRAWS[1][i], ddof=1), rel=1e-5)
        assert np.std(plain[i], ddof=1) > 3 * np.std(found[i], ddof=1)
    half = guidance.classifier_free(7.5, 0.5)([DRAWS[0], DRAWS[1]])
    np.testing.assert_allclose(half, (plain + found) / 2, atol=1e-5)


def test_rescale_agrees_with_diffusers() -> None:
    torch = pytest.importorskip("torch")
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    guided, conditional = torch.from_numpy(DRAWS[0] * 4), torch.from_numpy(DRAWS[1])
    expected = pipelines.rescale_noise_cfg(guided, conditional, guidance_rescale=0.7).numpy()
    np.testing.assert_allclose(guidance.rescaled(DRAWS[0] * 4, DRAWS[1], 0.7), expected, rtol=1e-5, atol=1e-6)


def test_text_and_image_guidance_weighs_both_differences() -> None:
    both, image, neither = DRAWS
    np.testing.assert_allclose(guidance.text_and_image(1.0, 1.0)([both, image, neither]), both, atol=1e-5)
    np.testing.assert_allclose(guidance.text_and_image(0.0, 1.0)([both, image, neither]), image, atol=1e-5)
    np.testing.assert_allclose(
        guidance.text_and_image(7.5, 1.5)([both, image, neither]),
        neither + 7.5 * (both - image) + 1.5 * (image - neither),
        atol=1e-4,
    )


def ddim_plan(steps: int, prediction_type: str = "epsilon") -> samplers.Plan:
    schedule = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "prediction_type": prediction_type}
    return samplers.prepare(schedule, None, steps)


def computed(shares: list[float | None]) -> list[int]:
    return [index for index, share in enumerate(shares) if share is None]


def test_the_interval_is_closed_and_none_is_everywhere() -> None:
    plan = ddim_plan(4)
    assert guidance.planned(plan, 0, None, 1) == [None] * 4
    _, second, third, _ = plan.input_sigmas.tolist()
    assert guidance.planned(plan, 0, (third, second), 1) == [0.0, None, None, 0.0]
    assert guidance.planned(plan, 1, (third, second), 1) == [None, None, 0.0]


def test_differences_are_kept_between_the_evaluations_that_compute_all() -> None:
    plan = ddim_plan(6)
    assert computed(guidance.planned(plan, 0, None, 3)) == [0, 3]
    assert computed(guidance.planned(plan, 2, None, 3)) == [0, 3]
    assert computed(guidance.planned(plan, 0, None, [0, 4])) == [0, 4]
    assert computed(guidance.planned(plan, 0, None, [2])) == [0, 2]
    # Nothing is kept yet where guidance begins.
    inner = float(plan.input_sigmas[4]), float(plan.input_sigmas[1])
    found = guidance.planned(plan, 0, inner, 4)
    assert computed(found) == [1, 4]
    assert [index for index, share in enumerate(found) if share == 0] == [0, 5]


def test_a_kept_difference_fades_and_follows_the_noise() -> None:
    plan = ddim_plan(20)
    sigma = plan.input_sigmas / np.sqrt(1 + plan.input_sigmas**2)
    found = guidance.planned(plan, 0, None, [0, 8])
    for index in range(9, 20):
        expected = sigma[index] / sigma[8] * 0.9 ** (index - 8)
        assert found[index] == pytest.approx(expected, rel=1e-5)
    # A run that begins later has what its own last whole evaluation says.
    assert guidance.planned(plan, 8, None, [0])[1:] == pytest.approx(found[9:], rel=1e-6)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_every_parametrisation_keeps_the_same_noise(kind: str) -> None:
    sample, *outputs = DRAWS.astype(np.float64)
    # From where alpha is above a tenth on.
    of_noise, own = (guidance.planned(ddim_plan(20, name), 4, None, [0]) for name in ("epsilon", kind))
    levels = [alpha_sigma(sigma) for sigma in ddim_plan(20).input_sigmas[4:]]
    unconditional, conditional = (noise_of(kind, sample, output, *levels[0]) for output in outputs)
    for share, share_of_noise, level in zip(own[1:], of_noise[1:], levels[1:], strict=True):
        assert share is not None
        assert share_of_noise is not None
        kept = outputs[1] - share * (outputs[1] - outputs[0])
        found = noise_of(kind, sample, outputs[1], *level) - noise_of(kind, sample, kept, *level)
        np.testing.assert_allclose(found, share_of_noise * (conditional - unconditional), rtol=1e-4, atol=1e-6)


def test_flow_keeps_finite_shares_from_pure_noise_on() -> None:
    plan = samplers.prepare({"_class_name": "FlowMatchEulerDiscreteScheduler"}, None, 8)
    assert plan.input_sigmas[0] == 1
    shares = guidance.planned(plan, 0, None, [0])[1:]
    assert all(share is not None and 0 < share < 1 for share in shares)


@pytest.mark.parametrize("width", [32, 256, 33])
def test_the_embedding_is_sines_then_cosines_of_the_scaled_weight(width: int) -> None:
    found = guidance.guidance_embedding(7.5, width)
    assert found.shape == (1, width)
    assert found.dtype == np.float32
    half = width // 2
    angles = 7500.0 * np.exp(-np.log(10000.0) * np.arange(half) / (half - 1))
    # a float32 angle of thousands of radians is known to about 5e-4
    np.testing.assert_allclose(found[0, :half], np.sin(angles), atol=1e-3)
    np.testing.assert_allclose(found[0, half : 2 * half], np.cos(angles), atol=1e-3)
    assert (found[0, 2 * half :] == 0).all()


def test_the_embedding_agrees_with_diffusers() -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img")
    method = module.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for width in (16, 32, 64):
        expected = method(None, torch.tensor([7.0]), embedding_dim=width).numpy()
        np.testing.assert_allclose(guidance.guidance_embedding(7.0, width), expected, atol=1e-6)
    # torch's own exponential is off by a bit at some of the many frequencies.
    expected = method(None, torch.tensor([7.0]), embedding_dim=256).numpy()
    np.testing.assert_allclose(guidance.guidance_embedding(7.0, 256), expected, atol=1e-3)


def test_a_rescale_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        guidance.classifier_free(5.0, 1.5)
