"""Weights as symmetric INT8 with one scale for each output channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latentedge.calibration.ranges import LEVELS
from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import LatentEdgeError

#: Fractions of a channel's largest weight that clipping tries.
CLIPS = np.linspace(1.0, 0.7, 13, dtype=np.float32)


@dataclass(frozen=True)
class QuantisedWeight:
    """``levels`` int8 in the weight's own shape, ``scales`` float32 [channels] along ``axis``."""

    levels: Array
    scales: Array
    axis: int

    def dequantised(self) -> Array:
        """The weights that an engine computes with, float32."""
        shape = [1] * self.levels.ndim
        shape[self.axis] = -1
        return np.asarray(self.levels.astype(np.float32) * self.scales.reshape(shape))


def quantise_weight(
    weight: Array, channel_axis: int, input_axis: int, power: Array | None = None, *, clip: bool = True
) -> QuantisedWeight:
    """Quantise ``weight``; with ``clip`` each channel's range minimises the squared error of the layer's output.

    That error is estimated as the sum over input channels of ``power`` (the mean square of the activation, [inputs])
    times the squared error of the weights, which holds for activations whose channels are uncorrelated. Without
    ``power`` every input counts the same. A channel of zeros gets the scale 1/127. NaN and infinite weights raise
    :class:`LatentEdgeError`.
    """
    if not np.isfinite(weight).all():
        raise LatentEdgeError("a weight is NaN or infinite; the model cannot be quantised.")
    rows = np.moveaxis(np.asarray(weight, np.float32), channel_axis, 0)
    shape = rows.shape
    importance = _importance(weight, channel_axis, input_axis, power)
    rows = rows.reshape(shape[0], -1)
    amax = np.abs(rows).max(axis=1)
    amax = np.where(amax == 0, np.float32(1), np.maximum(amax, np.finfo(np.float32).tiny * LEVELS))
    chosen = amax.copy()
    if clip:
        least = np.full(shape[0], np.inf, np.float32)
        for fraction in CLIPS:
            loss = _weighted_error(rows, amax * fraction, importance)
            better = loss < least
            chosen = np.where(better, amax * fraction, chosen)
            least = np.where(better, loss, least)
    scales = (chosen / LEVELS).astype(np.float32)
    levels = np.clip(np.rint(rows / scales[:, None]), -LEVELS, LEVELS).astype(np.int8).reshape(shape)
    return QuantisedWeight(np.ascontiguousarray(np.moveaxis(levels, 0, channel_axis)), scales, channel_axis)


def _weighted_error(rows: Array, amax: Array, importance: Array) -> Array:
    scales = (amax / LEVELS)[:, None]
    error = np.clip(np.rint(rows / scales), -LEVELS, LEVELS)
    error *= scales
    error -= rows
    return np.asarray(np.einsum("ij,ij,j->i", error, error, importance, optimize=False))


def _importance(weight: Array, channel_axis: int, input_axis: int, power: Array | None) -> Array:
    """How much each column of the weight seen as [outputs, everything else] counts, float32."""
    sides = list(weight.shape)
    shape = [1] * weight.ndim
    shape[input_axis] = sides[input_axis]
    values = np.ones(sides[input_axis]) if power is None else np.asarray(power, np.float64)
    if values.size != sides[input_axis] or not values.max(initial=0.0) > 0:
        values = np.ones(sides[input_axis])
    sides[channel_axis] = 1
    spread = np.broadcast_to((values / values.max()).reshape(shape), sides)
    return np.ascontiguousarray(np.moveaxis(spread, channel_axis, 0).reshape(-1), np.float32)
