"""The components of a CompVis model: declared tensors, axes, and inputs to compare exports on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from latentedge.export.model import ComponentSource, SampleInputs
from latentedge.export.models.stages import ClassUNet, FirstStageDecoder, FirstStageEncoder
from latentedge.export.sources.compvis_weights import Network
from latentedge.runtime.bundle import Array, Axis, Component, Dimension, Latent, TensorSpec, resolve_dimension

#: Latent side that every model takes at least, so that a tiny one can be compared on several sizes too.
SMALLEST_RANGE = 16
#: Largest batch that engines are built for: four pictures with guidance.
LARGEST_BATCH = 8
#: Longest row of CLIP embeddings: a prompt's and twenty neighbours'.
LARGEST_ROW = 21
#: Latent side up to which exports are compared at the model's own size.
COMPARED_SIDE = 64
#: Codewords that a decoder's sample inputs are made of.
SAMPLED_CODEWORDS = 256

LATENT_SHAPE = ("latent_height", "latent_width")


def normal_inputs(specs: tuple[TensorSpec, ...], timesteps: int, classes: int | None = None) -> SampleInputs:
    """N(0, 1) for float inputs, timesteps over the whole range, not only whole ones, and classes of all ``classes``."""

    def sample(axes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for spec in specs:
            shape = tuple(resolve_dimension(side, axes) for side in spec.shape)
            if spec.name == "timestep":
                arrays[spec.name] = rng.uniform(0, timesteps - 1, shape).astype(np.float32)
            elif spec.name == "class_labels" and classes is not None:
                arrays[spec.name] = rng.integers(0, classes, shape, np.int64)
            else:
                arrays[spec.name] = rng.standard_normal(shape, np.float32)
        return arrays

    return sample


def integer_inputs(spec: TensorSpec, below: int) -> SampleInputs:
    """Uniform integers from 0 to ``below`` - 1."""

    def sample(axes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
        return {spec.name: rng.integers(0, below, spec.resolve(axes), np.int64)}

    return sample


def one_hot_inputs(spec: TensorSpec) -> SampleInputs:
    """One-hot label maps, labels on axis 1."""

    def sample(axes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
        batch, labels, height, width = spec.resolve(axes)
        drawn = rng.integers(0, labels, (batch, height, width))
        return {spec.name: np.moveaxis(np.eye(labels, dtype=np.float32)[drawn], -1, 1).copy()}

    return sample


def picture_inputs(spec: TensorSpec) -> SampleInputs:
    """Pictures in [-1, 1] with structure at every scale: a coarse pattern, repeated, with noise on it."""

    def sample(axes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
        batch, channels, height, width = spec.resolve(axes)
        coarse = rng.uniform(-1, 1, (batch, channels, -(-height // 8), -(-width // 8)))
        picture = np.repeat(np.repeat(coarse, 8, axis=2), 8, axis=3)[:, :, :height, :width]
        noisy = 0.8 * picture + 0.2 * rng.uniform(-1, 1, picture.shape)
        return {spec.name: noisy.astype(np.float32)}

    return sample


def latent_inputs(spec: TensorSpec, scale_factor: float) -> SampleInputs:
    """Latents as a diffusion run ends: N(0, 1) divided by the scale factor."""

    def sample(axes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
        noise = rng.standard_normal(spec.resolve(axes), np.float32)
        return {spec.name: (noise / np.float32(scale_factor)).astype(np.float32)}

    return sample


def codeword_inputs(spec: TensorSpec, codebook: Callable[[], Array]) -> SampleInputs:
    """Latents around codewords, each closer to its own than to any other.

    A latent half-way between two codewords goes either way with the last bit of its distances, in the original too:
    comparing there would measure chance.
    """

    def sample(axes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
        batch, width, *sides = spec.resolve(axes)
        book = np.unique(codebook().astype(np.float64), axis=0)
        chosen = book[rng.permutation(len(book))[:SAMPLED_CODEWORDS]]
        squared = (chosen**2).sum(1)[:, None] + (book**2).sum(1)[None] - 2 * chosen @ book.T
        gaps = np.sqrt(np.maximum(np.partition(squared, 1, axis=1)[:, 1], 0))
        drawn = rng.integers(0, len(chosen), (batch, *sides))
        direction = rng.standard_normal((*drawn.shape, width))
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        latents = chosen[drawn] + 0.25 * gaps[drawn][..., None] * direction
        return {spec.name: np.moveaxis(latents, -1, 1).astype(np.float32)}

    return sample


def latent_axes(height: int, width: int, multiple: int, batch: int) -> dict[str, Axis]:
    """Batch and latent size: from one step of ``multiple`` to twice the model's own size."""

    def axis(side: int) -> Axis:
        own = max(side // multiple, 1) * multiple
        return Axis(multiple, own, max(2 * own, 4 * multiple, SMALLEST_RANGE), multiple)

    return {
        "batch": Axis(1, batch, LARGEST_BATCH),
        "latent_height": axis(height),
        "latent_width": axis(width),
    }


def compared_axes(axes: Mapping[str, Axis], **others: int) -> tuple[dict[str, int], tuple[dict[str, int], ...]]:
    """Axis lengths to trace with, and others to compare on: oblong, other batches, and the model's own size."""
    unit = axes["latent_height"].multiple
    small = max(unit, 4)
    own = {name: min(axes[name].opt, max(COMPARED_SIDE // unit, 1) * unit) for name in LATENT_SHAPE}
    trace = {"batch": 2, "latent_height": 2 * small, "latent_width": 3 * small, **others}
    compare = (
        {"batch": 1, "latent_height": 3 * small, "latent_width": 2 * small, **dict.fromkeys(others, 1)},
        {"batch": 3, "latent_height": 2 * small, "latent_width": 2 * small, **dict.fromkeys(others, 5)},
        {"batch": 1, **own, **others},
    )
    return trace, compare


def unet_component(
    network: Network,
    size: tuple[int, int],
    timesteps: int,
    guided: bool,
    context: tuple[int | str, int] | None,
    classes: int | None = None,
) -> ComponentSource:
    """The denoiser. ``context`` is (tokens, width) of ``encoder_hidden_states``; tokens may be an axis.

    ``classes``: how many it knows itself, as an input ``class_labels``.
    """
    skeleton = network.skeleton()
    inputs = [
        TensorSpec("sample", "float32", ("batch", skeleton.in_channels, *LATENT_SHAPE)),
        TensorSpec("timestep", "float32", ("batch",)),
    ]
    multiple = 2 ** (len(network_levels(skeleton)) - 1)
    axes = latent_axes(*size, multiple, 2 if guided else 1)
    others: dict[str, int] = {}
    if context is not None:
        tokens, width = context
        inputs.append(TensorSpec("encoder_hidden_states", "float32", ("batch", tokens, width)))
        if isinstance(tokens, str):
            axes[tokens] = Axis(1, 1, LARGEST_ROW)
            others[tokens] = 3
    if classes is not None:
        inputs.append(TensorSpec("class_labels", "int64", ("batch",)))
    outputs = (TensorSpec("out_sample", "float32", ("batch", skeleton.out_channels, *LATENT_SHAPE)),)
    trace, compare = compared_axes(axes, **others)
    spec = Component("unet", tuple(inputs), outputs, axes)
    build = network.load if classes is None else lambda: ClassUNet(network.load()).eval()
    return ComponentSource(spec, build, normal_inputs(spec.inputs, timesteps, classes), trace, compare)


def network_levels(unet: Any) -> tuple[int, ...]:
    """The channel multiple of each level of a U-Net."""
    levels: tuple[int, ...] = unet.channel_mult
    return levels


def first_stage_components(
    network: Network, latent: Latent, size: tuple[int, int], picture_channels: int, quantised: bool = True
) -> tuple[ComponentSource, ComponentSource]:
    """Encoder and decoder of a first stage; ``size`` is the latent's. ``quantised``: through the codebook it has."""
    axes = latent_axes(*size, 1, 1)
    trace, compare = compared_axes(axes)
    picture_shape: tuple[Dimension, ...] = (
        "batch",
        picture_channels,
        *(f"{latent.downscale}*{side}" for side in LATENT_SHAPE),
    )
    picture = TensorSpec("sample", "float32", picture_shape)
    vq = latent.encoding == "vq"
    encoded = (
        TensorSpec("latent_sample", "float32", ("batch", latent.channels, *LATENT_SHAPE))
        if vq
        else TensorSpec("latent_parameters", "float32", ("batch", 2 * latent.channels, *LATENT_SHAPE))
    )
    taken = TensorSpec("latent_sample", "float32", ("batch", latent.channels, *LATENT_SHAPE))
    encoder = Component("vae_encoder", (picture,), (encoded,), axes)
    decoder = Component("vae_decoder", (taken,), (picture,), axes)

    def codebook() -> Array:
        table: Array = network.checkpoint.tensor(network.names["quantize.embedding.weight"]).float().numpy()
        return table

    latents = codeword_inputs(taken, codebook) if vq and quantised else latent_inputs(taken, latent.scale_factor)
    return (
        ComponentSource(
            encoder, lambda: FirstStageEncoder(network.load()).eval(), picture_inputs(picture), trace, compare
        ),
        ComponentSource(decoder, lambda: FirstStageDecoder(network.load(), quantised).eval(), latents, trace, compare),
    )


def token_component(network: Network, length: int, vocabulary: int, width: int, guided: bool) -> ComponentSource:
    """A text encoder, or a layout's."""
    ids = TensorSpec("input_ids", "int64", ("batch", length))
    hidden = TensorSpec("last_hidden_state", "float32", ("batch", length, width))
    axes = {"batch": Axis(1, 2 if guided else 1, LARGEST_BATCH)}
    spec = Component("text_encoder", (ids,), (hidden,), axes)
    return ComponentSource(
        spec, network.load, integer_inputs(ids, vocabulary), {"batch": 2}, ({"batch": 1}, {"batch": 3})
    )


def class_component(network: Network, classes: int, width: int) -> ComponentSource:
    """A class embedder."""
    labels = TensorSpec("class_labels", "int64", ("batch",))
    hidden = TensorSpec("encoder_hidden_states", "float32", ("batch", 1, width))
    spec = Component("cond_encoder", (labels,), (hidden,), {"batch": Axis(1, 1, LARGEST_BATCH)})
    return ComponentSource(
        spec, network.load, integer_inputs(labels, classes), {"batch": 2}, ({"batch": 1}, {"batch": 3})
    )


def rescaler_component(
    network: Network, labels: int, channels: int, factor: int, size: tuple[int, int]
) -> ComponentSource:
    """A semantic map's rescaler; ``factor`` is the ratio of map to latent side."""
    axes = latent_axes(*size, 1, 1)
    trace, compare = compared_axes(axes)
    one_hot = TensorSpec("segmentation", "float32", ("batch", labels, *(f"{factor}*{side}" for side in LATENT_SHAPE)))
    condition = TensorSpec("latent_condition", "float32", ("batch", channels, *LATENT_SHAPE))
    spec = Component("cond_encoder", (one_hot,), (condition,), axes)
    return ComponentSource(spec, network.load, one_hot_inputs(one_hot), trace, compare)
