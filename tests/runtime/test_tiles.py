"""The UNet in blended tiles: memory, conditioning cut along, seams, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from latentedge.runtime.bundle import Array, Axis, ConcatInput, Conditioning
from latentedge.runtime.engines import EngineOptions
from latentedge.runtime.errors import UsageError
from latentedge.runtime.pipeline import Pipeline
from tests.runtime import bundles

LARGEST = 16
REACH = 2


class LocalUnet:
    """Looks ``REACH`` pixels around at latent and low-resolution picture; remembers what it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        sample = inputs["sample"]
        self.shapes.append(sample.shape)
        near = uniform_filter(sample, (1, 1, 2 * REACH + 1, 2 * REACH + 1), mode="constant")
        output = 0.4 * sample[:, :4] + 0.6 * (sample[:, :4] - near[:, :4]) - near[:, 4:].mean(1, keepdims=True)
        return {"out_sample": output.astype(np.float32)}


def super_resolution(unet: Any, **options: Any) -> Pipeline:
    """A model that enlarges four times, whose UNet declares sides up to ``LARGEST`` in steps of 4."""
    manifest = bundles.text_manifest()
    components = bundles.text_components(7)
    axes = {**bundles.BATCH, "latent_height": Axis(4, 8, LARGEST, 4), "latent_width": Axis(4, 8, LARGEST, 4)}
    whole = components["unet"]
    components["unet"] = dataclasses.replace(whole, inputs=whole.inputs[:2], axes=axes)
    manifest = dataclasses.replace(
        manifest,
        task="super-resolution",
        components={name: components[name] for name in ("unet", "vae_decoder")},
        conditioning=Conditioning(concat=(ConcatInput("low_resolution_image", 3),)),
        schedule={**manifest.schedule, "dialect": "compvis"},
    )
    pipe = bundles.pipeline(manifest, unet=unet)
    pipe.options = EngineOptions(**options)
    return pipe


def picture(height: int, width: int) -> Array:
    coarse = np.random.default_rng(3).random((1, height // 4, width // 4, 3)).astype(np.float32)
    return coarse.repeat(4, 1).repeat(4, 2)


def draw(pipe: Pipeline, image: Array, **options: Any) -> Array:
    return np.asarray(pipe.generate(image=image, steps=4, seed=5, guidance_scale=1.0, **options).latents)


@pytest.mark.parametrize(("height", "width"), [(40, 28), (24, 16), (12, 36)])
def test_sizes_above_the_largest_are_drawn_in_tiles_and_equal_the_whole(height: int, width: int) -> None:
    """With an overlap wider than twice the network's reach, tiles differ from the whole only by their cut borders."""
    tiles, whole = LocalUnet(), LocalUnet()
    found = draw(super_resolution(tiles), picture(height, width))
    expected = draw(super_resolution(whole), picture(height, width), tile=0)
    assert {shape[2:] for shape in tiles.shapes} == {(min(height, LARGEST), min(width, LARGEST))}
    assert {shape[2:] for shape in whole.shapes} == {(height, width)}
    assert found.shape == expected.shape
    assert 20 * np.log10(np.abs(expected).max() / np.sqrt(((found - expected) ** 2).mean())) > 35


@pytest.mark.parametrize(("height", "width"), [(13, 18), (39, 41), (1, 3)])
def test_a_picture_of_any_size_is_continued_by_its_border_and_cut_again(height: int, width: int) -> None:
    image = np.random.default_rng(4).random((1, height, width, 3)).astype(np.float32)
    pipe = super_resolution(LocalUnet())
    result = pipe.generate(image=image, steps=4, seed=5, guidance_scale=1.0)
    larger = np.pad(image, ((0, 0), (0, -height % 4), (0, -width % 4), (0, 0)), mode="edge")
    expected = pipe.generate(image=larger, steps=4, seed=5, guidance_scale=1.0)
    factor = pipe.bundle.latent.downscale
    assert result.array.shape == (1, factor * height, factor * width, 3)
    assert result.images[0].size == (factor * width, factor * height)
    assert (result.array == expected.array[:, : factor * height, : factor * width]).all()
    assert (result.latents == expected.latents).all()


@pytest.mark.parametrize("sides", [(13, 18), (12, 16), (20, 20)])
def test_latents_of_another_size_than_the_picture_are_refused(sides: tuple[int, int]) -> None:
    image = np.zeros((1, 13, 18, 3), np.uint8)
    with pytest.raises(UsageError, match=r"takes sides \[16, 20\], found"):
        super_resolution(LocalUnet()).generate(
            image=image, latents=np.zeros((1, 4, *sides)), steps=2, guidance_scale=1.0
        )


def test_a_network_without_reach_gives_the_same_in_tiles() -> None:
    def unet(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        sample = inputs["sample"]
        return {"out_sample": np.asarray(np.tanh(sample[:, :4]) - sample[:, 4:5], np.float32)}

    image = picture(40, 28)
    expected = draw(super_resolution(unet), image, tile=0)
    for side in (None, 12, 8):
        found = draw(super_resolution(unet), image, tile=side)
        assert np.abs(found - expected).max() < 1e-5, "a conditioning picture that was not cut along would show"


def test_up_to_the_largest_side_nothing_is_tiled() -> None:
    unet = LocalUnet()
    draw(super_resolution(unet), picture(16, 12))
    assert {shape[2:] for shape in unet.shapes} == {(16, 12)}


def test_one_tile_at_a_time_bounds_the_memory() -> None:
    unet = LocalUnet()
    draw(super_resolution(unet), np.repeat(picture(64, 48), 2, 0), tile=8)
    assert {shape[0] for shape in unet.shapes} == {2}
    assert {shape[2:] for shape in unet.shapes} == {(8, 8)}


def test_a_model_steered_by_text_alone_is_drawn_whole() -> None:
    shapes: list[tuple[int, ...]] = []

    def unet(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        shapes.append(inputs["sample"].shape[2:])
        return bundles.unet(inputs)

    pipe = bundles.pipeline(unet=unet)
    pipe.generate(prompt_ids=np.array([[1, 2, 3, 4, 5]]), guidance_scale=1.0, height=64, width=64, steps=2, tile=8)
    assert set(shapes) == {(16, 16)}


def test_tiles_that_do_not_fit_are_refused() -> None:
    pipe = super_resolution(LocalUnet())
    with pytest.raises(UsageError, match="multiple of 4, found 10"):
        draw(pipe, picture(40, 28), tile=10)
    for side in (-8, 3):
        with pytest.raises(UsageError, match=f"at least 4 latent pixels, or 0 for none; found {side}"):
            draw(pipe, picture(40, 28), tile=side)
    with pytest.raises(UsageError, match="step caching does not go with tiles"):
        draw(super_resolution(LocalUnet(), cache_interval=2), picture(40, 28))
    draw(super_resolution(LocalUnet(), cache_interval=2), picture(16, 16))
