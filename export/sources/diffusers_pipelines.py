"""What each pipeline class of diffusers is: its task, its parts, its conditioning and its defaults.

What the runtime does with the conditioning (order of the branches, scaling, draws) is described in ``docs/diffusers.md``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer

from latentedge.export.model import ComponentSource, SourceModel, SourceOptions, TokenizerSource
from latentedge.export.sources.diffusers_components import (
    COMPARED_SIDE,
    ENLARGED_SIDE,
    first_stage_components,
    halvings,
    side_of,
    text_component,
    unet_component,
)
from latentedge.export.sources.diffusers_conditions import (
    check_inputs,
    context_width,
    latent_side,
    pooled_encoder,
    time_ids,
    token_count,
)
from latentedge.export.sources.diffusers_kinds import LDM, OFFSET, SDXL, Kind
from latentedge.export.sources.diffusers_loading import (
    Part,
    component_class,
    library_class,
    read_json,
    read_part,
)
from latentedge.export.sources.diffusers_loras import Lora, lora_targets, mixed_alphas
from latentedge.export.sources.tokenizers import load_tokenizer
from latentedge.runtime.bundle import (
    Conditioning,
    Defaults,
    Latent,
    Source,
    TextEncoder,
    file_sha256,
)
from latentedge.runtime.errors import LatentEdgeError, UsageError
from latentedge.runtime.samplers import SAMPLERS

ENCODINGS = {"AutoencoderKL": "kl", "VQModel": "vq", "AutoencoderTiny": "plain"}
#: Original size, crop corner, and the target size or, in the refiner, an aesthetic score.
SDXL_TIME_IDS = (6, 5)


@dataclass(frozen=True)
class Parts:
    """The parts of one pipeline's folder that are needed."""

    unet: Part
    first_stage: Part
    text: tuple[Part, ...]
    tokenizers: tuple[Path, ...]

    def token_count(self, number: int) -> int:
        """To how many tokens the text encoder ``number`` takes a prompt."""
        return token_count(self.text[number], self.tokenizers[number])


def read_pipeline(folder: Path, index: Mapping[str, Any], kind: Kind, options: SourceOptions) -> SourceModel:
    """Describe the pipeline in ``folder``; nothing but configurations, tokenizers and file hashes is read."""
    return describe(folder, index, kind, _parts(folder, index, kind), options)


def describe(
    folder: Path, index: Mapping[str, Any], kind: Kind, parts: Parts, options: SourceOptions, layout: str = "diffusers"
) -> SourceModel:
    """The source model of a pipeline whose parts were found, whatever their weights are stored as."""
    check_inputs(parts.unet, kind.class_name)
    kind = _as_the_unet_needs(kind, parts.unet)
    messages: list[str] = []
    loras = _loras(options, kind, parts)
    messages += [message for message in map(mixed_alphas, loras) if message is not None]
    scale_factor = float(parts.first_stage.config.get("scaling_factor") or 1.0) if kind.scaled else 1.0
    tokenizers = _tokenizers(parts, options, messages)
    conditioning = _conditioning(kind, parts, index, tokenizers)
    if conditioning.time_ids not in (None, *SDXL_TIME_IDS):
        messages.append(f"the UNet takes {conditioning.time_ids} time ids: pass them as time_ids")
    factor = 2 ** halvings(parts.first_stage.config)
    return SourceModel(
        family=kind.family,
        task=kind.task,
        source=Source(layout, _hashes(folder, parts, loras), _licence(folder), tuple(_notes(loras))),
        latent=Latent(
            channels=int(parts.unet.config["out_channels"]),
            downscale=factor,
            scale_factor=scale_factor,
            encoding=ENCODINGS[parts.first_stage.kind],
        ),
        conditioning=conditioning,
        schedule=_schedule(folder, kind, layout, messages),
        defaults=_defaults(kind, parts, folder, index, factor, messages),
        components=tuple(_components(kind, parts, conditioning, scale_factor, loras, even_sizes=options.even_sizes)),
        tokenizers=tokenizers,
        model_index=dict(index),
        messages=tuple(messages),
    )


def _parts(folder: Path, index: Mapping[str, Any], kind: Kind) -> Parts:
    def part(name: str) -> Part:
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            raise LatentEdgeError(
                f"{folder / 'model_index.json'} names no {name}, which a {kind.class_name} needs.",
                hint="copy or download the whole checkpoint folder",
            )
        return read_part(folder, name, str(entry[1]))

    text = [(part(encoder), folder / tokenizer) for encoder, tokenizer in kind.text if _present(index, encoder)]
    if kind.text and not text:
        part(kind.text[-1][0])
    return Parts(
        part("unet"), part(kind.first_stage), tuple(entry for entry, _ in text), tuple(path for _, path in text)
    )


def _present(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _as_the_unet_needs(kind: Kind, unet: Part) -> Kind:
    """Inpainting with a UNet of 4 channels keeps the picture by replacing latents, without further inputs."""
    extra = int(unet.config["in_channels"]) - int(unet.config["out_channels"])
    if extra == 0 and kind.task == "inpainting":
        return replace(kind, concat=())
    wanted = sum(entry.channels for entry in kind.concat)
    if extra != wanted:
        raise LatentEdgeError(
            f"the UNet in {unet.folder} takes {extra} channels beside its latent; a {kind.class_name} appends {wanted}.",
            hint="the class in model_index.json must be the one that the UNet was trained for",
        )
    return kind


def _conditioning(
    kind: Kind, parts: Parts, index: Mapping[str, Any], tokenizers: Mapping[str, TokenizerSource]
) -> Conditioning:
    extended = time_ids(parts.unet, parts.text)
    pooled = pooled_encoder(parts.text)
    zeros = extended is not None and bool(index.get("force_zeros_for_empty_prompt", True))
    width = parts.unet.config.get("time_cond_proj_dim")
    encoders = []
    for number, part in enumerate(parts.text):
        name = _tokenizer_name(parts, number)
        encoders.append(
            TextEncoder(
                component=_component_name(part),
                tokenizer=name if name in tokenizers else None,
                output=_inner_state(part) if extended else "last_hidden_state",
                pooled_output="text_embeds" if extended and number == pooled else None,
            )
        )
    return Conditioning(
        cross_attention="text" if encoders else "none",
        encoders=tuple(encoders),
        concat=kind.concat,
        unconditional=("zeros" if zeros else "empty_text") if encoders else "none",
        time_ids=extended,
        guidance_embedding=None if width is None else int(width),
        guidance_below_one=kind.guidance_below_one,
        image_guidance=kind.image_guidance,
        upscale=2 ** halvings(parts.first_stage.config) if kind.task == "super-resolution" else None,
    )


def _inner_state(part: Part) -> str:
    """SDXL takes the state before the last layer: hidden_states[-2] of layers + 1."""
    return f"hidden_states.{int(part.config['num_hidden_layers']) - 1}"


def _component_name(part: Part) -> str:
    return "text_encoder" if part.name == "bert" else part.name


def _tokenizer_name(parts: Parts, number: int) -> str:
    return parts.tokenizers[number].name


def _components(
    kind: Kind,
    parts: Parts,
    conditioning: Conditioning,
    scale_factor: float,
    loras: Sequence[Lora],
    *,
    even_sizes: bool,
) -> list[ComponentSource]:
    size = _latent_side(kind, parts)
    lowest = 2 ** halvings(parts.unet.config)
    if even_sizes and any(side % lowest for side in size):
        raise UsageError(
            f"the UNet's own latent of {size[0]}x{size[1]} cannot be halved to its lowest level without a rest: "
            f"its sides are no multiples of {lowest}.",
            hint="leave --even-sizes out",
        )
    components = []
    for number, (part, encoder) in enumerate(zip(parts.text, conditioning.encoders, strict=True)):
        # SDXL's pipelines give their text encoders no mask, whatever the configuration says.
        masked = bool(part.config.get("use_attention_mask")) and conditioning.time_ids is None
        length = parts.token_count(number)
        components.append(text_component(part, length, _text_outputs(part, encoder), loras, masked=masked))
    conditions: dict[str, tuple[int, ...]] = {}
    if conditioning.encoders:
        conditions["encoder_hidden_states"] = (parts.token_count(0), context_width(parts.unet, parts.text))
    if conditioning.time_ids is not None:
        pooled = parts.text[pooled_encoder(parts.text)]
        conditions["text_embeds"] = (int(pooled.config["projection_dim"]),)
        conditions["time_ids"] = (conditioning.time_ids,)
    if conditioning.guidance_embedding is not None:
        conditions["timestep_cond"] = (conditioning.guidance_embedding,)
    largest = ENLARGED_SIDE if kind.task == "super-resolution" else COMPARED_SIDE
    components.append(unet_component(parts.unet, conditions, size, loras, largest, even_sizes=even_sizes))
    # Only SDXL's pipelines use the statistics that a first stage may state; its inpainting does so in decoding alone.
    normalised = kind.family == SDXL.family
    return components + first_stage_components(
        parts.first_stage,
        size,
        scale_factor,
        largest,
        normalised=(normalised and kind.task != "inpainting", normalised),
    )


def _text_outputs(part: Part, encoder: TextEncoder) -> tuple[str, ...]:
    outputs = ["last_hidden_state"]
    if part.kind != "LDMBertModel":
        outputs.append("pooler_output")
    if part.kind == "CLIPTextModelWithProjection":
        outputs.append("text_embeds")
    if encoder.output not in outputs:
        outputs.append(encoder.output)
    return tuple(outputs)


def _latent_side(kind: Kind, parts: Parts) -> tuple[int, int]:
    # The classes that correct a scheduler's offset are those that correct an older UNet's side.
    return latent_side(parts.unet.config, parts.first_stage.config, older=OFFSET in kind.schedule)


def _tokenizers(parts: Parts, options: SourceOptions, messages: list[str]) -> dict[str, TokenizerSource]:
    found: dict[str, TokenizerSource] = {}
    for number, part in enumerate(parts.text):
        folder: Path | str = options.tokenizer or parts.tokenizers[number]
        name = _tokenizer_name(parts, number)
        if isinstance(folder, Path) and not folder.is_dir():
            messages.append(f"{folder} is missing: the bundle takes token ids only; name one with --tokenizer DIR|ID")
            continue
        kind = "bert" if part.kind == "LDMBertModel" else "clip"
        found[name] = load_tokenizer(folder, kind, parts.token_count(number), None)
        _check_vocabulary(found[name], part, folder)
    return found


def _check_vocabulary(tokenizer: TokenizerSource, part: Part, folder: Path | str) -> None:
    largest = max(Tokenizer.from_str(tokenizer.json).get_vocab(with_added_tokens=True).values())
    if largest >= int(part.config["vocab_size"]):
        raise LatentEdgeError(
            f"the tokenizer in {folder} numbers its tokens up to {largest}; {part.folder} knows "
            f"{part.config['vocab_size']}.",
            hint="give the tokenizer that the text encoder was trained with",
        )


def _defaults(
    kind: Kind, parts: Parts, folder: Path, index: Mapping[str, Any], factor: int, messages: list[str]
) -> Defaults:
    size = _latent_side(kind, parts)
    name = f"{folder.resolve().name} {index.get('_name_or_path', '')}".lower()
    turbo = "turbo" in name and kind.task == "text-to-image"
    if turbo:
        messages.append("its name says that this is a Turbo model: the defaults are 1 step without guidance")
    return Defaults(
        height=size[0] * factor,
        width=size[1] * factor,
        steps=1 if turbo else kind.steps,
        guidance_scale=0.0 if turbo else kind.guidance_scale,
        strength=kind.strength,
    )


def _loras(options: SourceOptions, kind: Kind, parts: Parts) -> tuple[Lora, ...]:
    if not options.loras:
        return ()
    if kind.lora_pipeline is None:
        raise LatentEdgeError(f"diffusers merges no LoRA files into a {kind.class_name}.")
    components = [*(part.name for part in parts.text), "unet"]
    loras = tuple(Lora(path, scale, kind.lora_pipeline, parts.unet.config) for path, scale in options.loras)
    for lora in loras:
        lora_targets(lora, components)
    return loras


def _notes(loras: Sequence[Lora]) -> list[str]:
    return [f"LoRA {lora.path.name} merged with scale {lora.scale:g}" for lora in loras]


def _schedule(folder: Path, kind: Kind, layout: str, messages: list[str]) -> dict[str, object]:
    """The scheduler's configuration as the pipeline runs it: some classes set fields of it when they are made."""
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    if schedule.get("lambda_min_clipped") == -math.inf:  # the solvers' default, which diffusers writes and JSON has not
        del schedule["lambda_min_clipped"]
    fields = set(schedule)
    if layout == "diffusers":
        fields |= set(inspect.signature(library_class(str(schedule.get("_class_name"))).__init__).parameters)
    changes = {name: value for name, value in kind.schedule if name in fields}
    if schedule.get("_class_name") not in SAMPLERS:
        messages.append(
            f"its {schedule.get('_class_name')} is not known here: drawing needs a --sampler of another name"
        )
    return {**schedule, **changes, "dialect": "diffusers"}


def _hashes(folder: Path, parts: Parts, loras: Sequence[Lora]) -> dict[str, str]:
    used = [parts.unet, parts.first_stage, *parts.text]
    files = [folder / "model_index.json", *(file for part in used for file in part.files)]
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    return {**hashes, **{lora.path.name: file_sha256(lora.path) for lora in loras}}


def _licence(folder: Path) -> str | None:
    """The licence that the model card's front matter states."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    sections = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    if len(sections) < 3 or sections[0].strip():
        return None
    try:
        front = yaml.safe_load(sections[1])
    except yaml.YAMLError:
        return None
    return str(front["license"]) if isinstance(front, dict) and front.get("license") else None


def read_first_stage(folder: Path) -> SourceModel:
    """Describe a folder that holds one first stage: the task is to reconstruct pictures."""
    kind = str(read_json(folder / "config.json").get("_class_name"))
    part = read_part(folder, "", kind)
    component_class(kind)
    factor = 2 ** halvings(part.config)
    picture = side_of(part.config.get("sample_size") or 32 * factor)
    latent_size = (picture[0] // factor, picture[1] // factor)
    scale_factor = float(part.config.get("scaling_factor") or 1.0)
    return SourceModel(
        family=LDM,
        task="reconstruction",
        source=Source("diffusers", {path.name: file_sha256(path) for path in part.files}, _licence(folder)),
        latent=Latent(
            channels=int(part.config.get("vq_embed_dim") or part.config["latent_channels"]),
            downscale=factor,
            scale_factor=scale_factor,
            encoding=ENCODINGS[kind],
        ),
        conditioning=Conditioning(),
        schedule={"dialect": "diffusers"},
        defaults=Defaults(height=latent_size[0] * factor, width=latent_size[1] * factor),
        components=tuple(first_stage_components(part, latent_size, scale_factor)),
    )
