"""Samplers of models with the preconditioning of Karras et al. 2022 (EDM): Euler; DPM-Solver++ is in dpm_solver."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from latentedge.runtime.errors import UsageError
from latentedge.runtime.parametrisation import preconditioned
from latentedge.runtime.samplers.base import Call, Update
from latentedge.runtime.samplers.euler import churned
from latentedge.runtime.samplers.plans import Plan, final_sigma
from latentedge.runtime.schedules import F32, Config, exp32, linspace, log32


def edm_plan(config: Config, steps: int) -> Plan:
    """Karras et al. 2022 (arXiv 2206.00364), equation 5, or sigmas even in their logarithm; timesteps ln(sigma) / 4."""
    high, low, rho = float(config["sigma_max"]), float(config["sigma_min"]), float(config["rho"])
    euler = config["_class_name"] == "EDMEulerScheduler"
    match config["sigma_schedule"]:
        case "karras":
            kind: Any = np.float64 if euler else F32  # the precision in which each reference class computes
            ends = kind(high ** (1 / rho)), kind(low ** (1 / rho) - high ** (1 / rho))
            ramp = (ends[0] + linspace(0, 1, steps, kind) * ends[1]).astype(np.float64)
            sigmas = (ramp**rho).astype(F32)
        case "exponential":
            sigmas = exp32(linspace(math.log(low), math.log(high), steps))[::-1]
        case other:
            raise UsageError(f"sigma_schedule {other!r} is unknown", "use karras or exponential")
    timesteps = F32(0.25) * log32(sigmas)
    sigmas = np.append(sigmas, F32(final_sigma(config, sigmas[-1] if euler else low)))
    start = (high**2 + 1) ** 0.5
    return Plan(config, steps, timesteps, sigmas, start, "sigma", tables={"sigma_data": float(config["sigma_data"])})


def edm_euler(call: Call) -> Update:
    """Karras et al. 2022, algorithm 2 without the correction, with the preconditioning of its table 1."""
    sample, sigma_hat = churned(call, call.sigma)
    denoised = preconditioned(call.kind, sample, call.output, sigma_hat, call.plan.tables["sigma_data"])
    return call.done(sample + (sample - denoised) / sigma_hat * (call.sigma_next - sigma_hat), denoised)
