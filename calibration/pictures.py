"""Draws the same requests with two variants of a bundle, and measures how far apart they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentedge.calibration.metrics import psnr, sqnr, ssim
from latentedge.runtime.bundle import Array
from latentedge.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Drawn:
    """Pictures ``[N, H, W, 3]`` in 0..1, latents by step ``[steps][N, C, h, w]``, and seconds by picture."""

    pictures: Array
    latents: list[Array]
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """One picture's difference from its reference."""

    index: int
    psnr_db: float
    ssim: float
    #: Latent SQNR after each step, in dB.
    latent_sqnr_db: tuple[float, ...]


def draw(
    pipeline: Pipeline, requests: Sequence[dict[str, Any]], progress: Callable[[int, int], None] | None = None
) -> Drawn:
    """Draw each request on its own; pictures of one bundle have one size."""
    pictures: list[Array] = []
    latents: list[list[Array]] = []
    seconds: list[float] = []
    for number, request in enumerate(requests):
        arguments = dict(request)
        prompt = arguments.pop("prompt", None)
        steps: list[Array] = []

        def keep(step: Any, steps: list[Array] = steps) -> None:
            steps.append(np.array(step.latents))

        before = time.perf_counter()
        result = pipeline.generate(prompt, callback=keep, **arguments)
        seconds.append(time.perf_counter() - before)
        pictures.append(result.array)
        latents.append(steps)
        if progress is not None:
            progress(number + 1, len(requests))
    by_step = [np.concatenate(entries) for entries in zip(*latents, strict=True)]
    return Drawn(np.concatenate(pictures), by_step, seconds)


def differences(reference: Drawn, computed: Drawn) -> list[Difference]:
    """Each picture of ``computed`` against its reference, in order."""
    found = []
    for index, (one, two) in enumerate(zip(reference.pictures, computed.pictures, strict=True)):
        steps = tuple(sqnr(a[index], b[index]) for a, b in zip(reference.latents, computed.latents, strict=True))
        found.append(Difference(index, psnr(one, two), ssim(one, two), steps))
    return found


def summary(found: Sequence[Difference]) -> tuple[float, float]:
    """Mean and worst PSNR in dB."""
    values = [entry.psnr_db for entry in found]
    return float(np.mean(values)), float(np.min(values))
