from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentedge.calibration.correct import WORTHWHILE_DB, fit, measured_fit
from latentedge.calibration.gate import REFERENCE, Race, with_records
from latentedge.calibration.latency import ratio, saved
from latentedge.calibration.metrics import (
    frechet_distance,
    latent_features,
    mean_low,
    psnr,
    sqnr,
    ssim,
    student_quantile,
    worst_low,
)
from latentedge.calibration.presentation import floors
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.correction import Correction
from latentedge.runtime.selection import holds_floor


def test_psnr_and_sqnr_of_known_errors() -> None:
    picture = np.full((8, 8, 3), 0.5, np.float32)
    assert psnr(picture, picture + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(picture, picture) == 100
    assert psnr(picture, picture * np.nan) == 0
    assert sqnr(np.full(10, 2.0), np.full(10, 2.02)) == pytest.approx(40, abs=1e-6)
    assert sqnr(np.ones(3), np.full(3, np.inf)) == -100


def test_ssim_agrees_with_scikit_image() -> None:
    structural = pytest.importorskip("skimage.metrics").structural_similarity
    random = np.random.default_rng(0)
    one = random.random((40, 48, 3)).astype(np.float32)
    two = np.clip(one + 0.1 * random.standard_normal(one.shape), 0, 1).astype(np.float32)
    _, whole = structural(
        one,
        two,
        channel_axis=-1,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    # scikit-image averages over the same windows, those that stay inside.
    expected = whole[5:-5, 5:-5].mean()
    assert ssim(one, two) == pytest.approx(expected, abs=2e-4)
    assert ssim(one, one) == pytest.approx(1, abs=1e-9)


def test_frechet_distance_of_gaussians() -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((500, 6)) @ random.standard_normal((6, 6))
    shift = np.arange(6.0)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + shift) == pytest.approx(float(shift @ shift), rel=1e-6)
    values = np.linalg.eigvalsh(np.cov(features, rowvar=False))
    # Twice as wide: tr(C + 4 C - 2 (4 C C)^(1/2)) = tr(C).
    middle = features.mean(axis=0)
    assert frechet_distance(features, 2 * features - middle) == pytest.approx(values.sum(), rel=1e-6)


def test_features_see_mean_and_texture() -> None:
    latents = np.zeros((2, 4, 8, 8))
    latents[1, :, ::2] = 1
    features = latent_features(latents)
    assert features.shape == (2, 32)
    assert not np.array_equal(features[0], features[1])


def test_correction_finds_gain_and_bias() -> None:
    random = np.random.default_rng(0)
    steps = [float(step) for step in range(0, 1000, 40)]
    references = [random.standard_normal((2, 4, 8, 8)).astype(np.float32) for _ in steps]
    bias = np.array([0.1, -0.2, 0.05, 0.0])[:, None, None]
    outputs = [
        (array / 0.9 - bias + 0.01 * random.standard_normal(array.shape)).astype(np.float32) for array in references
    ]
    record = fit(steps, references, outputs)
    np.testing.assert_allclose(record["gain"], 0.9, atol=0.005)
    np.testing.assert_allclose(np.array(record["bias"]).mean(axis=0), 0.9 * bias[:, 0, 0], atol=0.01)
    np.testing.assert_allclose(record["residual_variance"], (0.9 * 0.01) ** 2, rtol=0.2)
    kept = measured_fit(steps, references, outputs)
    assert kept is not None
    assert kept["sqnr_db_gained"] > 15
    correction = Correction(*(np.array(kept[name]) for name in ("timesteps", "gain", "bias")))
    assert sqnr(references[3], correction(outputs[3], steps[3])) > sqnr(references[3], outputs[3]) + 15


def test_correction_of_pure_noise_gains_nothing() -> None:
    random = np.random.default_rng(1)
    steps = [float(step) for step in range(0, 1000, 100)]
    references = [random.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in steps]
    outputs = [(array + 0.01 * random.standard_normal(array.shape)).astype(np.float32) for array in references]
    found = measured_fit(steps, references, outputs)
    assert found is not None
    assert abs(found["sqnr_db_gained"]) < WORTHWHILE_DB
    assert measured_fit(steps[:3], references[:3], outputs[:3]) is None
    outputs[2][0, 0, 0, 0] = np.inf
    assert measured_fit(steps, references, outputs) is None


def times(middle: float, seed: int) -> list[float]:
    return list(middle * np.exp(0.05 * np.random.default_rng(seed).standard_normal(30)))


def test_ratio_and_its_lower_bound() -> None:
    found = ratio(times(2.0, 0), times(1.0, 1))
    assert found.ratio == pytest.approx(2, rel=0.05)
    assert 1.8 < found.low < found.ratio
    gain, error = saved(times(2.0, 0), times(1.9, 1))
    assert gain == pytest.approx(0.1, abs=4 * error)


def test_int8_must_beat_the_fastest_float_precision_that_is_good_enough() -> None:
    seconds = {"fp32": times(4.0, 0), "bf16": times(2.0, 1), "int8": times(2.5, 2), "int8+bf16": times(1.5, 3)}
    records = Race("openvino", {"bf16": True}).records(seconds)
    assert records["int8"]["alternative"] == "bf16"
    assert records["int8"]["ratio"] > 1.4
    assert records["int8"]["ratio_low"] < 1
    assert records["int8+bf16"]["ratio_low"] > 1.2
    # Where bf16's pictures are not good enough, fp32 is what has to be beaten.
    records = Race("openvino", {"bf16": False}).records(seconds)
    assert records["int8"]["alternative"] == "fp32"
    assert records["int8"]["ratio_low"] > 1.4


def test_what_the_noise_hides_is_undecided_and_is_not_chosen() -> None:
    seconds = {"fp32": times(4.0, 0), "bf16": times(2.0, 1), "int8": times(2.0, 2), REFERENCE: times(5.0, 4)}
    race = Race("openvino", {"bf16": True, "int8": True})
    record = race.records(seconds)["int8"]
    assert record["verdict"] == "undecided"
    assert record["ratio_low"] < 1 < record["ratio_high"]
    assert record["ratio"] == pytest.approx(2.5, rel=0.05)
    assert not race.decided(seconds)
    assert race.records(seconds)["bf16"]["verdict"] == "faster"
    # Below the floor it cannot be chosen, so nothing has to be decided.
    assert Race("openvino", {"bf16": True, "int8": False}).decided(seconds)
    assert race.decided({**seconds, "int8": times(1.0, 5)})
    slower = race.records({**seconds, "int8": times(3.0, 5)})["int8"]
    assert (slower["verdict"], slower["ratio_high"] < 1) == ("slower", True)


def test_what_was_proven_stays_where_a_new_measurement_is_undecided(bundle: Bundle) -> None:
    def measured(verdict: str, low: float, library: str = "openvino 1") -> dict[str, Any]:
        known = {"kind": "latency", "backend": "openvino", "precision": "bf16", "machine": "here", "library": library}
        return {**known, "ratio": low + 0.1, "ratio_low": low, "reference": "openvino fp32", "verdict": verdict}

    def after(*records: dict[str, Any]) -> list[float]:
        changed = bundle
        for record in records:
            changed = with_records(changed, "unet", [record])
        return [entry["ratio_low"] for entry in changed.component("unet").variants["fp32"].measured]

    assert after(measured("faster", 1.7), measured("undecided", 0.9)) == [1.7]
    assert after(measured("faster", 1.7), measured("faster", 1.2)) == [1.2]
    assert after(measured("faster", 1.7), measured("slower", 0.6)) == [0.6]
    assert after(measured("undecided", 0.8), measured("undecided", 0.9)) == [0.9]
    assert after(measured("faster", 1.7), measured("undecided", 0.9, "openvino 2")) == [0.9]


def test_both_floors_count() -> None:
    record = {"psnr_low_db": 30.5, "psnr_db": 31.0, "psnr_worst_db": 25.0, "floor_mean_db": 30.0, "floor_db": 24.0}
    assert holds_floor(record)
    assert not holds_floor({**record, "psnr_low_db": 29.9})
    assert not holds_floor({**record, "psnr_worst_db": 23.9})
    assert holds_floor({**record, "psnr_worst_low_db": 24.1})
    assert not holds_floor({**record, "psnr_worst_low_db": 23.9})


@pytest.mark.parametrize(
    ("low", "mean", "worst", "foreseen", "said"),
    [
        (30.0, 31.0, 24.0, 24.0, "held"),
        (29.0, 29.5, 20.0, 19.0, "mean below 30"),
        (29.0, 31.0, 23.9, 23.0, "worst below 24"),
        (29.9, 31.0, 24.0, 24.0, "mean perhaps below 30"),
        (30.1, 31.0, 25.0, 23.9, "worst perhaps below 24"),
    ],
)
def test_the_table_says_which_floor_is_missed(
    low: float, mean: float, worst: float, foreseen: float, said: str
) -> None:
    record = {"psnr_low_db": low, "psnr_db": mean, "psnr_worst_db": worst, "floor_mean_db": 30.0, "floor_db": 24.0}
    record["psnr_worst_low_db"] = foreseen
    assert floors({f"quality.{name}": value for name, value in record.items()}) == said
    assert holds_floor(record) == (said == "held")


def test_the_worst_of_others_is_foreseen() -> None:
    """Nine times in ten the worst of 64 others is no worse than what 16 pictures foresee."""
    random = np.random.default_rng(4)
    drawn = random.normal(36, 3, (1000, 16 + 64))
    held = [float(row[16:].min()) >= worst_low(list(row[:16]), 100) for row in drawn]
    assert 0.87 <= np.mean(held) <= 0.95
    assert worst_low([36.0] * 16, 50) == 36
    assert worst_low([68.0] * 15 + [49.0], 50) > 45, "almost the same pictures do not widen the spread"
    assert worst_low([40.0, 30.0], 50) == 30, "two pictures say nothing about a spread"


@pytest.mark.parametrize(
    ("share", "freedom", "quantile"), [(0.975, 7, 2.3646), (0.95, 15, 1.7531), (0.9985, 7, 4.4421), (0.9985, 15, 3.535)]
)
def test_quantiles_of_students_distribution(share: float, freedom: int, quantile: float) -> None:
    assert student_quantile(share, freedom) == pytest.approx(quantile, rel=0.02)


def test_a_mean_of_few_pictures_far_apart_is_not_certain() -> None:
    """Pictures of a codebook: all alike, or one entry turned over."""
    alike, apart = [31.0, 31.5, 30.8, 31.2] * 4, [100.0, 18.0, 19.0, 20.0] * 4
    assert np.mean(alike) - 0.2 < mean_low(alike) < np.mean(alike)
    assert np.mean(apart) > 39
    assert mean_low(apart) < 30
    random = np.random.default_rng(3)
    covered = [mean_low(random.normal(32, 2, 16)) <= 32 for _ in range(200)]
    assert 0.9 <= np.mean(covered) < 1


def test_pictures_with_the_errors_of_others_tell_of_jumps_alone() -> None:
    alike = [100.0] * 16
    assert worst_low(alike, 50.0) == 50.0
    assert worst_low(alike, 50.0, [100.0] * 239 + [24.9]) == pytest.approx(21.9)
    assert 25.0 < worst_low([*alike[1:], 26.0], 50.0, [100.0] * 239 + [29.5]) <= 26.0, "no deeper than was drawn"
    spread = [34.0, 35.0, 36.0, 33.5] * 4
    assert worst_low(spread, 50.0, [36.0] * 240) == worst_low(spread, 50.0), "they do not narrow the spread"
    assert worst_low(spread, 50.0, [25.0]) == worst_low([34.0, 35.0], 50.0, [25.0]) == 22.0


def test_few_pictures_that_jumped_do_not_tell_how_far_others_fall() -> None:
    alike = [100.0] * 15
    assert worst_low([*alike, 29.7], 34.0) == pytest.approx(19.7)
    assert worst_low([*alike, 95.0], 34.0) == 34.0, "over what counts, a fall says nothing"
    spread = [37.0 + 0.5 * (index % 5) for index in range(15)]
    assert worst_low([*spread, 33.0], 34.0) > 29.0
