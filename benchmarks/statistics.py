"""Times as percentiles, and whether two sets of them differ by more than their noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentedge.runtime.bundle import Array

#: Two medians whose ratio's interval holds 1 are "within noise"; the interval covers this share of resamples.
CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs: percentiles, and the spread (interquartile range over median)."""

    p50: float
    p90: float
    p99: float
    least: float
    spread: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """The summary of at least one run."""
        array = np.asarray(seconds, np.float64)
        p25, p50, p75, p90, p99 = (float(value) for value in np.percentile(array, (25, 50, 75, 90, 99)))
        return cls(p50, p90, p99, float(array.min()), (p75 - p25) / p50, len(array))


@dataclass(frozen=True)
class Ratio:
    """How many times faster ``new`` is than ``old``, with its interval."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "faster", "slower", or "within noise" where the interval holds 1."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "within noise"


def compare(old: Sequence[float], new: Sequence[float]) -> Ratio:
    """Ratio of the medians of two independent sets of times, with a bootstrap interval."""
    generator = np.random.default_rng(0)
    before, after = np.asarray(old, np.float64), np.asarray(new, np.float64)
    ratios = np.median(_resampled(before, generator), axis=1) / np.median(_resampled(after, generator), axis=1)
    return _ratio(float(np.median(before) / np.median(after)), ratios)


def compare_rounds(old: Sequence[float], new: Sequence[float]) -> Ratio:
    """Median of the ratios of times that were taken in the same rounds, so that drift of the machine cancels."""
    ratios = np.asarray(old, np.float64) / np.asarray(new, np.float64)
    return _ratio(float(np.median(ratios)), np.median(_resampled(ratios, np.random.default_rng(0)), axis=1))


def _resampled(values: Array, generator: np.random.Generator) -> Array:
    return values[generator.integers(0, len(values), (RESAMPLES, len(values)))]


def _ratio(ratio: float, resampled: Array) -> Ratio:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(value) for value in np.percentile(resampled, (tail, 100 - tail)))
    return Ratio(ratio, low, high)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log(seconds) over log(sizes): 1 where time grows as size does, 2 where it grows as its square."""
    return float(np.polyfit(np.log(np.asarray(sizes)), np.log(np.asarray(seconds)), 1)[0])
