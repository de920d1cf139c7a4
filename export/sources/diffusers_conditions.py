"""What a diffusers UNet takes beside its latent, read from the configurations of the parts: texts, sizes, numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentedge.export.sources.diffusers_components import halvings, side_of
from latentedge.export.sources.diffusers_loading import Part
from latentedge.runtime.errors import LatentEdgeError

#: LDM's text pipeline pads to this length, whatever its tokenizer and text encoder could take.
LDM_TOKENS = 77
#: Which embedding of the text or of pictures a UNet adds to its timestep's; "text" is made of the text itself.
ADDITIONS = (None, "text", "text_time")
#: Projections of the text at the UNet's entrance.
PROJECTIONS = (None, "text_proj")
PROJECTED = "CLIPTextModelWithProjection"
#: Stable Diffusion's latent side, where neither UNet nor first stage gives one.
LATENT_SIDE = 64
#: UNets saved by an older diffusers may state half of the side that they were trained on; Stable Diffusion's pipelines
#: then take 64 instead.
STATES_ITS_SIDE = (0, 9)


def check_inputs(unet: Part, class_name: str) -> None:
    """:class:`LatentEdgeError` for a UNet that needs more than a pipeline of ``class_name`` gives it."""
    config = unet.config
    needs: list[str] = []
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        needs.append("class labels")
    if config.get("addition_embed_type") not in ADDITIONS:
        needs.append(f"an added embedding of the type {config['addition_embed_type']}")
    if config.get("encoder_hid_dim") is not None and config.get("encoder_hid_dim_type") not in PROJECTIONS:
        needs.append(f"a condition of the type {config['encoder_hid_dim_type']}")
    if needs:
        raise LatentEdgeError(
            f"the UNet in {unet.folder} takes {' and '.join(needs)}, which a {class_name} does not give it.",
            hint="the class in model_index.json must be the one that the UNet was trained for",
        )
    if config.get("dual_cross_attention"):
        raise LatentEdgeError(
            f"the UNet in {unet.folder} attends to two texts (dual_cross_attention), which diffusers itself does not run.",
        )


def token_count(part: Part, tokenizer: Path) -> int:
    """To how many tokens a prompt is padded: the tokenizer's own length, at most what the text encoder takes."""
    positions = int(part.config["max_position_embeddings"])
    if part.kind == "LDMBertModel":
        return min(LDM_TOKENS, positions)
    settings = tokenizer / "tokenizer_config.json"
    try:
        length = (
            json.loads(settings.read_text(encoding="utf-8")).get("model_max_length") if settings.is_file() else None
        )
    except ValueError as error:
        raise LatentEdgeError(f"{settings} is damaged: {error}.", hint="copy or download it again") from error
    return positions if length is None else int(min(length, positions))


def pooled_encoder(text: Sequence[Part]) -> int:
    """Which text encoder gives SDXL's ``text_embeds``: the first with a projection, as its pipelines choose."""
    return next((number for number, part in enumerate(text) if part.kind == PROJECTED), len(text) - 1)


def time_ids(unet: Part, text: Sequence[Part]) -> int | None:
    """How many numbers an SDXL UNet takes beside the pooled text: the base model six sizes, the refiner five."""
    config = unet.config
    if config.get("addition_embed_type") != "text_time":
        return None
    pooled = int(text[pooled_encoder(text)].config["projection_dim"])
    return (int(config["projection_class_embeddings_input_dim"]) - pooled) // int(config["addition_time_embed_dim"])


def context_width(unet: Part, text: Sequence[Part]) -> int:
    """Width of ``encoder_hidden_states``: that of the texts, side by side, which must be what the UNet's levels take."""
    given = sum(int(part.config["d_model" if part.kind == "LDMBertModel" else "hidden_size"]) for part in text)
    projected = unet.config.get("encoder_hid_dim")
    stated = unet.config["cross_attention_dim"] if projected is None else projected
    widths = {stated} if isinstance(stated, int) else set(stated)
    # Levels without attention to the text may state any width.
    if given not in widths:
        raise LatentEdgeError(
            f"the UNet in {unet.folder} takes texts of the width {' or '.join(map(str, sorted(widths)))}; "
            f"{' and '.join(part.name for part in text)} give {given}.",
            hint="copy every part from the same checkpoint",
        )
    return given


def latent_side(unet: Mapping[str, Any], first_stage: Mapping[str, Any], *, older: bool) -> tuple[int, int]:
    """Latent height and width that the pipeline draws where none are asked for.

    ``older``: whether the pipeline's class corrects what UNets of older versions state. A UNet that states no side,
    whose pipeline then has to be asked for one, gets its first stage's.
    """
    size = unet.get("sample_size")
    if size is None:
        picture = first_stage.get("sample_size")
        return side_of(LATENT_SIDE) if picture is None else _divided(side_of(picture), 2 ** halvings(first_stage))
    if older and isinstance(size, int) and size < LATENT_SIDE and _version(unet) < STATES_ITS_SIDE:
        return side_of(LATENT_SIDE)
    return side_of(size)


def _divided(sides: tuple[int, int], factor: int) -> tuple[int, int]:
    return max(sides[0] // factor, 1), max(sides[1] // factor, 1)


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Major and minor version of the diffusers that wrote a configuration; without one it is a current one."""
    numbers = str(config.get("_diffusers_version", "1.0")).split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdecimal())
