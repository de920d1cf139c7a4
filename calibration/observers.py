"""Statistics of one activation over a trajectory: streaming, of fixed size, and exactly mergeable.

A tensor's magnitudes are counted in bins that are cut at fixed places of the float32 number line: the exponent and the
six highest bits of the mantissa, 64 bins for each octave. No range has to be known beforehand, and adding two sets of
integer counts gives exactly what one run over both would have counted. Squares of channels are summed as integers in
units of :data:`SUM_UNIT` for the same reason: adding integers is associative, adding floats is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import LatentEdgeError

#: Mantissa bits of a bin, hence bins in each octave.
MANTISSA_BITS = 6
_SHIFT = 23 - MANTISSA_BITS
#: One bin for each combination of the exponent and the kept mantissa bits.
BINS = 1 << (8 + MANTISSA_BITS)
#: Bins from here on hold infinities and NaN.
FIRST_NOT_FINITE = 255 << MANTISSA_BITS
#: Values that are counted at once.
PIECE = 1 << 17
#: What one unit of the integer sums stands for.
SUM_UNIT = 2.0**-20
#: Largest float16: what lies above cannot be held by an engine that computes in float16.
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Fault:
    """An activation that cannot be calibrated as it is: ``kind`` is "zero", "not finite" or "huge"."""

    tensor: str
    kind: str
    timestep: float
    detail: str

    def __str__(self) -> str:
        return f"{self.tensor} at timestep {self.timestep:g}: {self.detail}"


@dataclass
class TensorStatistics:
    """What was seen of one activation.

    ``counts`` int64 [BINS] of magnitudes; ``channel_amax`` float32 [C] of finite values; ``channel_squares`` int64 [C]
    in units of :data:`SUM_UNIT`; ``values`` the number of values in each channel; ``amax`` by timestep; ``not_finite``
    the number of NaN and infinite values by timestep.
    """

    counts: Array
    channel_amax: Array
    channel_squares: Array
    values: int = 0
    amax: dict[float, float] = field(default_factory=dict)
    not_finite: dict[float, int] = field(default_factory=dict)

    @classmethod
    def empty(cls, channels: int) -> TensorStatistics:
        """Nothing seen yet of an activation with ``channels`` features."""
        return cls(np.zeros(BINS, np.int64), np.zeros(channels, np.float32), np.zeros(channels, np.int64))

    def observe(self, array: Array, feature_axis: int, timestep: float) -> None:
        """Add one activation, float32 or float16 of any shape with features on ``feature_axis``."""
        array = np.ascontiguousarray(array, np.float32)
        counts = _counted(array)
        missing = int(counts[FIRST_NOT_FINITE:].sum())
        if missing:
            array = np.where(np.isfinite(array), array, np.float32(0))
        axis = feature_axis % array.ndim
        channels = array.shape[axis]
        # Pictures [N, C, h, w] as N times [C, values], rows of features [N, tokens, C] as one [values, C].
        last = axis == array.ndim - 1
        blocks = (
            [array.reshape(-1, channels)] if last else array.reshape(-1, channels, math.prod(array.shape[axis + 1 :]))
        )
        amax = np.zeros(channels, np.float32)
        squares = np.zeros(channels)
        for block in blocks:
            values = 0 if last else 1
            amax = np.maximum(amax, np.maximum(block.max(axis=values), -block.min(axis=values)))
            # float32 holds the squares of magnitudes up to 1e15 and is twice as fast.
            precise = block.astype(np.float64) if amax.max() > 1e15 else block
            squares += np.einsum("ij,ij->j" if last else "ij,ij->i", precise, precise)
        self.counts += counts
        self.channel_amax = np.maximum(self.channel_amax, amax)
        self.channel_squares += _as_units(squares)
        self.values += array.size // channels
        self.amax[timestep] = max(self.amax.get(timestep, 0.0), float(amax.max()))
        if missing:
            self.not_finite[timestep] = self.not_finite.get(timestep, 0) + missing

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """What one run over both would have seen, exactly."""
        if self.channel_amax.shape != other.channel_amax.shape:
            raise LatentEdgeError(
                f"statistics of {self.channel_amax.size} and {other.channel_amax.size} channels cannot be merged."
            )
        return TensorStatistics(
            self.counts + other.counts,
            np.maximum(self.channel_amax, other.channel_amax),
            self.channel_squares + other.channel_squares,
            self.values + other.values,
            {step: max(self.amax.get(step, 0.0), other.amax.get(step, 0.0)) for step in {**self.amax, **other.amax}},
            {
                step: self.not_finite.get(step, 0) + other.not_finite.get(step, 0)
                for step in {**self.not_finite, **other.not_finite}
            },
        )

    @property
    def largest(self) -> float:
        """The largest finite magnitude."""
        return float(self.channel_amax.max(initial=0.0))

    def channel_power(self) -> Array:
        """Mean square of each channel, float64 [C]."""
        return np.asarray(self.channel_squares * (SUM_UNIT / max(self.values, 1)))

    def faults(self, tensor: str) -> list[Fault]:
        """What makes this activation unfit, with the first timestep at which it was seen."""
        found = [
            Fault(tensor, "not finite", step, f"{number} values are NaN or infinite")
            for step, number in sorted(self.not_finite.items(), reverse=True)[:1]
        ]
        huge = [step for step, amax in self.amax.items() if amax > LARGEST_HALF]
        if huge:
            step = max(huge)
            found.append(Fault(tensor, "huge", step, f"magnitude {self.amax[step]:.4g} is over {LARGEST_HALF:g}"))
        if self.amax and self.largest == 0:
            found.append(Fault(tensor, "zero", max(self.amax), "every value is zero, at every timestep"))
        return found


@cache
def _scratch() -> Array:
    """Where bins are computed, a piece of an activation at a time: fresh memory for each costs more than the counting."""
    return np.empty(PIECE, np.intp)


def _counted(array: Array) -> Array:
    """How many magnitudes of a contiguous float32 array fall into each bin, int64 [BINS]."""
    bits = array.reshape(-1).view(np.uint32)
    counts = np.zeros(BINS, np.int64)
    for start in range(0, bits.size, PIECE):
        piece = bits[start : start + PIECE]
        bins = _scratch()[: piece.size]
        np.bitwise_and(piece, np.uint32(0x7FFFFFFF), out=bins)
        np.right_shift(bins, _SHIFT, out=bins)
        counts += np.bincount(bins, minlength=BINS)
    return counts


def _as_units(values: Array) -> Array:
    """Float64 sums as whole units; sums that int64 cannot hold count as its largest quarter, so that adding is safe."""
    limit = 2.0**53
    return np.rint(np.clip(values / SUM_UNIT, -limit, limit)).astype(np.int64)


def bin_values() -> Array:
    """The magnitude in the middle of every finite bin, float64 [FIRST_NOT_FINITE]."""
    edges = (np.arange(FIRST_NOT_FINITE + 1, dtype=np.uint32) << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)
    edges[-1] = float(np.finfo(np.float32).max)
    middle = (edges[:-1] + edges[1:]) / 2
    middle[0] = 0.0
    return np.asarray(middle)


def merge_all(parts: list[Mapping[str, TensorStatistics]]) -> dict[str, TensorStatistics]:
    """Merge the statistics of several runs by tensor; the order of the runs does not change the result."""
    merged: dict[str, TensorStatistics] = {}
    for part in parts:
        for name, statistics in part.items():
            merged[name] = merged[name].merge(statistics) if name in merged else statistics
    return merged
