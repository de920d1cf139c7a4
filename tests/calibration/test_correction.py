from __future__ import annotations

import numpy as np
import pytest

from latentedge.runtime.correction import corrected, correction_of
from tests.runtime.bundles import pipeline, text_manifest


def record(gain: float, bias: float) -> dict[str, object]:
    return {"timesteps": [100.0, 900.0], "gain": [gain, gain], "bias": [[bias] * 4, [bias] * 4]}


def test_values_are_interpolated_between_timesteps_and_held_outside() -> None:
    entry = {"timesteps": [0.0, 100.0], "gain": [1.0, 3.0], "bias": [[0.0, 1.0], [10.0, 1.0]]}
    correction = correction_of(text_manifest(calibration={"correction": {"int8": entry}}), "int8")
    assert correction is not None
    output = np.ones((1, 2, 3, 3), np.float32)
    np.testing.assert_allclose(correction(output, 50.0)[0, :, 0, 0], [2 + 5, 2 + 1])
    np.testing.assert_allclose(correction(output, 500.0)[0, :, 0, 0], [3 + 10, 3 + 1])
    assert correction(output, 50.0).dtype == np.float32


def test_a_correction_that_measured_no_better_is_recorded_and_not_applied() -> None:
    entry = record(0.5, 0.0)
    for applied, found in ((True, True), (False, False)):
        manifest = text_manifest(calibration={"correction": {"int8": {**entry, "applied": applied}}})
        assert (correction_of(manifest, "int8") is not None) == found


def test_only_the_precision_that_was_measured_is_corrected() -> None:
    manifest = text_manifest(calibration={"correction": {"int8": record(0.5, 0.0)}})

    def model(sample: np.ndarray, timestep: float) -> np.ndarray:
        return sample

    assert corrected(model, manifest, "int8+bf16") is model
    assert corrected(model, text_manifest(), "int8") is model
    assert corrected(model, manifest, "int8") is not model


def test_the_pipeline_applies_it_in_its_loop() -> None:
    def latents(calibration: dict[str, object]) -> np.ndarray:
        pipe = pipeline(text_manifest(calibration=calibration))
        ids = np.zeros((1, 5), np.int64)
        options = {"prompt_ids": ids, "negative_prompt_ids": ids, "seed": 1, "steps": 3, "height": 32, "width": 32}
        return np.asarray(pipe.generate(**options).latents)

    precision = pipeline(text_manifest()).precision
    plain = latents({})
    np.testing.assert_allclose(latents({"correction": {precision: record(1.0, 0.0)}}), plain, atol=1e-6)
    assert np.abs(latents({"correction": {precision: record(0.9, 0.05)}}) - plain).max() > 0.01
    assert np.array_equal(latents({"correction": {"another": record(0.9, 0.05)}}), plain)


@pytest.mark.parametrize("calibration", [{}, {"correction": {}}, {"correction": {"int8": None}}])
def test_without_a_record_nothing_is_corrected(calibration: dict[str, object]) -> None:
    assert correction_of(text_manifest(calibration=calibration), "int8") is None
