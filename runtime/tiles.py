"""A network on a picture larger than it can take at once: overlapping tiles, blended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from latentedge.runtime.bundle import Array


def tiled(run: Callable[[Array], Array], whole: Array, side: int, overlap: int, scale: float) -> Array:
    """Apply ``run`` to overlapping square tiles of ``whole`` ``[N, C, H, W]`` and blend the results.

    ``scale`` is the ratio of output to input side. Each output pixel is a convex combination of the tiles that
    cover it, with weights that fall linearly to the tile's inner edges, so borders and corners are always covered.
    """
    height, width = whole.shape[2:]
    total: Array | None = None
    weights = np.zeros((round(height * scale), round(width * scale)), np.float32)
    for top, bottom in spans(height, side, overlap):
        for left, right in spans(width, side, overlap):
            piece = run(np.ascontiguousarray(whole[:, :, top:bottom, left:right]))
            if total is None:
                total = np.zeros((*piece.shape[:2], *weights.shape), np.float32)
            rows = _ramp(top, bottom, height, overlap, scale)
            columns = _ramp(left, right, width, overlap, scale)
            weight = rows[:, None] * columns[None, :]
            place = (slice(round(top * scale), round(bottom * scale)), slice(round(left * scale), round(right * scale)))
            total[:, :, place[0], place[1]] += piece * weight
            weights[place] += weight
    assert total is not None
    return np.asarray(total / weights, np.float32)


def spans(length: int, side: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Tiles of at most ``side`` that cover ``length``, each overlapping the next by at least ``overlap``.

    The last tile is moved back to end at ``length``, so that every tile has the same side.
    """
    start = 0
    while start + side < length:
        yield start, start + side
        start += side - overlap
    yield max(length - side, 0), length


def _ramp(start: int, end: int, length: int, overlap: int, scale: float) -> Array:
    """Blending weights along one side of a tile: 1 inside, falling linearly over the overlap unless at the border."""
    size, ramp = round(end * scale) - round(start * scale), max(round(overlap * scale), 1)
    rising = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(ramp)
    weight = np.ones(size, np.float32)
    if start > 0:
        weight = np.minimum(weight, rising)
    if end < length:
        weight = np.minimum(weight, rising[::-1])
    return weight
