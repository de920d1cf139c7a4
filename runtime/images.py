"""Pictures in and out: files, PIL images and arrays, always float32 in 0..1 inside, ``[N, H, W, 3]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import UsageError

#: What a caller may pass as a picture: a path, a PIL image, uint8, or float in 0..1.
Picture = Any


def open_picture(path: str | Path) -> Image.Image:
    """A picture file, decoded; :class:`UsageError` if it is missing or no picture."""
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise UsageError(f"there is no picture {path}.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UsageError(f"{path} cannot be read as a picture: {error}.", hint="give a PNG or JPEG file") from error
    return image


def pictures_from(value: Picture, name: str = "image") -> Array:
    """Colour pictures, float32 ``[N, H, W, 3]`` in 0..1, from a path, a PIL image, or an array."""
    array = _pixels(value, "RGB", name)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] != 3:
        raise UsageError(f"{name}: expected [N, H, W, 3] or [H, W, 3], found {list(array.shape)}.")
    return array


def masks_from(value: Picture, name: str = "mask") -> Array:
    """Masks, float32 ``[N, H, W]`` in 0..1 (1 = paint here), from a path, a PIL image, or an array."""
    array = _pixels(value, "L", name)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise UsageError(f"{name}: expected [N, H, W] or [H, W], found {list(array.shape)}.")
    return array


def labels_from(value: Picture, labels: int) -> Array:
    """A semantic map, int64 ``[N, H, W]`` with labels from 0 to ``labels - 1``, from an 8-bit picture or an array."""
    if isinstance(value, (str, Path)):
        value = open_picture(value)
    if isinstance(value, Image.Image) and len(value.getbands()) > 1:
        raise UsageError(
            f"semantic_map: expected a picture of one channel, found {value.mode}.",
            hint="a label picture is an 8-bit grey or palette PNG whose pixel values are label numbers",
        )
    array = np.asarray(value)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise UsageError(
            f"semantic_map: expected integer labels [N, H, W], found {array.dtype} {list(array.shape)}.",
            hint="a label picture is an 8-bit grey or palette PNG whose pixel values are label numbers",
        )
    if array.min() < 0 or array.max() >= labels:
        raise UsageError(
            f"semantic_map: labels go from 0 to {labels - 1}, found {array.min()} to {array.max()}.",
            hint="the pixel values themselves are label numbers; a colour picture of the labels is no label map",
        )
    return array.astype(np.int64)


def _pixels(value: Picture, mode: str, name: str) -> Array:
    if isinstance(value, (str, Path)):
        value = open_picture(value)
    if isinstance(value, (list, tuple)):
        return np.concatenate([_batched(_pixels(item, mode, name), mode) for item in value])
    array = np.asarray(value.convert(mode)) if isinstance(value, Image.Image) else np.asarray(value)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    if array.dtype.kind != "f":
        raise UsageError(f"{name}: expected uint8, or float in 0..1, found {array.dtype}.")
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise UsageError(f"{name}: float values must lie in 0..1, found {array.min():g} to {array.max():g}.")
    return array.astype(np.float32)


def _batched(array: Array, mode: str) -> Array:
    return array[None] if array.ndim == (3 if mode == "RGB" else 2) else array


def to_bytes(array: Array, *, truncate: bool) -> Array:
    """Float pictures in 0..1 to uint8: truncated as CompVis's scripts do, or rounded half to even as diffusers does."""
    scaled = np.clip(array, 0, 1) * np.float32(255)
    return (scaled if truncate else np.rint(scaled)).astype(np.uint8)


def resize_pictures(pictures: Array, height: int, width: int) -> Array:
    """Lanczos-resize pictures ``[N, H, W, 3]`` in 0..1, through 8 bits as PIL does; unchanged if the size fits."""
    if pictures.shape[1:3] == (height, width):
        return pictures
    resized = [
        np.asarray(Image.fromarray(item).resize((width, height), Image.Resampling.LANCZOS))
        for item in to_bytes(pictures, truncate=False)
    ]
    return np.stack(resized).astype(np.float32) / np.float32(255)


def resize_nearest(maps: Array, height: int, width: int) -> Array:
    """Nearest-neighbour resize of ``[..., H, W]``: source row ``floor(i * H / height)``, as torch's interpolate."""
    rows = np.arange(height) * maps.shape[-2] // height
    columns = np.arange(width) * maps.shape[-1] // width
    return maps[..., rows[:, None], columns]
