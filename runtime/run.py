"""One request on its way through the pipeline: its draws, its settings, and how many pictures it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import UsageError
from latentedge.runtime.noise import NoiseStream
from latentedge.runtime.request import Request


class Draws:
    """The N(0, 1) draws of one request, in order: recorded ones, or a stream from the seed."""

    def __init__(self, stream: NoiseStream, recorded: Array | None) -> None:
        self._stream = stream
        self._recorded = recorded
        self._taken = 0

    @property
    def recorded(self) -> bool:
        """Whether the draws are replayed; a sampler then uses them as they are."""
        return self._recorded is not None

    def normal(self, shape: tuple[int, ...]) -> Array:
        """The next draw, float32 of ``shape``; :class:`UsageError` when the recorded ones are used up or do not fit."""
        if self._recorded is None:
            return self._stream.normal(shape)
        if self._taken >= len(self._recorded):
            raise UsageError(f"noise holds {len(self._recorded)} draws; this request takes more.")
        draw = np.asarray(self._recorded[self._taken], np.float32)
        if draw.shape != shape:
            raise UsageError(f"noise draw {self._taken}: expected {list(shape)}, found {list(draw.shape)}.")
        self._taken += 1
        return draw


@dataclass
class Run:
    """One request on its way: what the stages hand to each other."""

    request: Request
    count: int
    steps: int
    sampler: str | None
    schedule: dict[str, Any]
    guidance_scale: float
    image_guidance_scale: float
    strength: float
    eta: float
    draws: Draws
    pictures: Array | None = None
    mask: Array | None = None
    tile: int | None = None
    timings: dict[str, Any] = field(default_factory=dict)


def picture_count(request: Request, pictures: Array | None) -> int:
    """Pictures of one request: the longest of what was given, times ``batch_size``."""
    if request.latents is not None:
        return len(request.latents)
    given = (request.prompt, request.class_label, request.seed)
    lengths = [len(value) for value in given if isinstance(value, Sequence) and not isinstance(value, str)]
    ids = request.prompt_ids
    # Two text encoders take a list of two arrays.
    ids = ids[0] if isinstance(ids, (list, tuple)) and len(ids) > 0 and np.ndim(ids[0]) == 2 else ids
    arrays = (ids, request.encoder_hidden_states, request.embeddings, pictures)
    lengths += [len(array) for array in arrays if isinstance(array, np.ndarray) and array.ndim > 1]
    return max(lengths, default=1) * (request.batch_size or 1)
