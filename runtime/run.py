"""One request on its way through the pipeline: its settings, and how many pictures it asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentedge.runtime.bundle import Array
from latentedge.runtime.layout import read_layouts
from latentedge.runtime.noise import Draws
from latentedge.runtime.request import Request


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
    #: Height and width of the pictures to keep, where they are drawn larger.
    kept: tuple[int, int] | None = None
    timings: dict[str, Any] = field(default_factory=dict)


def picture_count(request: Request, pictures: Array | None) -> int:
    """Pictures of one request: the longest of what was given, times ``batch_size``."""
    if request.latents is not None:
        return len(request.latents)
    ids = request.prompt_ids
    # Two text encoders take two arrays.
    ids = ids[0] if isinstance(ids, (list, tuple, np.ndarray)) and len(ids) > 0 and np.ndim(ids[0]) == 2 else ids
    rows: tuple[Any, ...] = (request.prompt, request.class_label, request.seed)
    arrays: tuple[Any, ...] = (ids, request.encoder_hidden_states, request.embeddings, pictures)
    lengths = [len(value) for value in rows if np.ndim(value) == 1]
    lengths += [len(array) for array in arrays if np.ndim(array) > 1]
    if request.layout is not None:
        lengths.append(len(read_layouts(request.layout)))
    if request.semantic_map is not None and np.ndim(request.semantic_map) == 3:
        lengths.append(len(request.semantic_map))
    return max(lengths, default=1) * (request.batch_size or 1)
