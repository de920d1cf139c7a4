"""The noise schedule of a CompVis model, with diffusers' field names and ``dialect`` "compvis"."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentedge.export.sources.checkpoint import Checkpoint
from latentedge.export.sources.compvis_config import DiffusionConfig
from latentedge.runtime.errors import LatentEdgeError, UsageError
from latentedge.runtime.samplers.compvis import ancestral_tables

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
#: Relative difference from the formula up to which a stored float32 table counts as the formula's.
SAME = 2e-6
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
    stored, messages = _stored_betas(config, checkpoint)
    schedule |= _named_betas(config)
    ancestral = _ancestral_tables(config, checkpoint) if stored is not None or config.v_posterior else None
    if ancestral is not None:
        schedule["ancestral_tables"] = ancestral
        stored = formula_betas(config) if stored is None else stored
    elif config.v_posterior:
        messages.append(f"v_posterior {config.v_posterior} is not used: the ancestral tables are not finite")
    if stored is not None:
        schedule["trained_betas"] = [float(value) for value in stored]
    return schedule, tuple(messages)


def _named_betas(config: DiffusionConfig) -> dict[str, Any]:
    names = {"linear": "scaled_linear", "sqrt_linear": "linear"}
    if config.given_betas is None and config.beta_schedule in names:
        return {
            "beta_schedule": names[config.beta_schedule],
            "beta_start": config.linear_start,
            "beta_end": config.linear_end,
        }
    return {"trained_betas": [float(value) for value in formula_betas(config)], "beta_schedule": "linear"}


def _ancestral_tables(config: DiffusionConfig, checkpoint: Checkpoint) -> dict[str, list[float]] | None:
    """What the original's ancestral sampling reads: the checkpoint's tables, and the formula's for those that it lacks.

    None where that is what the betas give anyway, or where a table is not finite.
    """
    betas = formula_betas(config)
    tables = ancestral_tables(betas)
    held = [name for name in tables if checkpoint.shapes.get(name) == (config.timesteps,)]
    if not held and not config.v_posterior:
        return None
    log_variance = tables["posterior_log_variance_clipped"]
    variance = (1 - config.v_posterior) * np.exp(log_variance) + config.v_posterior * betas
    tables["posterior_log_variance_clipped"] = np.log(np.maximum(variance, 1e-20))
    tables |= {name: table.double().numpy() for name, table in checkpoint.read(held).items()}
    if not all(bool(np.isfinite(table).all()) for table in tables.values()):
        return None
    return {name: table.tolist() for name, table in tables.items()}


def _check_table(found: Table) -> None:
    """``LatentEdgeError`` where the table is no cumulative product of numbers from 0 to 1."""
    reason = None
    if not bool(np.isfinite(found).all()):
        reason = f"{int((~np.isfinite(found)).sum())} of its {len(found)} numbers are NaN or infinite"
    elif found.min() < 0 or found.max() > 1:
        reason = f"its numbers go from {found.min():.4g} to {found.max():.4g}"
    elif bool((np.diff(found) > 0).any()):
        reason = f"it rises at timestep {int((np.diff(found) > 0).argmax()) + 1}"
    if reason is not None:
        raise LatentEdgeError(
            f"the checkpoint's alphas_cumprod is no noise schedule: {reason}; expected numbers from 1 to 0 that never "
            "rise.",
            hint="the file is damaged; without its alphas_cumprod the YAML's formula is used.",
        )


def _rounded_message(config: DiffusionConfig, dtype: torch.dtype) -> str:
    named = "trained_betas" not in _named_betas(config)
    exact = (
        'generate(schedule={**pipeline.bundle.schedule, "trained_betas": None}) samples with the YAML\'s formula'
        if named
        else "a file without alphas_cumprod is exported with the YAML's formula"
    )
    return (
        f"this file's noise schedule was rounded to {str(dtype).removeprefix('torch.')}; the original samples with it, "
        f"so the bundle does: {exact}"
    )


def _stored_betas(config: DiffusionConfig, checkpoint: Checkpoint) -> tuple[Table | None, list[str]]:
    """Betas of the checkpoint's ``alphas_cumprod``, the table that samplers read, and messages.

    None where the formula gives the same table, and where rounding left one that the original's samplers divide by
    zero with.
    """
    if "alphas_cumprod" not in checkpoint.shapes:
        return None, []
    if (shape := checkpoint.shapes["alphas_cumprod"]) != (config.timesteps,):
        raise UsageError(
            f"the YAML has {config.timesteps} timesteps, the checkpoint's schedule {', '.join(map(str, shape)) or 1}.",
            hint="set timesteps as the model was trained.",
        )
    found = checkpoint.tensor("alphas_cumprod").double().numpy()
    _check_table(found)
    expected = np.cumprod(1 - formula_betas(config))
    if bool((np.abs(found - expected) <= SAME * expected + 1e-12).all()):
        return None, []
    dtype = checkpoint.dtypes["alphas_cumprod"]
    rounded = torch.from_numpy(expected).float().to(dtype).double().numpy()
    if dtype.itemsize >= 4 or bool((np.abs(found - rounded) > torch.finfo(dtype).eps * rounded).any()):
        message = "the checkpoint's noise schedule is not the YAML's formula: the checkpoint's is used"
    elif found[1] == 1.0:
        # DDIM and PLMS always visit timestep 1 and divide by 1 - alphas_cumprod.
        name = str(dtype).removeprefix("torch.")
        message = (
            f"the checkpoint's noise schedule was rounded to {name} until it begins without noise, with which the "
            "original draws NaN: the YAML's formula is used"
        )
        return None, [message]
    else:
        message = _rounded_message(config, dtype)
    previous = np.concatenate([[1.0], found[:-1]])
    return np.asarray(1 - found / np.maximum(previous, np.finfo(np.float32).tiny)), [message]
