"""From the parts of a diffusers folder to components: tensors, axes, sample inputs and how to build each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from latentedge.export.model import ComponentSource
from latentedge.export.sources.diffusers_loading import Part
from latentedge.export.sources.diffusers_loras import Lora, builder
from latentedge.runtime.bundle import Array, Axis, Component, TensorSpec

TEXT_BATCH = Axis(1, 1, 16)
UNET_BATCH = Axis(1, 2, 16)
PICTURE_BATCH = Axis(1, 1, 8)
#: Picture sizes are compared on latents of at most this side, so that a comparison takes seconds.
COMPARED_SIDE = 32
#: Side of a small picture up to which every super-resolution model takes it whole, as its original does.
ENLARGED_SIDE = 128
TRAIN_TIMESTEPS = 1000


def side_of(size: int | Sequence[int]) -> tuple[int, int]:
    """A configuration's ``sample_size`` as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def halvings(config: Mapping[str, Any]) -> int:
    """How often a UNet or a first stage halves a side."""
    return len(config.get("block_out_channels") or config["decoder_block_out_channels"]) - 1


def latent_axes(
    size: tuple[int, int], smallest: int, batch: Axis, largest: int = COMPARED_SIDE, multiple: int = 1
) -> dict[str, Axis]:
    """Batch and latent sides: tuned for ``size``, allowed up to twice that and at least up to ``largest``.

    Any side is taken, as diffusers takes it: upsampling restores the size that was halved (``diffusers_modules.py``).
    Networks that resample in other ways take multiples of ``multiple``.
    """
    smallest = max(min(smallest, *size), multiple)
    height, width = (max(side // multiple, 1) * multiple for side in size)
    return {
        "batch": batch,
        "latent_height": Axis(smallest, height, max(2 * height, largest), multiple),
        "latent_width": Axis(smallest, width, max(2 * width, largest), multiple),
    }


def side_multiple(config: Mapping[str, Any], even_sizes: bool) -> int:
    """What a UNet's sides are multiples of: more than 1 where it is asked for or needed.

    Levels that resample by a filter or a kernel of their own need it.
    """
    blocks = [*config.get("down_block_types", ()), *config.get("up_block_types", ())]
    needed = any("Skip" in name or name.startswith("K") for name in blocks)
    return 2 ** halvings(config) if even_sizes or needed else 1


def compared_axes(axes: Mapping[str, Axis]) -> tuple[dict[str, int], tuple[dict[str, int], ...]]:
    """Axis lengths to trace with, and others to compare on: other batches, other heights and widths, odd ones."""
    if "latent_height" not in axes:
        return {"batch": 2}, ({"batch": 1}, {"batch": 3})
    height = min(axes["latent_height"].opt, COMPARED_SIDE)
    width = min(axes["latent_width"].opt, COMPARED_SIDE)
    # Not the smallest size: group norms over the few pixels of a 1 x 1 level tell nothing about an export.
    low, narrow = (min(2 * axes[name].min, axes[name].opt) for name in ("latent_height", "latent_width"))
    multiple = axes["latent_height"].multiple
    traced = {"batch": 2, "latent_height": height, "latent_width": max(width * 3 // 4, narrow)}
    others = (
        {"batch": 1, "latent_height": max(height * 3 // 4, low), "latent_width": width},
        {"batch": 3, "latent_height": low + multiple, "latent_width": max(width // 2, narrow) + 3 * multiple},
    )
    return _rounded(traced, multiple), tuple(_rounded(other, multiple) for other in others)


def _rounded(lengths: dict[str, int], multiple: int) -> dict[str, int]:
    """Sides rounded down to what the network takes; the batch as it is."""
    return {
        name: length if name == "batch" else max(length // multiple, 1) * multiple for name, length in lengths.items()
    }


def _source(part: Part, spec: Component, build: Any, sample_inputs: Any) -> ComponentSource:
    traced, others = compared_axes(spec.axes)
    # Where the original lay is nobody's business.
    config = {name: value for name, value in part.config.items() if name != "_name_or_path"}
    return ComponentSource(spec, build, sample_inputs, traced, others, config=config)


def unet_component(
    part: Part,
    conditions: Mapping[str, tuple[int, ...]],
    size: tuple[int, int],
    loras: Sequence[Lora],
    largest: int = COMPARED_SIDE,
    *,
    even_sizes: bool = False,
) -> ComponentSource:
    """The denoiser; ``conditions`` are its inputs after sample and timestep, with their shapes without the batch."""
    config = part.config
    multiple = side_multiple(config, even_sizes)
    axes = latent_axes(size, 2 ** halvings(config), UNET_BATCH, largest, multiple)
    sides = ("latent_height", "latent_width")
    inputs = [
        TensorSpec("sample", "float32", ("batch", int(config["in_channels"]), *sides)),
        TensorSpec("timestep", "float32", ("batch",)),
        *(TensorSpec(name, "float32", ("batch", *shape)) for name, shape in conditions.items()),
    ]
    outputs = (TensorSpec("out_sample", "float32", ("batch", int(config["out_channels"]), *sides)),)
    spec = Component("unet", tuple(inputs), outputs, axes)

    def wrap(model: Any) -> Any:
        from latentedge.export.sources.diffusers_unets import UNETS

        return UNETS[tuple(conditions)](model, any_size=multiple == 1)

    def sample_inputs(lengths: Mapping[str, int], random: np.random.Generator) -> dict[str, Array]:
        return {entry.name: _unet_input(entry, lengths, random) for entry in inputs}

    # UNet2DModel's Fourier features are of the timestep's logarithm.
    logarithmic = part.kind == "UNet2DModel" and config.get("time_embedding_type") == "fourier"
    source = _source(part, spec, builder(part, wrap, loras), sample_inputs)
    return replace(source, lowest_timestep=1.0) if logarithmic else source


def _unet_input(spec: TensorSpec, lengths: Mapping[str, int], random: np.random.Generator) -> Array:
    shape = spec.resolve(lengths)
    if spec.name == "timestep":
        return random.uniform(0, TRAIN_TIMESTEPS - 1, shape).astype(np.float32)
    if spec.name == "time_ids":
        return random.integers(0, 2048, shape).astype(np.float32)
    if spec.name == "timestep_cond":
        return np.sin(random.uniform(0, 2 * np.pi, shape)).astype(np.float32)
    return random.standard_normal(shape).astype(np.float32)


def text_component(
    part: Part, length: int, outputs: Sequence[str], loras: Sequence[Lora], *, masked: bool = False
) -> ComponentSource:
    """A text encoder of ``length`` tokens with the outputs named; ``masked``: padding is not attended to."""
    bert = part.kind == "LDMBertModel"
    width = int(part.config["d_model" if bert else "hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {
        "pooler_output": (width,),
        "text_embeds": (int(part.config.get("projection_dim") or width),),
    }
    spec = Component(
        part.name if not bert else "text_encoder",
        (TensorSpec("input_ids", "int64", ("batch", length)),),
        tuple(TensorSpec(name, "float32", ("batch", *shapes.get(name, (length, width)))) for name in outputs),
        {"batch": TEXT_BATCH},
    )

    def wrap(model: Any) -> Any:
        from latentedge.export.sources import diffusers_text

        if bert:
            return diffusers_text.LdmBertTextEncoder(model)
        return diffusers_text.ClipTextEncoder(model, outputs, masked=masked)

    def sample_inputs(lengths: Mapping[str, int], random: np.random.Generator) -> dict[str, Array]:
        ids = random.integers(0, int(part.config["vocab_size"]), (lengths["batch"], length))
        end = int(part.config.get("eos_token_id") or 0)
        for row, text in zip(ids, random.integers(2, length, len(ids)), strict=True):
            row[text:] = end
        return {"input_ids": ids.astype(np.int64)}

    return _source(part, spec, builder(part, wrap, loras), sample_inputs)


def first_stage_components(
    part: Part,
    size: tuple[int, int],
    scale_factor: float,
    largest: int = COMPARED_SIDE,
    *,
    normalised: tuple[bool, bool] = (False, False),
) -> list[ComponentSource]:
    """Encoder and decoder of a first stage, as ``vae_encoder`` and ``vae_decoder``.

    ``normalised``: whether encoder and decoder hold the latents' mean and deviation by channel that a model may state.
    """
    factor = 2 ** halvings(part.config)
    channels = int(part.config.get("vq_embed_dim") or part.config["latent_channels"])
    picture = tuple(f"{factor}*{axis}" if factor > 1 else axis for axis in ("latent_height", "latent_width"))
    axes = latent_axes(size, 2, PICTURE_BATCH, largest)
    stated = (part.config.get("latents_mean"), part.config.get("latents_std"))
    codings = _codings(part.kind, *(stated if used else (None, None) for used in normalised))
    latent = TensorSpec("latent_sample", "float32", ("batch", channels, "latent_height", "latent_width"))
    sample = TensorSpec("sample", "float32", ("batch", int(part.config["in_channels"]), *picture))
    decoded = TensorSpec("sample", "float32", ("batch", int(part.config["out_channels"]), *picture))
    moments = TensorSpec("latent_parameters", "float32", ("batch", 2 * channels, "latent_height", "latent_width"))

    def pictures(lengths: Mapping[str, int], random: np.random.Generator) -> dict[str, Array]:
        return {"sample": random.uniform(-1, 1, sample.resolve(lengths)).astype(np.float32)}

    def latents(lengths: Mapping[str, int], random: np.random.Generator) -> dict[str, Array]:
        draws = random.standard_normal(latent.resolve(lengths)).astype(np.float32)
        return {"latent_sample": np.asarray(draws / np.float32(scale_factor), np.float32)}

    encoded = moments if part.kind == "AutoencoderKL" else latent
    encoder = Component("vae_encoder", (sample,), (encoded,), axes)
    decoder = Component("vae_decoder", (latent,), (decoded,), axes)
    return [
        _source(part, encoder, builder(part, codings[0]), pictures),
        _source(part, decoder, builder(part, codings[1]), latents),
    ]


def _codings(kind: str, encoding: Sequence[Any], decoding: Sequence[Any]) -> tuple[Any, Any]:
    """What wraps the loaded model as encoder and as decoder. The networks' module needs torch, so it waits."""

    def encoder(model: Any) -> Any:
        from latentedge.export.sources import diffusers_autoencoders as networks

        if kind == "AutoencoderKL":
            return networks.MomentsEncoder(model, *encoding)
        return networks.CodebookEncoder(model) if kind == "VQModel" else networks.PlainCoder(model.encoder)

    def decoder(model: Any) -> Any:
        from latentedge.export.sources import diffusers_autoencoders as networks

        if kind == "AutoencoderKL":
            return networks.LatentDecoder(model, *decoding)
        return networks.CodebookDecoder(model) if kind == "VQModel" else networks.PlainCoder(model.decoder)

    return encoder, decoder
