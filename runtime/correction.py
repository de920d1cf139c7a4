"""Takes out of a quantised denoiser's output what calibration found to be systematic (arXiv:2305.10657, PTQD)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentedge.runtime.bundle import Array, Manifest


@dataclass(frozen=True)
class Correction:
    """``output * gain + bias``, interpolated between timesteps.

    ``timesteps`` [K] ascending, ``gain`` [K], ``bias`` [K, C], all float. The least-squares estimate of the fp32 output.
    """

    timesteps: Array
    gain: Array
    bias: Array

    def __call__(self, output: Array, timestep: float) -> Array:
        """The corrected output, float32 ``[N, C, h, w]``; guidance may have been applied to it before."""
        gain = np.interp(timestep, self.timesteps, self.gain)
        bias = np.array([np.interp(timestep, self.timesteps, channel) for channel in self.bias.T])
        channels = output.shape[1] if bias.size == 1 else bias.size
        return np.asarray(output * gain + np.broadcast_to(bias, channels)[:, None, None], np.float32)


def correction_of(manifest: Manifest, precision: str) -> Correction | None:
    """The correction that was measured to help in ``precision``, or ``None``; one with ``applied`` false was not."""
    records: dict[str, Any] = manifest.calibration.get("correction", {})
    record = records.get(precision)
    if not record or not record.get("applied", True):
        return None
    arrays = (np.asarray(record[name], np.float64) for name in ("timesteps", "gain", "bias"))
    return Correction(*arrays)


def corrected(
    model: Callable[[Array, float], Array], manifest: Manifest, precision: str
) -> Callable[[Array, float], Array]:
    """``model`` with the correction for ``precision``; ``model`` itself where there is none."""
    correction = correction_of(manifest, precision)
    if correction is None:
        return model
    return lambda sample, timestep: correction(model(sample, timestep), timestep)
