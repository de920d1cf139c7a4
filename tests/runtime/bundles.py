"""Bundles whose engines are Python functions, for tests of everything above engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.runtime.bundle import (
    Array,
    Axis,
    Bundle,
    Component,
    Conditioning,
    Defaults,
    Latent,
    Manifest,
    TensorSpec,
    TextEncoder,
)
from latentedge.runtime.engines.null import NullEngine
from latentedge.runtime.pipeline import Pipeline
from tests.tiny_bundles import SCHEDULE, manifest_of

SIZES = {"latent_height": Axis(2, 8, 64, 2), "latent_width": Axis(2, 8, 64, 2)}
BATCH = {"batch": Axis(1, 1, 8)}
HEIGHT_WIDTH = ("latent_height", "latent_width")
PICTURE = ("batch", 3, "4*latent_height", "4*latent_width")
WIDTH = 6
CONTEXT = TensorSpec("encoder_hidden_states", "float32", ("batch", 5, WIDTH))


def specs(**shapes: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, dtype, shape) for name, (dtype, shape) in shapes.items())


def unet(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """A smooth function of everything that goes in, so that a wrong batch order or a lost input shows."""
    sample, timestep = inputs["sample"][:, :4], inputs["timestep"][:, None, None, None]
    output = 0.3 * sample * np.cos(timestep / 1000) + 0.1 * np.sin(sample)
    for name, array in inputs.items():
        if name not in ("sample", "timestep"):
            output = output + 0.05 * array.mean(axis=tuple(range(1, array.ndim)))[:, None, None, None]
    return {
        "out_sample": (
            output + 0.05 * inputs["sample"][:, 4:].mean(axis=(1,), keepdims=True).sum(1, keepdims=True)
            if inputs["sample"].shape[1] > 4
            else output
        ).astype(np.float32)
    }


def decoder(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    return {"sample": np.tanh(inputs["latent_sample"][:, :3].repeat(4, 2).repeat(4, 3))}


def encoder(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    small = inputs["sample"][:, :, ::4, ::4]
    mean = np.concatenate([small, small[:, :1]], axis=1)
    return {"latent_parameters": np.concatenate([mean, np.full_like(mean, -2.0)], axis=1)}


def text_encoder(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    ids = inputs["input_ids"].astype(np.float32)
    return {"last_hidden_state": np.sin(ids[:, :, None] * (1 + np.arange(WIDTH, dtype=np.float32)))}


FUNCTIONS = {"unet": unet, "vae_decoder": decoder, "vae_encoder": encoder, "text_encoder": text_encoder}


def text_components(channels: int = 4) -> dict[str, Component]:
    latent, axes = ("batch", 4, *HEIGHT_WIDTH), {**BATCH, **SIZES}
    sample = ("batch", channels, *HEIGHT_WIDTH)
    return {
        "text_encoder": Component(
            "text_encoder",
            specs(input_ids=("int64", ("batch", 5))),
            specs(last_hidden_state=("float32", ("batch", 5, WIDTH))),
            BATCH,
        ),
        "unet": Component(
            "unet",
            (*specs(sample=("float32", sample), timestep=("float32", ("batch",))), CONTEXT),
            specs(out_sample=("float32", latent)),
            axes,
        ),
        "vae_decoder": Component(
            "vae_decoder", specs(latent_sample=("float32", latent)), specs(sample=("float32", PICTURE)), axes
        ),
        "vae_encoder": Component(
            "vae_encoder",
            specs(sample=("float32", PICTURE)),
            specs(latent_parameters=("float32", ("batch", 8, *HEIGHT_WIDTH))),
            axes,
        ),
    }


def text_manifest(**changes: Any) -> Manifest:
    manifest = manifest_of(
        *text_components().values(),
        latent=Latent(4, 4, scale_factor=0.5),
        conditioning=Conditioning("text", (TextEncoder("text_encoder", None),), unconditional="empty_text"),
        schedule=SCHEDULE,
        defaults=Defaults(32, 32, "ddim", steps=5, guidance_scale=3.0),
    )
    return dataclasses.replace(manifest, **changes)


def pipeline(manifest: Manifest | None = None, **functions: Any) -> Pipeline:
    manifest = manifest or text_manifest()
    engines = {
        name: NullEngine(component, {**FUNCTIONS, **functions}[name]) for name, component in manifest.components.items()
    }
    return Pipeline(Bundle(Path("test.bundle"), manifest), "null", "fp32", engines=engines)
