"""A linear map from latent to picture, for previews while sampling, fitted through the exported decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from latentedge.export.parity import SEED, Run
from latentedge.runtime.bundle import Array, Component, Latent

#: Random latents decoded for the fit.
SAMPLES = 6

PreviewMap = tuple[tuple[float, float, float], ...]


def fit_preview(run: Run, decoder: Component, latent: Latent, axes: Mapping[str, int]) -> PreviewMap | None:
    """Least-squares map from a latent in the model's own scale to RGB in 0..1, one row a channel and an offset.

    Smooth random latents are decoded and the pictures averaged to the latent's size. ``None`` where the decoder
    gives no RGB picture.
    """
    (spec,), (picture,) = decoder.inputs, decoder.outputs
    if picture.shape[1] != 3:
        return None
    generator = np.random.default_rng(SEED)
    rows, targets = [], []
    for _ in range(SAMPLES):
        latents = smooth_noise(spec.resolve(axes), generator)
        unscaled = latents / np.float32(latent.scale_factor) + np.float32(latent.shift_factor)
        decoded = run({spec.name: unscaled.astype(np.float32)})[picture.name]
        rgb = (decoded - latent.image_range[0]) / (latent.image_range[1] - latent.image_range[0])
        rows.append(_pixels(latents))
        targets.append(_pixels(_average_to(np.clip(rgb, 0.0, 1.0), latents.shape[2:])))
    features = np.concatenate(rows)
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(features, np.concatenate(targets), rcond=None)
    rows_of_map: Any = np.round(solution, 6).tolist()
    return tuple((red, green, blue) for red, green, blue in rows_of_map)


def smooth_noise(shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """Noise [batch, channels, height, width] of unit variance with an offset for each channel, blurred by a cross."""
    noise = generator.standard_normal(shape)
    for _ in range(3):
        noise = noise + sum(np.roll(noise, step, axis) for step in (-1, 1) for axis in (2, 3))
    noise = noise / noise.std() + generator.standard_normal((*shape[:2], 1, 1))
    return np.asarray(noise / noise.std(), dtype=np.float32)


def _pixels(array: Array) -> Array:
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]).astype(np.float64)


def _average_to(picture: Array, size: tuple[int, ...]) -> Array:
    batch, channels, height, width = picture.shape
    rows, columns = size
    return np.asarray(
        picture.reshape(batch, channels, rows, height // rows, columns, width // columns).mean(axis=(3, 5))
    )
