"""How far pictures and latents of one model are from those of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from latentedge.runtime.bundle import Array

#: Resamples of the bootstrap behind an interval, and the tail that it leaves out on either side.
RESAMPLES = 2000
TAIL = 0.025

#: Further pictures whose worst is foreseen, how often it may be worse, and how many pictures tell of their spread at all.
FORESEEN, WORSE, LEAST_PICTURES = 64, 0.1, 8

#: A fall from the median that spread does not explain, and how much deeper than the deepest of few such falls others may be:
#: 9.6 dB were seen between the worst of 16 pictures and the worst of 24 further ones.
JUMP_DB, FURTHER_DB = 20.0, 10.0

#: How much deeper than the worst of pictures with each other's errors others may fall: 2.8 dB were seen.
BEYOND_EXCHANGED_DB = 3.0

#: Given to pictures without any difference, in dB.
IDENTICAL_DB = 100.0
#: Window of SSIM, as Wang et al. 2004 define it: an 11 x 11 Gaussian of sigma 1.5, K1 = 0.01, K2 = 0.03.
WINDOW, SIGMA = 11, 1.5


def psnr(reference: Array, computed: Array) -> float:
    """Peak signal to noise ratio of pictures in 0..1, in dB, at most 100; values that are not finite give 0."""
    if not (np.isfinite(reference).all() and np.isfinite(computed).all()):
        return 0.0
    error = float(np.mean(np.square(reference.astype(np.float64) - computed)))
    return IDENTICAL_DB if error == 0 else float(min(IDENTICAL_DB, -10 * np.log10(error)))


def sqnr(reference: Array, computed: Array) -> float:
    """Signal to quantisation noise ratio in dB, at most 100; values that are not finite give -100."""
    if not (np.isfinite(reference).all() and np.isfinite(computed).all()):
        return -IDENTICAL_DB
    power = float(np.mean(np.square(reference, dtype=np.float64)))
    error = float(np.mean(np.square(reference.astype(np.float64) - computed)))
    if error == 0:
        return IDENTICAL_DB
    return float(np.clip(10 * np.log10(max(power, 1e-30) / error), -IDENTICAL_DB, IDENTICAL_DB))


def ssim(reference: Array, computed: Array) -> float:
    """Mean structural similarity of two pictures ``[H, W, 3]`` in 0..1, over channels; windows stay inside."""
    side = min(WINDOW, *reference.shape[:2])
    offsets = np.arange(side) - (side - 1) / 2
    kernel = np.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel /= kernel.sum()
    a, b = reference.astype(np.float64), computed.astype(np.float64)
    mean_a, mean_b = _blur(a, kernel), _blur(b, kernel)
    variance_a = _blur(a * a, kernel) - mean_a**2
    variance_b = _blur(b * b, kernel) - mean_b**2
    covariance = _blur(a * b, kernel) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float(np.mean(top / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))))


def _blur(picture: Array, kernel: Array) -> Array:
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(picture, len(kernel), axis=axis)
        picture = windows @ kernel
    return picture


def mean_low(values: Sequence[float]) -> float:
    """Lower end of the bootstrapped 95 % interval of the mean: what few pictures, one of them far off, can tell."""
    drawn = np.random.default_rng(0).choice(np.asarray(values, np.float64), (RESAMPLES, len(values)))
    return float(np.quantile(drawn.mean(axis=1), TAIL))


def worst_low(values: Sequence[float], most: float, exchanged: Sequence[float] = ()) -> float:
    """What the worst of 64 further pictures holds in nine of ten cases, in dB; never more than the worst of these.

    A prediction limit of normal values: ``mean - t s sqrt(1 + 1 / n)`` with ``t`` the quantile ``1 - 0.1 / 64`` of
    Student's distribution. ``values`` over ``most`` count as that: pictures that are all but the same say nothing about
    how far others fall. Where the worst lies :data:`JUMP_DB` below the median, something jumped in few pictures (an entry
    of a codebook turned over), and others may fall :data:`FURTHER_DB` deeper. ``exchanged`` are many more pictures, which tell
    of jumps alone: others may fall :data:`BEYOND_EXCHANGED_DB` deeper than the worst of them. Of fewer than eight pictures it
    is the worst.
    """
    worst, count = float(np.min(values)), len(values)
    if exchanged:
        worst = min(worst, float(np.min(exchanged)) - BEYOND_EXCHANGED_DB)
    elif count >= LEAST_PICTURES and float(np.median(values)) - worst > JUMP_DB:
        worst -= FURTHER_DB
    if count < LEAST_PICTURES:
        return worst
    usual = np.minimum(np.asarray(values, np.float64), most)
    away = student_quantile(1 - WORSE / FORESEEN, count - 1) * float(usual.std(ddof=1)) * (1 + 1 / count) ** 0.5
    return float(min(worst, float(usual.mean()) - away))


def student_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's distribution, from the normal one's (Abramowitz and Stegun 1964, 26.7.5).

    Within 2 % for seven or more degrees of ``freedom`` and a ``share`` up to 0.9985.
    """
    x = NormalDist().inv_cdf(share)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return float(x + sum(term / freedom ** (power + 1) for power, term in enumerate(terms)))


def frechet_distance(first: Array, second: Array) -> float:
    """Frechet distance of two sets of features ``[N, D]`` as Gaussians (Heusel et al. 2017, eq. 6).

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``; the trace of the root comes from the eigenvalues of
    ``C1^(1/2) C2 C1^(1/2)``, which is symmetric.
    """
    if len(first) < 2 or len(second) < 2:
        raise ValueError("a Frechet distance needs at least two pictures on each side")
    means = first.mean(axis=0) - second.mean(axis=0)
    one, two = (np.atleast_2d(np.cov(side.astype(np.float64), rowvar=False)) for side in (first, second))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ two @ root)
    trace = np.trace(one) + np.trace(two) - 2 * np.sqrt(np.maximum(mixed, 0)).sum()
    return float(max(0.0, means @ means + trace))


def latent_features(latents: Array) -> Array:
    """Features of encoded pictures ``[N, C, h, w]``: each channel's mean and deviation over a 2 x 2 grid, [N, 8 C]."""
    count, channels, height, width = latents.shape
    if height < 2 or width < 2:
        return np.asarray(latents.reshape(count, -1), np.float64)
    cells = [part for rows in np.array_split(latents, 2, axis=2) for part in np.array_split(rows, 2, axis=3)]
    reductions: tuple[Callable[..., Array], ...] = (np.mean, np.std)
    features = [reduce(cell, axis=(2, 3), dtype=np.float64) for cell in cells for reduce in reductions]
    return np.concatenate(features, axis=1).reshape(count, 8 * channels)
