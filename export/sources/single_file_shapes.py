"""Parameters of a U-Net and a first stage, read from the names and shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentedge.export.models.clip_text import ClipTextConfig
from latentedge.export.sources.checkpoint import Shape
from latentedge.runtime.errors import LatentEdgeError

Shapes = Mapping[str, Shape]

#: Every published CLIP text transformer has heads of 64.
CLIP_HEAD_WIDTH = 64
#: Names of (token embedding, positions, inner layer, layers) in each library's layout.
CLIP_NAMES = {
    "clip": (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.0.mlp.fc1.weight",
        "encoder.layers.{}.",
    ),
    "open_clip": (
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.{}.",
    ),
}


def _count(shapes: Shapes, pattern: str) -> int:
    """How many of ``pattern.format(0)``, ``pattern.format(1)``, ... are prefixes of a name."""
    number = 0
    while any(name.startswith(pattern.format(number)) for name in shapes):
        number += 1
    return number


def below(shapes: Shapes, prefix: str) -> dict[str, Shape]:
    """The tensors under ``prefix``, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def unet_parameters(shapes: Shapes) -> dict[str, Any]:
    """``UNetModel`` parameters but for the head counts, which shapes do not tell."""
    model_channels, in_channels = shapes["input_blocks.0.0.weight"][:2]
    widths: list[int] = []
    blocks = [0]
    depths = [0]
    context: int | None = None
    for number in range(1, _count(shapes, "input_blocks.{}.")):
        block = f"input_blocks.{number}."
        if f"{block}0.op.weight" in shapes:
            blocks.append(0)
            depths.append(0)
            continue
        level = len(blocks) - 1
        blocks[level] += 1
        widths[level:] = [shapes[f"{block}0.out_layers.3.weight"][0]]
        depths[level] = max(depths[level], _count(shapes, f"{block}1.transformer_blocks.{{}}."))
    to_k = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    if to_k in shapes:
        context = shapes[to_k][1]
    middle = _count(shapes, "middle_block.1.transformer_blocks.{}.")
    return {
        "in_channels": in_channels,
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": model_channels,
        "channel_mult": [width // model_channels for width in widths],
        "num_res_blocks": blocks,
        "attention_resolutions": [2**level for level, depth in enumerate(depths) if depth],
        # The last level's entry is also the middle block's.
        "transformer_depth": [*depths[:-1], depths[-1] or middle],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": len(shapes.get("middle_block.1.proj_in.weight", ())) == 2,
        "context_dim": context,
        "legacy": False,
    }


def first_stage_parameters(shapes: Shapes) -> dict[str, Any]:
    """``AutoencoderKL`` parameters; the nominal resolution only places attention."""
    width, in_channels = shapes["encoder.conv_in.weight"][:2]
    levels = _count(shapes, "encoder.down.{}.")
    resolution = 2 ** (levels + 4)
    return {
        "embed_dim": shapes["post_quant_conv.weight"][1],
        "ddconfig": {
            "double_z": True,
            "z_channels": shapes["decoder.conv_in.weight"][1],
            "resolution": resolution,
            "in_channels": in_channels,
            "out_ch": shapes["decoder.conv_out.weight"][0],
            "ch": width,
            "ch_mult": [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] // width for level in range(levels)],
            "num_res_blocks": _count(shapes, "encoder.down.0.block.{}."),
            "attn_resolutions": [
                resolution // 2**level
                for level in range(levels)
                if f"encoder.down.{level}.attn.0.norm.weight" in shapes
            ],
            "dropout": 0.0,
        },
    }


def clip_config(shapes: Shapes, layout: str) -> ClipTextConfig:
    """The size of a CLIP text transformer in the "clip" (transformers) or "open_clip" layout."""
    tokens, positions, inner, layers = CLIP_NAMES[layout]
    absent = [name for name in (tokens, positions, inner) if name not in shapes]
    if absent:
        raise LatentEdgeError(f"the text encoder lacks {', '.join(absent)}.", hint="the checkpoint is incomplete.")
    vocabulary, width = shapes[tokens]
    if width % CLIP_HEAD_WIDTH:
        raise LatentEdgeError(
            f"the text encoder is {width} wide: its number of heads cannot be told, it is no CLIP of published size.",
            hint="describe it in a clip_text_config.json beside the checkpoint.",
        )
    return ClipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes[inner][0],
        num_hidden_layers=_count(shapes, layers),
        num_attention_heads=width // CLIP_HEAD_WIDTH,
        max_position_embeddings=shapes[positions][0],
        hidden_act="quick_gelu" if layout == "clip" else "gelu",
    )
