"""The measure of parity itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from latentedge.runtime.parity import compare


def test_psnr_against_the_formula() -> None:
    reference = np.array([[1.0, -4.0], [2.0, 0.0]], np.float32)
    found = compare(reference, reference + np.array([[0.1, -0.1], [0.1, -0.1]], np.float32))
    assert found.psnr_db == pytest.approx(20 * math.log10(4 / 0.1), abs=1e-4)
    assert found.max_abs_error == pytest.approx(0.1, rel=1e-5)
    assert found.peak == 4.0


def test_identical_and_zero() -> None:
    zeros = np.zeros(3, np.float32)
    assert compare(zeros, zeros).psnr_db == 200.0
    assert compare(zeros, zeros + 1).psnr_db == -200.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_and_never_pass(value: float) -> None:
    reference = np.ones(4, np.float32)
    computed = reference.copy()
    computed[2] = value
    found = compare(reference, computed)
    assert found.not_finite == 1
    assert found.psnr_db < 0
    assert "1 values that are NaN or infinite" in found.describe()
    assert math.isfinite(found.max_abs_error)


def test_the_worse_of_two() -> None:
    ones = np.ones(4, np.float32)
    good, bad = compare(ones, ones * 1.001), compare(ones, ones * 1.1)
    assert good.worse_of(bad) == bad.worse_of(good)
    assert good.worse_of(bad).psnr_db == bad.psnr_db


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        compare(np.zeros((2, 3)), np.zeros((3, 2)))
