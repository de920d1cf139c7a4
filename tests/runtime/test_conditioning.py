"""What reaches the UNet for classes, embeddings and pictures, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from latentedge.runtime.bundle import Component, ConcatInput, Conditioning, Defaults
from latentedge.runtime.errors import UsageError
from latentedge.runtime.pipeline import Pipeline
from tests.runtime import bundles

Seen = list[dict[str, Any]]


def watched(conditioning: Conditioning, task: str, channels: int = 4, **functions: Any) -> tuple[Pipeline, Seen]:
    """A pipeline without a text encoder, and what its UNet is given."""
    seen: Seen = []

    def unet(inputs: Any) -> Any:
        seen.append({name: array.copy() for name, array in inputs.items()})
        return bundles.unet(inputs)

    components = bundles.text_components(channels)
    del components["text_encoder"]
    if "cond_encoder" in functions:
        components["cond_encoder"] = Component(
            "cond_encoder",
            bundles.specs(class_labels=("int64", ("batch",))),
            (bundles.CONTEXT,),
            bundles.BATCH,
        )
    if conditioning.cross_attention == "none":
        network = components["unet"]
        components["unet"] = dataclasses.replace(network, inputs=network.inputs[:2])
    defaults = Defaults(32, 32, "ddim", steps=2, guidance_scale=3.0)
    manifest = bundles.text_manifest(components=components, conditioning=conditioning, task=task, defaults=defaults)
    return bundles.pipeline(manifest, unet=unet, **functions), seen


def class_encoder(inputs: Any) -> Any:
    return {
        "encoder_hidden_states": np.broadcast_to(
            inputs["class_labels"][:, None, None], (len(inputs["class_labels"]), 5, 6)
        ).astype(np.float32)
    }


def test_a_class_is_guided_against_the_null_class() -> None:
    conditioning = Conditioning("class", unconditional="null_class", classes=11, null_class=10)
    pipe, seen = watched(conditioning, "class-to-image", cond_encoder=class_encoder)
    pipe.generate(class_label=[3, 0], seed=1)
    assert seen[0]["encoder_hidden_states"][:, 0, 0].tolist() == [10, 10, 3, 0]
    for label, message in ((11, "from 0 to 10, found"), (-1, "from 0 to 10, found"), (0.5, "must be a class number")):
        with pytest.raises(UsageError, match=message):
            pipe.generate(class_label=label, seed=1)


def test_embeddings_are_of_unit_length_and_guided_against_zeros() -> None:
    conditioning = Conditioning("embeddings", unconditional="zeros", embedding_width=6)
    pipe, seen = watched(conditioning, "embeddings-to-image")
    given = np.random.default_rng(0).standard_normal((1, 5, 6)).astype(np.float32)
    given /= np.linalg.norm(given, axis=-1, keepdims=True)
    pipe.generate(embeddings=given, seed=1)
    assert np.array_equal(seen[0]["encoder_hidden_states"], np.concatenate([np.zeros_like(given), given]))
    for wrong, message in (
        (given * 1.02, "must be of unit length, found 1.02"),
        (given[..., :5], "embeddings must be"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe.generate(embeddings=wrong, seed=1)


@pytest.mark.parametrize(("values", "hole", "shown"), [((0.0, 1.0), 0.0, 0.0), ((-1.0, 1.0), -1.0, -1.0)])
def test_mask_and_hole_have_the_values_of_the_original(values: tuple[float, float], hole: float, shown: float) -> None:
    concat = (ConcatInput("mask", 1, mask_values=values), ConcatInput("masked_image_latent", 4, hole_value=hole))
    pipe, seen = watched(Conditioning(concat=concat), "inpainting", 9)
    mask = np.zeros((1, 32, 32), np.float32)
    mask[:, :16] = 1
    pipe.generate(image=np.full((1, 32, 32, 3), 0.75, np.float32), mask=mask, seed=1)
    sample = seen[0]["sample"][0]
    assert sample[4, :, 0].tolist() == [values[1]] * 4 + [values[0]] * 4
    # The test's encoder gives the picture itself, which is 2 * 0.75 - 1 outside of the hole.
    assert sample[5, :, 0] == pytest.approx([shown] * 4 + [0.5] * 4, abs=1e-6)


def test_rows_that_do_not_fit_the_number_of_pictures_are_refused() -> None:
    conditioning = Conditioning("class", classes=11)
    pipe, _ = watched(conditioning, "class-to-image", cond_encoder=class_encoder)
    with pytest.raises(UsageError, match="2 rows do not fit 3 pictures"):
        pipe.generate(class_label=[1, 2], seed=[1, 2, 3], guidance_scale=1.0)
