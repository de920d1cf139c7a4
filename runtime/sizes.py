"""Sizes of one request: of the picture that is drawn, of its latent, and of tiles."""

from __future__ import annotations

import numpy as np

from latentedge.runtime import images
from latentedge.runtime.bundle import Array, Bundle
from latentedge.runtime.errors import UsageError
from latentedge.runtime.request import Request

#: Conditioning pictures that say what each part of the result shows, so that the UNet may draw it in tiles.
TILED_BY = ("low_resolution_image", "segmentation")


def pictures_of(bundle: Bundle, request: Request) -> tuple[Array | None, Array | None]:
    """Picture and mask in the size that is drawn, the mask as 0 (keep) and 1 (paint)."""
    if request.image is None:
        return None, None
    pictures = images.pictures_from(request.image)
    mask = None if request.mask is None else images.masks_from(request.mask)
    if mask is not None and mask.shape[1:] != pictures.shape[1:3]:
        raise UsageError(
            f"the mask is {mask.shape[2]}x{mask.shape[1]}, its image {pictures.shape[2]}x{pictures.shape[1]}.",
            hint="give both in the same size",
        )
    height, width = _fitting(bundle, pictures.shape[1], pictures.shape[2], request)
    pictures = images.resize_pictures(pictures, height, width)
    if mask is None:
        return pictures, None
    mask = images.resize_pictures(np.repeat(mask[..., None], 3, axis=-1), height, width)[..., 0]
    return pictures, (mask >= 0.5).astype(np.float32)


def completed(bundle: Bundle, pictures: Array | None) -> tuple[Array | None, tuple[int, int] | None]:
    """Small pictures continued by their border to sides that the UNet takes, and (height, width) of the result to keep.

    Of super-resolution models in CompVis's layout; ``None`` where nothing was added.
    """
    manifest = bundle.manifest
    if pictures is None or manifest.task != "super-resolution" or manifest.schedule.get("dialect") != "compvis":
        return pictures, None
    axes = bundle.component("unet").axes
    missing = [
        -side % axes[name].multiple if name in axes else 0
        for name, side in zip(("latent_height", "latent_width"), pictures.shape[1:3], strict=True)
    ]
    if not any(missing):
        return pictures, None
    factor = manifest.conditioning.upscale or manifest.latent.downscale
    height, width = (factor * side for side in pictures.shape[1:3])
    return np.pad(pictures, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)), mode="edge"), (height, width)


def _fitting(bundle: Bundle, height: int, width: int, request: Request) -> tuple[int, int]:
    """The size asked for, or that of given latents; else the picture's own, rounded down as the model's original does."""
    manifest = bundle.manifest
    compvis = manifest.schedule.get("dialect") == "compvis"
    enlarged = manifest.task == "super-resolution"
    if request.latents is not None and not compvis and not enlarged:
        height, width = (side * manifest.latent.downscale for side in np.shape(request.latents)[-2:])
    elif not (compvis and manifest.task in ("inpainting", "reconstruction", "super-resolution")):
        unit = 32 if enlarged else manifest.latent.downscale
        axes = bundle.component("unet").axes if "unet" in manifest.components else {}
        if not enlarged and "latent_height" in axes:
            unit *= axes["latent_height"].multiple
        height, width = max(height // unit, 1) * unit, max(width // unit, 1) * unit
    return request.height or height, request.width or width


def latent_size(bundle: Bundle, request: Request, pictures: Array | None) -> tuple[int, int]:
    """Height and width of the latent, checked against what the UNet takes."""
    manifest = bundle.manifest
    if request.latents is not None:
        return int(request.latents.shape[-2]), int(request.latents.shape[-1])
    if manifest.task == "super-resolution" and pictures is not None:
        size, unit = pictures.shape[1:3], 1
    else:
        unit = manifest.latent.downscale
        given = pictures.shape[1:3] if pictures is not None else None
        if request.semantic_map is not None and manifest.conditioning.labels is not None:
            given = images.labels_from(request.semantic_map, manifest.conditioning.labels).shape[1:3]
        default = given or (manifest.defaults.height, manifest.defaults.width)
        size = (request.height or default[0], request.width or default[1])
    axes = bundle.component("unet").axes
    for name, side, axis in (("height", size[0], "latent_height"), ("width", size[1], "latent_width")):
        multiple = unit * (axes[axis].multiple if axis in axes else 1)
        if side < 1 or side % multiple:
            below, above = side // multiple * multiple, (side // multiple + 1) * multiple
            raise UsageError(
                f"{name} must be a multiple of {multiple}, found {side}.",
                hint=f"the nearest are {below} and {above}" if below > 0 else f"the smallest is {multiple}",
            )
    return int(size[0]) // unit, int(size[1]) // unit


def tile_of(bundle: Bundle, request: Request) -> int | None:
    """Side of a tile in latent pixels; super-resolution takes the UNet's largest side where none is asked for."""
    if request.tile is not None or bundle.manifest.task != "super-resolution":
        return request.tile or None
    sides = [axis for name, axis in bundle.component("unet").axes.items() if name != "batch"]
    return min((axis.max - axis.max % axis.multiple for axis in sides), default=None)


def unet_tile(bundle: Bundle, tile: int | None, concat: Array | None, *, cached: bool) -> int | None:
    """Side of the UNet's tiles; ``None`` for a smaller latent, and where no picture says what each tile shows."""
    if concat is None or tile is None or max(concat.shape[2:]) <= tile:
        return None
    if not any(entry.source in TILED_BY for entry in bundle.manifest.conditioning.concat):
        return None
    multiple = max(axis.multiple for axis in bundle.component("unet").axes.values())
    if tile % multiple:
        raise UsageError(f"this UNet takes tiles whose side is a multiple of {multiple}, found {tile}.")
    if cached:
        raise UsageError(
            "step caching does not go with tiles: each needs the deep blocks of its own last evaluation.",
            hint="leave one of the two out; tile 0 draws the picture whole",
        )
    return tile
