"""Tiny sources: real torch modules small enough to export in a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from latentedge.export.model import ComponentSource, SourceModel
from latentedge.runtime.bundle import Array, Axis, Component, Conditioning, Defaults, Latent, Source, TensorSpec

BATCH = Axis(1, 2, 8)
LATENT = Axis(4, 16, 64, multiple=2)


class TinyDecoder(nn.Module):
    """Latent [batch, 4, h, w] to picture [batch, 3, 2h, 2w]."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latent_sample: Tensor) -> Tensor:
        hidden = functional.silu(self.norm(self.conv_in(latent_sample)))
        return self.conv_out(functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))


class TinyDenoiser(nn.Module):
    """A denoiser with a time embedding, attention to a context, and a down and up path."""

    def __init__(self, channels: int = 32, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Linear(32, channels)
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(width, channels, bias=False)
        self.to_v = nn.Linear(width, channels, bias=False)
        self.group_norm = nn.GroupNorm(8, 2 * channels)
        self.conv_out = nn.Conv2d(2 * channels, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(16, dtype=torch.float32) * (np.log(10000.0) / 16))
        angles = timestep[:, None] * frequencies[None]
        embedding = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        skip = self.conv_in(sample)
        hidden = self.down(skip) + embedding[:, :, None, None]
        batch, channels, height, width = hidden.shape
        tokens = self.norm(hidden.flatten(2).transpose(1, 2))
        query, key, value = self.to_q(tokens), self.to_k(encoder_hidden_states), self.to_v(encoder_hidden_states)
        attended = torch.softmax(query @ key.transpose(-1, -2) * channels**-0.5, dim=-1) @ value
        hidden = hidden + attended.transpose(1, 2).reshape(batch, channels, height, width)
        hidden = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
        hidden = functional.gelu(self.group_norm(torch.cat([hidden, skip], dim=1)))
        return self.conv_out(hidden)


DECODER = Component(
    "vae_decoder",
    inputs=(TensorSpec("latent_sample", "float32", ("batch", 4, "latent_height", "latent_width")),),
    outputs=(TensorSpec("sample", "float32", ("batch", 3, "2*latent_height", "2*latent_width")),),
    axes={"batch": BATCH, "latent_height": LATENT, "latent_width": LATENT},
)
UNET = Component(
    "unet",
    inputs=(
        TensorSpec("sample", "float32", ("batch", 4, "latent_height", "latent_width")),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", 7, 16)),
    ),
    outputs=(TensorSpec("out_sample", "float32", ("batch", 4, "latent_height", "latent_width")),),
    axes={"batch": BATCH, "latent_height": LATENT, "latent_width": LATENT},
)


def sample_inputs(component: Component) -> Callable[[Mapping[str, int], np.random.Generator], dict[str, Array]]:
    def make(axes: Mapping[str, int], generator: np.random.Generator) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for spec in component.inputs:
            shape = spec.resolve(axes)
            arrays[spec.name] = generator.standard_normal(shape).astype(np.float32)
            if spec.name == "timestep":
                arrays[spec.name] = generator.uniform(0, 999, shape).astype(np.float32)
        return arrays

    return make


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> Callable[[], nn.Module]:
    """``build`` with the same weights on every call."""

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return build()

    return make


def component(spec: Component, build: Callable[[], nn.Module], **changes: Any) -> ComponentSource:
    axes = {"batch": 2, "latent_height": 8, "latent_width": 12}
    source = ComponentSource(
        spec,
        seeded(build),
        sample_inputs(spec),
        trace_axes={name: axes[name] for name in spec.axes},
        compare_axes=({name: {"batch": 1, "latent_height": 6, "latent_width": 4}[name] for name in spec.axes},),
    )
    return dataclasses.replace(source, **changes)


def tiny_model(*components: ComponentSource, **changes: Any) -> SourceModel:
    """A source model of ``components``; without any: a denoiser and a decoder."""
    chosen = components or (component(UNET, TinyDenoiser), component(DECODER, TinyDecoder))
    model = SourceModel(
        family="tiny",
        task="text-to-image",
        source=Source("test", {}),
        latent=Latent(channels=4, downscale=2, scale_factor=0.5),
        conditioning=Conditioning(cross_attention="embeddings", embedding_width=16),
        schedule={"dialect": "compvis", "num_train_timesteps": 1000},
        defaults=Defaults(height=16, width=24),
        components=chosen,
    )
    return dataclasses.replace(model, **changes)
