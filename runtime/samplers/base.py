"""What an integrator is given for one model evaluation, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from latentedge.runtime.noise import NoiseStream, Recorded
from latentedge.runtime.samplers.plans import Plan
from latentedge.runtime.schedules import F32, Array, Config


class Draws:
    """The noise of a run: each call gives the next N(0, 1) array of the sample's shape, float32."""

    def __init__(self, noise: Any, shape: tuple[int, ...], taken: int) -> None:
        self.taken, self._shape = 0, shape
        noise = NoiseStream("torch", 0) if noise is None else noise
        noise = Recorded(noise) if isinstance(noise, np.ndarray) else noise
        #: The draws are replayed, so they are used as they are.
        self.recorded = bool(getattr(noise, "recorded", False))
        method = "standard_normal" if isinstance(noise, np.random.Generator) else "normal"
        self._next: Callable[[tuple[int, ...]], Array] = getattr(noise, method, noise)
        for _ in range(taken):  # to where the saved step had left the stream
            self()

    def __call__(self) -> Array:
        """The next draw."""
        self.taken += 1
        return np.asarray(self._next(self._shape), F32)


# One of each of these is made between two evaluations, when the caches hold the network: hence what is cheap to make.
class History(NamedTuple):
    """What a sampler remembers between evaluations; bounded, never changed in place, so a saved one stays valid."""

    calls: int = 0  # evaluations since the loop began, which is not the index in a partial loop
    draws: int = 0  # noise draws since the loop began
    outputs: tuple[Array, ...] = ()  # converted model outputs, newest last
    sample: Array | None = None  # the sample that a step of several evaluations began from
    partial: Array | None = None  # a sum or a draw that the next evaluation completes

    def keep(self, output: Array, count: int) -> tuple[Array, ...]:
        """The last ``count`` outputs, ``output`` included."""
        return (*self.outputs, output)[-count:]


class Update(NamedTuple):
    """The result of one evaluation: the next sample, the denoised sample it saw, and what to remember."""

    latents: Array
    denoised: Array
    history: History


@dataclass(slots=True)
class Call:
    """One evaluation: ``output`` is what the model gave for ``latents`` at ``index`` of the plan."""

    plan: Plan
    index: int
    latents: Array
    output: Array
    history: History
    eta: float
    draw: Draws

    @property
    def config(self) -> Config:
        """The schedule's fields, completed."""
        return self.plan.config

    @property
    def kind(self) -> str:
        """What the model predicts: the config's prediction_type."""
        return str(self.plan.config["prediction_type"])

    @property
    def sigma(self) -> Any:
        """The plan's sigma at this index, float32."""
        return self.plan.sigmas[self.index]

    @property
    def sigma_next(self) -> Any:
        """The plan's sigma at the next index, float32."""
        return self.plan.sigmas[self.index + 1]

    @property
    def timestep(self) -> int:
        """This evaluation's training timestep, for plans of whole timesteps."""
        return int(self.plan.timesteps[self.index])

    @property
    def next_timestep(self) -> int:
        """The next entry of the plan, or -1 after the last."""
        return int(self.plan.timesteps[self.index + 1]) if not self.last else -1

    @property
    def last(self) -> bool:
        """Whether no evaluation follows."""
        return self.index == len(self.plan.timesteps) - 1

    def alpha(self, timestep: int) -> Any:
        """alphas_cumprod at ``timestep``; before the first one 1, or the first's where set_alpha_to_one is false."""
        if timestep < 0 and self.config.get("set_alpha_to_one"):
            return F32(1)
        return self.plan.alphas_cumprod[max(timestep, 0)]

    def level(self, timestep: int) -> tuple[Any, Any]:
        """(alpha, sigma) at ``timestep``: the square roots of ``alpha(timestep)`` and of what it lacks to 1."""
        if timestep < 0 and self.config.get("set_alpha_to_one"):
            return F32(1), F32(0)
        alphas, sigmas = self.plan.levels
        return alphas[max(timestep, 0)], sigmas[max(timestep, 0)]

    def done(self, latents: Array, denoised: Array, **remembered: Any) -> Update:
        """The update, remembering ``outputs``, ``sample`` and ``partial`` as given and forgetting what is not."""
        return Update(latents, denoised, History(self.history.calls + 1, self.draw.taken, **remembered))
