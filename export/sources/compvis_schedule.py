"""The noise schedule of a CompVis model, with diffusers' field names and ``dialect`` "compvis"."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentedge.export.sources.checkpoint import Checkpoint
from latentedge.export.sources.compvis_config import DiffusionConfig
from latentedge.runtime.errors import UsageError

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
#: Relative difference from the formula up to which a stored float32 table counts as the formula's, and for halves.
SAME = 2e-6
SAME_IN_HALF = 5e-3

Table = NDArray[np.float64]


def formula_betas(config: DiffusionConfig) -> Table:
    """Float64 [timesteps], as ``make_beta_schedule`` of CompVis/latent-diffusion defines the names."""
    count, start, end = config.timesteps, config.linear_start, config.linear_end
    if config.given_betas is not None:
        return np.asarray(config.given_betas, np.float64)
    match config.beta_schedule:
        case "linear":
            return np.linspace(start**0.5, end**0.5, count) ** 2
        case "sqrt_linear":
            return np.linspace(start, end, count)
        case "sqrt":
            return np.linspace(start, end, count) ** 0.5
        case "cosine":
            angles = (np.arange(count + 1) / count + config.cosine_s) / (1 + config.cosine_s) * math.pi / 2
            alphas = np.cos(angles) ** 2
            return np.asarray(np.clip(1 - alphas[1:] / alphas[:-1], 0, 0.999))
    raise UsageError(
        f"beta_schedule {config.beta_schedule!r} is unknown.", hint="use linear, cosine, sqrt_linear or sqrt."
    )


def schedule_of(config: DiffusionConfig, checkpoint: Checkpoint) -> tuple[dict[str, object], tuple[str, ...]]:
    """Scheduler fields, and messages. The checkpoint's own tables win over the YAML's formula, as in the original."""
    if config.parameterization not in PREDICTION_TYPES:
        raise UsageError(
            f"parameterization {config.parameterization!r} is unknown.", hint=f"use {', '.join(PREDICTION_TYPES)}."
        )
    schedule: dict[str, object] = {
        "_class_name": "DDIMScheduler",
        "dialect": "compvis",
        "num_train_timesteps": config.timesteps,
        "prediction_type": PREDICTION_TYPES[config.parameterization],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    stored = _stored_betas(config, checkpoint)
    messages = []
    if stored is not None:
        messages.append("the checkpoint's noise schedule is not the YAML's formula: the checkpoint's is used")
        schedule |= {"trained_betas": [float(value) for value in stored], "beta_schedule": "linear"}
    else:
        schedule |= _named_betas(config)
    if config.v_posterior:
        messages.append(f"v_posterior {config.v_posterior} is not supported: ancestral sampling uses 0")
    return schedule, tuple(messages)


def _named_betas(config: DiffusionConfig) -> dict[str, Any]:
    names = {"linear": "scaled_linear", "sqrt_linear": "linear"}
    if config.given_betas is None and config.beta_schedule in names:
        return {
            "beta_schedule": names[config.beta_schedule],
            "beta_start": config.linear_start,
            "beta_end": config.linear_end,
        }
    betas = formula_betas(config).astype(np.float32)
    return {"trained_betas": [float(value) for value in betas], "beta_schedule": "linear"}


def _stored_betas(config: DiffusionConfig, checkpoint: Checkpoint) -> Table | None:
    """Betas of the checkpoint's ``alphas_cumprod``, the table that samplers read, unless the formula gives the same."""
    if "alphas_cumprod" not in checkpoint.shapes:
        return None
    found = checkpoint.tensor("alphas_cumprod").double().numpy()
    if len(found) != config.timesteps:
        raise UsageError(
            f"the YAML has {config.timesteps} timesteps, the checkpoint's schedule {len(found)}.",
            hint="set timesteps as the model was trained.",
        )
    expected = np.cumprod(1 - formula_betas(config))
    in_half = checkpoint.dtypes["alphas_cumprod"].itemsize < 4
    # Halves below their normal range keep few digits.
    tolerance = SAME_IN_HALF * expected + 1e-6 if in_half else SAME * expected + 1e-12
    if bool((np.abs(found - expected) <= tolerance).all()):
        return None
    previous = np.concatenate([[1.0], found[:-1]])
    return np.asarray(1 - found / np.maximum(previous, np.finfo(np.float32).tiny))
