"""Measures the systematic part of the quantised denoiser's error by timestep, for the sampler to take out (PTQD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from latentedge.calibration.metrics import sqnr
from latentedge.runtime.bundle import Array
from latentedge.runtime.correction import Correction

#: Timesteps are gathered into at most so many groups, so that one picture does not decide.
GROUPS = 6
#: Decibels that the correction must gain on outputs that it was not fitted to.
WORTHWHILE_DB = 0.05


def fit(timesteps: Sequence[float], references: Sequence[Array], outputs: Sequence[Array]) -> dict[str, Any]:
    """Gain, bias by channel and residual variance by timestep, as lists for the manifest.

    The gain is the least-squares slope of the fp32 output on the quantised one, within channels: the part of the error
    that is correlated with the output. The residual variance is what remains, which no sampler can take out.
    """
    order = np.argsort(timesteps, kind="stable")
    groups = [group for group in np.array_split(order, min(GROUPS, len(order))) if group.size]
    record: dict[str, Any] = {"timesteps": [], "gain": [], "bias": [], "residual_variance": []}
    for group in groups:
        wanted = _by_channel([references[index] for index in group])
        found = _by_channel([outputs[index] for index in group])
        middle_wanted, middle_found = wanted.mean(axis=1), found.mean(axis=1)
        spread = found - middle_found[:, None]
        power = float(np.square(spread).sum())
        gain = float(np.sum(spread * (wanted - middle_wanted[:, None])) / power) if power > 0 else 1.0
        bias = middle_wanted - gain * middle_found
        residual = wanted - gain * found - bias[:, None]
        record["timesteps"].append(float(np.mean([timesteps[index] for index in group])))
        record["gain"].append(gain)
        record["bias"].append([float(value) for value in bias])
        record["residual_variance"].append(float(np.mean(np.square(residual))))
    return record


def measured_fit(
    timesteps: Sequence[float], references: Sequence[Array], outputs: Sequence[Array]
) -> dict[str, Any] | None:
    """A correction from all outputs; ``sqnr_db_gained``: the decibels that one from half of them gains on the others.

    ``None`` where there are fewer than four outputs, or one that is not finite.
    """
    if len(references) < 4 or not all(np.isfinite(output).all() for output in (*outputs, *references)):
        return None
    record = fit(timesteps[0::2], references[0::2], outputs[0::2])
    correction = Correction(*(np.asarray(record[name], np.float64) for name in ("timesteps", "gain", "bias")))
    held = list(zip(timesteps[1::2], references[1::2], outputs[1::2], strict=True))
    gains = [sqnr(wanted, correction(found, step)) - sqnr(wanted, found) for step, wanted, found in held]
    return {**fit(timesteps, references, outputs), "sqnr_db_gained": float(np.mean(gains))}


def _by_channel(arrays: Sequence[Array]) -> Array:
    """Arrays ``[N, C, h, w]`` as float64 ``[C, values]``."""
    return np.concatenate(
        [np.moveaxis(array.astype(np.float64), 1, 0).reshape(array.shape[1], -1) for array in arrays], axis=1
    )
