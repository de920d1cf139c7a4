"""What a model's output means: epsilon, sample, v_prediction or flow; and limits on the denoised sample.

Formulas: Salimans & Ho 2022 (arXiv 2202.00512), appendix D, for v; Lipman et al. 2023 (arXiv 2210.02747) for flow.
All take and give float32 arrays of the sample's shape; scalars are float32, so that nothing is promoted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from latentedge.runtime.errors import UsageError
from latentedge.runtime.schedules import F32, Array, Config


def _unknown(kind: str) -> UsageError:
    known = "epsilon, v_prediction, sample or flow_prediction"
    return UsageError(f"prediction_type {kind!r} is unknown here", f"use {known}, as the model was trained")


def denoised_of(kind: str, sample: Array, output: Array, alpha: Any, sigma: Any) -> Array:
    """The x0 that the output implies for ``sample = alpha * x0 + sigma * noise``."""
    match kind:
        case "epsilon":
            return np.asarray((sample - sigma * output) / alpha)
        case "sample":
            return output
        case "v_prediction":
            return np.asarray(alpha * sample - sigma * output)
        case "flow_prediction":
            return np.asarray(sample - sigma * output)
    raise _unknown(kind)


def noise_of(kind: str, sample: Array, output: Array, alpha: Any, sigma: Any) -> Array:
    """The noise that the output implies for ``sample = alpha * x0 + sigma * noise``."""
    match kind:
        case "epsilon":
            return output
        case "sample":
            return np.asarray((sample - alpha * output) / sigma)
        case "v_prediction":
            return np.asarray(alpha * output + sigma * sample)
    raise _unknown(kind)


def denoised_at(kind: str, sample: Array, output: Array, sigma: Any) -> Array:
    """The x0 that the output implies for ``sample = x0 + sigma * noise``, the model seeing it scaled to variance 1."""
    match kind:
        case "epsilon":
            return np.asarray(sample - sigma * output)
        case "sample" | "original_sample":
            return output
        case "v_prediction":
            variance = np.square(sigma) + F32(1)
            return np.asarray(output * (-sigma / np.sqrt(variance)) + sample / variance)
    raise _unknown(kind)


def preconditioned(kind: str, sample: Array, output: Array, sigma: Any, data: float) -> Array:
    """The x0 that the output implies for ``sample = x0 + sigma * noise``, x0 having the standard deviation ``data``.

    Karras et al. 2022 (arXiv 2206.00364), table 1: the model sees the sample scaled to variance 1.
    """
    if kind not in ("epsilon", "v_prediction"):
        raise _unknown(kind)
    variance = np.square(sigma) + F32(data**2)
    out = sigma * F32(data) / np.sqrt(variance)
    return np.asarray(F32(data**2) / variance * sample + (out if kind == "epsilon" else -out) * output)


def limited(config: Config, denoised: Array, clip: bool = True) -> Array:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3) or clipping to a range, where the config asks for it."""
    if config.get("thresholding"):
        flat = np.abs(denoised.reshape(len(denoised), -1))
        bound = np.quantile(flat, config["dynamic_thresholding_ratio"], axis=1).astype(F32)
        bound = np.minimum(np.maximum(bound, F32(1)), F32(config["sample_max_value"]))
        bound = bound.reshape(-1, *[1] * (denoised.ndim - 1))
        return np.asarray(np.clip(denoised, -bound, bound) / bound)
    if clip and config.get("clip_sample"):
        reach = F32(config["clip_sample_range"])
        return np.asarray(np.clip(denoised, -reach, reach))
    return denoised
