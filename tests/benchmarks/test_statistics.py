"""Percentiles, verdicts and exponents on times whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from latentedge.benchmarks.statistics import Times, compare, compare_rounds, exponent


def noisy(median: float, count: int, seed: int, spread: float = 0.02) -> list[float]:
    return list(median * (1 + spread * np.random.default_rng(seed).standard_normal(count)))


def test_percentiles_of_a_ramp() -> None:
    times = Times.of([float(value) for value in range(101)])
    assert (times.p50, times.p90, times.p99, times.least, times.count) == (50, 90, 99, 0, 101)
    assert times.spread == 1.0  # from 25 to 75, over 50


def test_a_tenth_is_seen_and_noise_is_not() -> None:
    assert compare(noisy(1.1, 40, 0), noisy(1.0, 40, 1)).verdict == "faster"
    assert compare(noisy(1.0, 40, 0), noisy(1.1, 40, 1)).verdict == "slower"
    same = compare(noisy(1.0, 40, 0), noisy(1.0, 40, 1))
    assert same.verdict == "within noise"
    assert same.low < 1 < same.high


def test_shared_rounds_cancel_drift() -> None:
    """The machine slows down threefold during the measurement: only the ratios within rounds still tell."""
    drift = np.linspace(1, 3, 30)
    old, new = drift * noisy(1.05, 30, 0, 0.01), drift * noisy(1.0, 30, 1, 0.01)
    assert compare(list(old), list(new)).verdict == "within noise"
    paired = compare_rounds(list(old), list(new))
    assert paired.verdict == "faster"
    assert paired.ratio == pytest.approx(1.05, abs=0.01)


def test_exponent_of_a_square() -> None:
    sizes = [16, 32, 64, 128]
    assert exponent(sizes, [3 * size**2 for size in sizes]) == pytest.approx(2)
