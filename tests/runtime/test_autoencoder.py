"""Encoding, decoding and tiles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentedge.runtime.autoencoder import decode, encode, sample_posterior
from latentedge.runtime.bundle import Axis, Component, Latent, TensorSpec
from latentedge.runtime.engines.null import NullEngine
from latentedge.runtime.errors import UsageError
from latentedge.runtime.tiles import spans, tiled

AXES = {name: Axis(1, 8, 64) for name in ("batch", "latent_height", "latent_width")}
SMALL = ("batch", 4, "latent_height", "latent_width")
LARGE = ("batch", 3, "8*latent_height", "8*latent_width")


def upsampling_decoder() -> NullEngine:
    component = Component(
        "vae_decoder", (TensorSpec("latent_sample", "float32", SMALL),), (TensorSpec("sample", "float32", LARGE),), AXES
    )
    return NullEngine(component, lambda inputs: {"sample": inputs["latent_sample"][:, :3].repeat(8, 2).repeat(8, 3)})


@given(st.integers(1, 200), st.integers(4, 64))
def test_spans_cover_with_equal_sides_and_overlap(length: int, side: int) -> None:
    overlap = side // 4
    tiles = list(spans(length, side, overlap))
    assert tiles[0][0] == 0
    assert tiles[-1][1] == length
    assert {end - start for start, end in tiles} == {min(side, length)}
    for (_, end), (start, _) in itertools.pairwise(tiles):
        assert end - start >= overlap


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([8, 16, 24]))
def test_tiles_of_a_pointwise_function_have_no_seams(height: int, width: int, side: int) -> None:
    whole = np.random.default_rng(height * 71 + width).standard_normal((2, 3, height, width)).astype(np.float32)
    assert np.abs(tiled(lambda x: x * 2, whole, side, side // 4, 1.0) - whole * 2).max() < 1e-5


def test_tiled_decoding_equals_whole_decoding_where_the_decoder_is_local() -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 21, 34)).astype(np.float32)
    engine, latent = upsampling_decoder(), Latent(4, 8, scale_factor=0.5)
    whole = decode(engine, latent, latents)
    assert whole.shape == (2, 168, 272, 3)
    assert np.abs(decode(engine, latent, latents, tile=16) - whole).max() < 1e-5


def test_neighbouring_tiles_fade_into_each_other() -> None:
    """Tiles that disagree by 1: where they overlap by 8, no two neighbouring pixels may differ by much more than 1/8."""
    numbers = itertools.count()
    whole = np.zeros((1, 1, 32, 56), np.float32)
    joined = tiled(lambda x: x + np.float32(next(numbers)), whole, 32, 8, 1.0)[0, 0]
    assert (joined[0, :24] == 0).all()
    assert (joined[0, 32:] == 1).all()
    assert np.diff(joined, axis=1)[:, 23:32].min() > 0
    assert np.abs(np.diff(joined, axis=1)).max() < 0.15


def test_decoding_divides_by_the_scale_and_adds_the_shift() -> None:
    latents = np.full((1, 4, 2, 2), 0.25, np.float32)
    pictures = decode(upsampling_decoder(), Latent(4, 8, scale_factor=0.5, shift_factor=0.1), latents)
    assert pictures == pytest.approx((0.25 / 0.5 + 0.1 + 1) / 2, abs=1e-6)


def test_posterior_is_the_mean_or_a_clipped_sample() -> None:
    class Ones:
        def normal(self, shape: tuple[int, ...]) -> np.ndarray:
            return np.ones(shape, np.float32)

    for logvar, std in ((99.0, np.exp(10.0)), (-4.0, np.exp(-2.0)), (-99.0, np.exp(-15.0))):
        moments = np.array([1e-6, logvar], np.float32).reshape(1, 2, 1, 1)
        assert sample_posterior(moments, None).item() == np.float32(1e-6)
        assert sample_posterior(moments, Ones()).item() == pytest.approx(1e-6 + std, rel=1e-6)


def test_encoding_shifts_then_scales_and_refuses_sizes_that_do_not_divide() -> None:
    component = Component(
        "vae_encoder", (TensorSpec("sample", "float32", LARGE),), (TensorSpec("latent_sample", "float32", SMALL),), AXES
    )
    engine = NullEngine(component, lambda inputs: {"latent_sample": inputs["sample"][:, :1, ::8, ::8].repeat(4, 1)})
    latent = Latent(4, 8, scale_factor=2.0, encoding="vq")
    assert encode(engine, latent, np.ones((1, 16, 24, 3), np.float32)).shape == (1, 4, 2, 3)
    assert encode(engine, latent, np.ones((1, 16, 24, 3), np.float32)).max() == 2.0
    shifted = Latent(4, 8, scale_factor=2.0, shift_factor=0.25, encoding="vq")
    assert encode(engine, shifted, np.ones((1, 16, 24, 3), np.float32)).max() == 2.0 * (1.0 - 0.25)
    assert encode(engine, shifted, np.ones((1, 16, 24, 3), np.float32), scaled=False).max() == 1.0
    with pytest.raises(UsageError, match="multiples of 8, found 20x16"):
        encode(engine, latent, np.ones((1, 16, 20, 3), np.float32))
