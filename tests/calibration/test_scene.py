"""What pictures of a denoiser tell beyond themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from latentedge.calibration.pictures import Drawn
from latentedge.calibration.scene import Scene, Studio
from latentedge.runtime.bundle import Array, Bundle
from latentedge.runtime.engines.null import NullEngine
from latentedge.runtime.pipeline import Pipeline
from tests.runtime import bundles


class Gallery(Studio):
    """A studio above null engines, whose decoder takes the nearer of two entries of a codebook, 0 and 1."""

    def __init__(self, encoding: str) -> None:
        plain = bundles.pipeline()
        latent = dataclasses.replace(plain.bundle.latent, encoding=encoding, scale_factor=1.0)
        manifest = dataclasses.replace(plain.bundle, latent=latent)
        engines = {"vae_decoder": NullEngine(manifest.components["vae_decoder"], self.nearest)}
        Pipeline.__init__(self, Bundle(plain.path, manifest), "null", "fp32", engines=engines)
        self.borrowed = None

    @staticmethod
    def nearest(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return bundles.decoder({"latent_sample": (inputs["latent_sample"] > 0.5).astype(np.float32)})


def drawn(latents: Array, gallery: Gallery) -> Drawn:
    return Drawn(gallery.decoded(None, latents).pictures, [latents])


def test_errors_of_others_show_a_jump_that_no_picture_shows() -> None:
    """One picture lies near the border, one has a large error: each alone keeps its entries."""
    latents = np.random.default_rng(0).choice(np.float32([0, 1]), (8, 4, 8, 8))
    latents[2, 0, 3, 3] = 0.48
    errors = np.full_like(latents, 0.01)
    errors[5] = 0.1
    gallery = Gallery("vq")
    reference, computed = drawn(latents, gallery), drawn(latents + errors, gallery)
    assert np.array_equal(reference.pictures, computed.pictures)
    scene = Scene(gallery, "unet", (), reference)
    found = scene.exchanged(computed, gallery)
    assert len(found) == 7 * 8
    assert sorted(found)[0] < 40 < sorted(found)[1] == 100


@pytest.mark.parametrize(("component", "encoding"), [("vae_decoder", "vq"), ("unet", "kl")])
def test_nothing_is_exchanged_where_pictures_follow_their_latents(component: str, encoding: str) -> None:
    gallery = Gallery(encoding)
    reference = drawn(np.zeros((8, 4, 8, 8), np.float32), gallery)
    assert Scene(gallery, component, (), reference).exchanged(reference, gallery) == []
