"""From an activation's statistics to the magnitude that INT8's 127 stands for: four rules, and the choice of a scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from latentedge.calibration.observers import FIRST_NOT_FINITE, TensorStatistics, bin_values
from latentedge.runtime.bundle import Array

FLOAT32: np.dtype[Any] = np.dtype(np.float32)
#: Largest level of symmetric INT8.
LEVELS = 127
#: Fractions of the largest magnitude that the MSE and entropy rules try, from no clipping to an eighth.
CLIPS = np.geomspace(1.0, 0.125, 49)
#: Fraction of values that the percentile rule leaves unclipped.
PERCENTILE = 0.9999


@cache
def _values() -> Array:
    return bin_values()


def absolute_maximum(statistics: TensorStatistics) -> float:
    """The largest finite magnitude: nothing is clipped."""
    return statistics.largest


def percentile(statistics: TensorStatistics, fraction: float = PERCENTILE) -> float:
    """The magnitude that ``fraction`` of all values do not exceed (to the width of a bin)."""
    counts = statistics.counts[:FIRST_NOT_FINITE]
    total = int(counts.sum())
    if total == 0:
        return 0.0
    index = int(np.searchsorted(np.cumsum(counts), fraction * total))
    return float(min(_values()[index], statistics.largest))


def smallest_error(statistics: TensorStatistics) -> float:
    """The magnitude that minimises the mean squared error of rounding and clipping."""
    return _best(statistics, mean_squared_error)


def least_entropy(statistics: TensorStatistics) -> float:
    """The magnitude whose quantised distribution diverges least from the original's (Kullback-Leibler).

    As in TensorRT's entropy calibration: the clipped tail counts into the last bin of the reference, and each of the
    128 levels spreads its mass evenly over the values that it stands for.
    """
    return _best(statistics, divergence)


#: The rules by name.
OBSERVERS: dict[str, Callable[[TensorStatistics], float]] = {
    "absmax": absolute_maximum,
    "percentile": percentile,
    "mse": smallest_error,
    "entropy": least_entropy,
}


def scale_of(amax: float, dtype: np.dtype[Any] = FLOAT32) -> float:
    """The scale for a magnitude: positive, finite and normal in ``dtype``, whatever ``amax`` is.

    An activation that is zero everywhere gets 1/127; it stays zero. NaN and infinite magnitudes are a caller's error.
    """
    if not np.isfinite(amax) or amax < 0:
        raise ValueError(f"a magnitude must be finite and not negative, found {amax}")
    limits = np.finfo(dtype)
    scale = (amax or 1.0) / LEVELS
    return float(dtype.type(np.clip(scale, float(limits.tiny), float(limits.max))))


def mean_squared_error(counts: Array, values: Array, amax: float) -> float:
    """Expected squared error of symmetric INT8 with range ``amax`` for magnitudes ``values`` that occur ``counts`` times.

    Values under half a step become zero, values over ``amax`` become ``amax``, and between them the error is that of
    uniform rounding, step^2 / 12.
    """
    step = amax / LEVELS
    error = np.where(values < step / 2, values**2, step**2 / 12)
    error = np.where(values > amax, (values - amax) ** 2, error)
    return float(counts @ error)


def divergence(counts: Array, values: Array, amax: float) -> float:
    """Kullback-Leibler divergence of the quantised distribution from the clipped original."""
    inside = values <= amax
    if not inside.any():
        return float("inf")
    reference = counts[inside].astype(np.float64)
    reference[-1] += counts[~inside].sum()
    level = np.minimum(np.rint(values[inside] * (LEVELS / amax)).astype(np.int64), LEVELS)
    occupied = counts[inside] > 0
    mass = np.bincount(level, counts[inside], minlength=LEVELS + 1)
    places = np.bincount(level, occupied, minlength=LEVELS + 1)
    quantised = np.where(occupied, mass[level] / np.maximum(places[level], 1), 0.0)
    total, kept = reference.sum(), quantised.sum()
    if kept == 0:
        return float("inf")
    used = reference > 0
    share = np.maximum(quantised[used] / kept, 1e-12)
    return float(np.sum(reference[used] / total * np.log(reference[used] / total / share)))


def _best(statistics: TensorStatistics, loss: Callable[[Array, Array, float], float]) -> float:
    largest = statistics.largest
    counts = statistics.counts[:FIRST_NOT_FINITE]
    present = np.flatnonzero(counts)
    if largest == 0 or present.size == 0:
        return largest
    counts, values = counts[present], np.minimum(_values()[present], largest)
    losses = [loss(counts, values, float(largest * clip)) for clip in CLIPS]
    return float(largest * CLIPS[int(np.argmin(losses))])
