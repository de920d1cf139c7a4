"""Pictures to latents and back, whole or in blended tiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from latentedge.runtime.bundle import Array, Latent
from latentedge.runtime.engines.base import Engine
from latentedge.runtime.errors import UsageError
from latentedge.runtime.noise import Draws
from latentedge.runtime.tiles import tiled

LOGVAR_RANGE = (-30.0, 20.0)


def decode(engine: Engine, latent: Latent, latents: Array, tile: int | None = None) -> Array:
    """Pictures, float32 ``[N, H, W, 3]`` in 0..1 (not clipped), from latents ``[N, C, h, w]`` in the model's scale.

    ``tile`` is the side of a tile in latent pixels; tiles overlap by a quarter and are blended linearly.
    """
    z = (latents / np.float32(latent.scale_factor) + np.float32(latent.shift_factor)).astype(np.float32)
    run = _runner(engine, "latent_sample", "sample")
    scale = latent.downscale
    decoded = run(z) if tile is None or max(z.shape[2:]) <= tile else tiled(run, z, tile, tile // 4, scale)
    low, high = latent.image_range
    pictures = (decoded - np.float32(low)) / np.float32(high - low)
    return np.ascontiguousarray(pictures.transpose(0, 2, 3, 1))


def encode(
    engine: Engine,
    latent: Latent,
    pictures: Array,
    draws: Draws | None = None,
    *,
    scaled: bool = True,
    tile: int | None = None,
) -> Array:
    """Latents, float32 ``[N, C, h, w]``, from pictures ``[N, H, W, 3]`` in 0..1.

    KL encoders give the distribution's mode, or a sample of it when ``draws`` are given. ``scaled`` latents are in
    the model's scale, others as the encoder gives them. ``tile``: side of a tile in latent pixels.
    """
    height, width = pictures.shape[1:3]
    if height % latent.downscale or width % latent.downscale:
        raise UsageError(
            f"the encoder takes pictures whose sides are multiples of {latent.downscale}, found {width}x{height}."
        )
    low, high = latent.image_range
    sample = (pictures.transpose(0, 3, 1, 2) * np.float32(high - low) + np.float32(low)).astype(np.float32)
    output = "latent_parameters" if latent.encoding == "kl" else "latent_sample"
    run = _runner(engine, "sample", output)
    if tile is None or max(height, width) <= tile * latent.downscale:
        encoded = run(np.ascontiguousarray(sample))
    else:
        side = tile * latent.downscale
        encoded = tiled(run, sample, side, side // 4, 1 / latent.downscale)
    z = sample_posterior(encoded, draws) if latent.encoding == "kl" else encoded
    if not scaled:
        return z
    return ((z - np.float32(latent.shift_factor)) * np.float32(latent.scale_factor)).astype(np.float32)


def sample_posterior(moments: Array, draws: Draws | None) -> Array:
    """Mean of a diagonal Gaussian ``[N, 2C, h, w]`` (mean first, then log variance), or mean + std * draw."""
    mean, logvar = np.split(moments, 2, axis=1)
    if draws is None:
        return np.ascontiguousarray(mean)
    std = np.exp(np.float32(0.5) * np.clip(logvar, *LOGVAR_RANGE))
    return np.asarray(mean + std * draws.normal(mean.shape), np.float32)


def _runner(engine: Engine, name: str, output: str) -> Callable[[Array], Array]:
    return lambda array: engine.run({name: array})[output]
