"""Stable Diffusion XL in one file, in the original layout: two text encoders, and a U-Net that takes sizes.

Facts: ``sd_xl_base.yaml`` and ``sgm/modules/encoders/modules.py`` of Stability-AI/generative-models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentedge.export.model import ComponentSource, SourceModel, SourceOptions, TokenizerSource
from latentedge.export.models.clip_text import ClipTextConfig, FrozenCLIPEmbedder
from latentedge.export.models.open_clip_text import FrozenOpenCLIPEmbedder
from latentedge.export.models.registry import build_network
from latentedge.export.models.unet import UNetModel, timestep_embedding
from latentedge.export.sources.checkpoint import Checkpoint, check_fit
from latentedge.export.sources.compvis_components import (
    LARGEST_BATCH,
    LATENT_SHAPE,
    compared_axes,
    first_stage_components,
    integer_inputs,
    latent_axes,
)
from latentedge.export.sources.compvis_tokenizer import TokenizerNeed, find_tokenizer
from latentedge.export.sources.compvis_weights import FIRST, UNET, Network, ignored, network_of
from latentedge.export.sources.diffusers_kinds import SDXL, SDXL_INPAINTING, Kind
from latentedge.export.sources.single_file import SCALED_LINEAR
from latentedge.export.sources.single_file_shapes import below, clip_config, first_stage_parameters, unet_parameters
from latentedge.runtime.bundle import (
    Array,
    Axis,
    Component,
    Conditioning,
    Defaults,
    Dimension,
    Latent,
    Source,
    TensorSpec,
    TextEncoder,
)
from latentedge.runtime.errors import LatentEdgeError, UsageError

FIRST_ENCODER, SECOND_ENCODER = "conditioner.embedders.0.", "conditioner.embedders.1."
#: Original size, crop corner, target size; each number becomes sinusoids of this width.
TIME_IDS, SIZE_WIDTH = 6, 256
SCALE_FACTOR = 0.13025
#: Told apart by what they append to the latent.
KINDS = (SDXL, SDXL_INPAINTING)
LATENT_SIDE = 128
SCHEDULE: dict[str, object] = {
    **SCALED_LINEAR,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}


class ExtendedUNet(nn.Module):
    """The U-Net with its vector condition made from pooled text and sizes."""

    def __init__(self, network: UNetModel) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        """``text_embeds`` [batch, width] and ``time_ids`` float32 [batch, 6] in pixels; the rest as ``UNetModel``."""
        batch = sample.shape[0]
        sizes = timestep_embedding(time_ids.flatten(), SIZE_WIDTH).reshape(batch, TIME_IDS * SIZE_WIDTH)
        vector = torch.cat([text_embeds, sizes], dim=-1)
        result: Tensor = self.network(sample, timestep, encoder_hidden_states, vector)
        return result


class FirstTextEncoder(nn.Module):
    """CLIP: the last states after the final norm, and the penultimate layer's, which the UNet takes."""

    def __init__(self, encoder: FrozenCLIPEmbedder) -> None:
        super().__init__()
        self.text_model = encoder.transformer.text_model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids int64 [batch, tokens] to two states [batch, tokens, width]."""
        states = self.text_model.hidden_states(input_ids)
        return self.text_model.final_layer_norm(states[-1]), states[-2]


class SecondTextEncoder(nn.Module):
    """OpenCLIP: the states that ``FirstTextEncoder`` gives, and the projected state at the end of the text."""

    def __init__(self, encoder: FrozenOpenCLIPEmbedder) -> None:
        super().__init__()
        self.model = encoder.model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids int64 [batch, tokens] to two states [batch, tokens, width] and pooled [batch, width]."""
        states = self.model.hidden_states(input_ids)
        last = self.model.ln_final(states[-1])
        # The end token has the largest number.
        ends = input_ids.to(torch.int32).argmax(dim=-1)[:, None, None].expand(-1, 1, last.shape[2])
        return last, states[-2], last.gather(1, ends).squeeze(1) @ self.model.text_projection


def load_xl(checkpoint: Checkpoint, options: SourceOptions) -> SourceModel:
    """Read a Stable Diffusion XL base or inpainting model; others are refused by their channels."""
    if options.loras:
        raise UsageError("LoRA files are merged into diffusers layouts only.", hint="leave --lora out.")
    shapes = checkpoint.shapes
    unet, first_stage, kind, downscale = _networks(checkpoint)
    first_config = clip_config(below(shapes, f"{FIRST_ENCODER}transformer.text_model."), "clip")
    second_config = clip_config(below(shapes, f"{SECOND_ENCODER}model."), "open_clip")
    first = network_of(lambda: FrozenCLIPEmbedder(text_config=first_config), FIRST_ENCODER, checkpoint)
    second = network_of(lambda: FrozenOpenCLIPEmbedder(text_config=second_config), SECOND_ENCODER, checkpoint)
    expected = {name: shape for network in (unet, first_stage, first, second) for name, shape in network.shapes.items()}
    found = {name: shape for name, shape in shapes.items() if not ignored(name)}
    check_fit(expected, found, checkpoint.path.name, "Stable Diffusion XL")
    latent = Latent(int(first_stage.shapes[f"{FIRST}post_quant_conv.weight"][1]), downscale, SCALE_FACTOR)
    size = (LATENT_SIDE, LATENT_SIDE)
    tokenizers = _tokenizers(checkpoint, options, first_config, second_config)
    messages = [f"{checkpoint.path.name} has no YAML and is read as Stable Diffusion XL"]
    if len(tokenizers) < 2:
        messages.append("there is no tokenizer: the bundle takes token ids only; --tokenizer DIR|ID names one")
    encoders = _encoders(first_config, second_config, tokenizers)
    components = (
        _text_component(encoders[0], first, FirstTextEncoder, first_config),
        _text_component(encoders[1], second, SecondTextEncoder, second_config),
        _unet_component(unet, size, first_config.hidden_size + second_config.hidden_size, second_config.hidden_size),
        *first_stage_components(first_stage, latent, size, 3),
    )
    index = {component.spec.name: ["diffusers", "OnnxRuntimeModel"] for component in components}
    return SourceModel(
        family="stable-diffusion-xl",
        task=kind.task,
        source=Source("single-file", {checkpoint.path.name: checkpoint.sha256}, notes=("read from its shapes",)),
        latent=latent,
        conditioning=Conditioning(
            cross_attention="text",
            encoders=encoders,
            concat=kind.concat,
            unconditional="zeros",
            time_ids=TIME_IDS,
            guidance_below_one=False,
        ),
        schedule=SCHEDULE,
        defaults=Defaults(
            height=downscale * LATENT_SIDE,
            width=downscale * LATENT_SIDE,
            steps=kind.steps,
            guidance_scale=kind.guidance_scale,
            strength=kind.strength,
        ),
        components=components,
        tokenizers=tokenizers,
        model_index={"_class_name": kind.class_name, "force_zeros_for_empty_prompt": True, **index},
        messages=tuple(messages),
    )


def _networks(checkpoint: Checkpoint) -> tuple[Network, Network, Kind, int]:
    """U-Net and first stage, the pipeline that they are for, and the pixels of a latent pixel."""
    unet_shapes = below(checkpoint.shapes, UNET)
    try:
        vector = unet_shapes["label_emb.0.0.weight"][1]
        parameters = {
            **unet_parameters(unet_shapes),
            "num_classes": "sequential",
            "adm_in_channels": vector,
            "num_head_channels": 64,
        }
        first_stage = first_stage_parameters(below(checkpoint.shapes, FIRST))
    except (KeyError, IndexError) as error:
        raise LatentEdgeError(
            f"{checkpoint.path.name} lacks the tensor {error}, which every Stable Diffusion XL has.",
            hint="the file is incomplete: compare its size and SHA-256 with its origin.",
        ) from error
    extra = parameters["in_channels"] - parameters["out_channels"]
    kind = next((kind for kind in KINDS if sum(entry.channels for entry in kind.concat) == extra), None)
    if kind is None:
        raise UsageError(
            f"the U-Net takes {parameters['in_channels']} channels: only Stable Diffusion XL's base and inpainting models "
            "are read.",
            hint="use its diffusers folder.",
        )
    unet_target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    stage_target = "ldm.models.autoencoder.AutoencoderKL"
    return (
        network_of(lambda: build_network(unet_target, parameters), UNET, checkpoint),
        network_of(lambda: build_network(stage_target, first_stage), FIRST, checkpoint),
        kind,
        2 ** (len(first_stage["ddconfig"]["ch_mult"]) - 1),
    )


def _tokenizers(
    checkpoint: Checkpoint, options: SourceOptions, first: ClipTextConfig, second: ClipTextConfig
) -> dict[str, TokenizerSource]:
    """One vocabulary, padded with the end token for the first encoder and with zeros for the second."""
    found = {}
    for name, kind, config in (("tokenizer", "clip", first), ("tokenizer_2", "open_clip", second)):
        need = TokenizerNeed(kind, config.max_position_embeddings, config.vocab_size)
        source = find_tokenizer(checkpoint.path.parent, options.tokenizer, need)
        if source is not None:
            found[name] = source
    return found


def _encoders(
    first: ClipTextConfig, second: ClipTextConfig, tokenizers: Mapping[str, TokenizerSource]
) -> tuple[TextEncoder, TextEncoder]:
    def state(config: ClipTextConfig) -> str:
        return f"hidden_states.{config.num_hidden_layers - 1}"

    names = [name if name in tokenizers else None for name in ("tokenizer", "tokenizer_2")]
    return (
        TextEncoder("text_encoder", names[0], state(first)),
        TextEncoder("text_encoder_2", names[1], state(second), "text_embeds"),
    )


def _text_component(
    encoder: TextEncoder, network: Network, wrapper: Callable[[Any], nn.Module], config: ClipTextConfig
) -> ComponentSource:
    length, width = config.max_position_embeddings, config.hidden_size
    ids = TensorSpec("input_ids", "int64", ("batch", length))
    outputs = [TensorSpec(name, "float32", ("batch", length, width)) for name in ("last_hidden_state", encoder.output)]
    if encoder.pooled_output is not None:
        outputs.append(TensorSpec(encoder.pooled_output, "float32", ("batch", width)))
    spec = Component(encoder.component, (ids,), tuple(outputs), {"batch": Axis(1, 2, LARGEST_BATCH)})
    inputs = integer_inputs(ids, config.vocab_size)
    return ComponentSource(
        spec, lambda: wrapper(network.load()).eval(), inputs, {"batch": 2}, ({"batch": 1}, {"batch": 3})
    )


def _unet_component(network: Network, size: tuple[int, int], width: int, pooled: int) -> ComponentSource:
    skeleton = network.skeleton()
    axes = latent_axes(*size, 2 ** (len(skeleton.channel_mult) - 1), 2)
    shapes: dict[str, tuple[Dimension, ...]] = {
        "sample": ("batch", skeleton.in_channels, *LATENT_SHAPE),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", 77, width),
        "text_embeds": ("batch", pooled),
        "time_ids": ("batch", TIME_IDS),
    }
    inputs = tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())
    outputs = (TensorSpec("out_sample", "float32", ("batch", skeleton.out_channels, *LATENT_SHAPE)),)

    def sample(lengths: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for spec in inputs:
            shape = spec.resolve(lengths)
            largest = {"timestep": 999.0, "time_ids": 2048.0}.get(spec.name)
            drawn = rng.standard_normal(shape) if largest is None else rng.uniform(0, largest, shape)
            arrays[spec.name] = drawn.astype(np.float32)
        return arrays

    trace, compare = compared_axes(axes)
    return ComponentSource(
        Component("unet", inputs, outputs, axes), lambda: ExtendedUNet(network.load()).eval(), sample, trace, compare
    )
