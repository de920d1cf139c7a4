"""From a checkpoint and its configuration to a source model: latent space, task, defaults, components."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from latentedge.export.model import SourceModel, SourceOptions
from latentedge.export.models.clip_text import ClipTextConfig
from latentedge.export.sources.checkpoint import Checkpoint, open_checkpoint
from latentedge.export.sources.compvis_components import first_stage_components, unet_component
from latentedge.export.sources.compvis_config import DiffusionConfig, ModelConfig, read_config
from latentedge.export.sources.compvis_schedule import schedule_of
from latentedge.export.sources.compvis_tasks import IMAGENET_AND_NONE, Situation, Task, task_of
from latentedge.export.sources.compvis_tokenizer import TokenizerNeed, find_tokenizer
from latentedge.export.sources.compvis_weights import Networks, networks_of
from latentedge.runtime.bundle import Conditioning, Defaults, Latent, Source
from latentedge.runtime.errors import LatentEdgeError, UsageError

FAMILY = "latent-diffusion"
#: What ``latentedge:`` in a YAML may say.
EXTRAS = ("defaults", "null_class", "layout_classes", "licence")
CLIP_CONFIG = "clip_text_config.json"

#: Steps, guidance scale and eta of the original's scripts, by task (txt2img.py, sample_diffusion.py, inpaint.py,
#: knn2img.py, the ImageNet and super-resolution notebooks of CompVis/latent-diffusion).
SCRIPT_DEFAULTS: dict[str, tuple[int, float, float]] = {
    "unconditional": (50, 1.0, 1.0),
    "class-to-image": (20, 3.0, 0.0),
    "text-to-image": (50, 5.0, 0.0),
    "layout-to-image": (200, 1.0, 0.0),
    "semantic-to-image": (50, 1.0, 0.0),
    "super-resolution": (100, 1.0, 1.0),
    "inpainting": (50, 1.0, 0.0),
    "embeddings-to-image": (50, 5.0, 0.0),
    "instruct-pix2pix": (100, 7.5, 0.0),  # edit_cli.py of timothybrooks/instruct-pix2pix
}
#: The same for class models that may know no "no class" (the README's row for ImageNet).
UNGUIDED_CLASSES = (200, 1.0, 1.0)
#: Files of captions by what the manifest calls them.
CAPTION_FILES = {"prompts": "calibration.txt", "held_out_prompts": "heldout.txt"}
#: Guidance of Stable Diffusion's txt2img.py.
CLIP_GUIDANCE = 7.5


def model_from_files(checkpoint: Path, config: Path, options: SourceOptions) -> SourceModel:
    """The model of a checkpoint file and a YAML file."""
    opened = open_checkpoint(checkpoint)
    model = model_from(opened, read_config(config), options, clip_text_config(checkpoint.parent))
    return dataclasses.replace(model, captions=captions_beside(checkpoint.parent))


def captions_beside(folder: Path) -> dict[str, tuple[str, ...]]:
    """The captions in ``prompts/`` beside a checkpoint, one a line, where there are any."""
    found = {}
    for name, file in CAPTION_FILES.items():
        path = folder / "prompts" / file
        if path.is_file():
            found[name] = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return found


def clip_text_config(folder: Path) -> ClipTextConfig | None:
    """The size of CLIP's text encoder from a transformers-style ``clip_text_config.json``, where there is one."""
    file = folder / CLIP_CONFIG
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LatentEdgeError(f"{file} is no JSON file: {error}.") from error
    if not isinstance(data, dict):
        raise LatentEdgeError(f"{file} must hold a mapping, found {type(data).__name__}.")
    return ClipTextConfig.from_mapping(data.get("text_config", data))


def model_from(
    checkpoint: Checkpoint, config: ModelConfig, options: SourceOptions, clip_text: ClipTextConfig | None
) -> SourceModel:
    """The model of an opened checkpoint and a configuration."""
    if options.loras:
        raise UsageError("LoRA files are merged into diffusers layouts only.", hint="leave --lora out.")
    _check_extras(config)
    networks = networks_of(config, checkpoint, clip_text)
    latent, picture_channels, said = _latent_of(config, checkpoint)
    size = _latent_size(config, latent)
    source = Source("compvis", {checkpoint.path.name: checkpoint.sha256}, config.extras.get("licence"))
    messages = (*_replaced(checkpoint), *networks.messages, *said)
    # A VQModel decodes codewords that its caller has chosen; inside a diffusion model, nobody does.
    quantised = config.diffusion is None or not config.first_stage.target.endswith("VQModel")
    first_stage = first_stage_components(networks.first_stage, latent, size, picture_channels, quantised)
    if not quantised:
        messages = (*messages, "first_stage_config is a VQModel: as in the original, latents are decoded unquantised")
    if config.diffusion is None:
        side = size[0] * latent.downscale
        defaults = _with_extras(Defaults(height=side, width=side), config)
        return SourceModel(
            FAMILY,
            "reconstruction",
            source,
            latent,
            Conditioning(),
            {},
            defaults,
            first_stage,
            messages=messages,
            model_index=_model_index("AutoencoderPipeline", first_stage),
        )
    schedule, about_schedule = schedule_of(config.diffusion, checkpoint)
    situation = _situation(config, config.diffusion, networks, latent, size, checkpoint.path.parent, options)
    task = task_of(situation)
    assert networks.unet is not None
    steps = config.diffusion.timesteps
    unet = unet_component(networks.unet, size, steps, task.guided, task.context, task.label_classes)
    components = (*task.components, unet, *first_stage)
    return SourceModel(
        family=FAMILY,
        task=task.name,
        source=source,
        latent=latent,
        conditioning=task.conditioning,
        schedule=schedule,
        defaults=_with_extras(_defaults(task, situation), config),
        components=components,
        tokenizers=task.tokenizers,
        model_index=_model_index("LatentDiffusionPipeline", components),
        messages=(*messages, *_assumed(config.diffusion), *about_schedule, *task.messages),
    )


def _check_extras(config: ModelConfig) -> None:
    unknown = sorted(set(config.extras) - set(EXTRAS))
    if unknown:
        raise UsageError(
            f"{config.name}: latentedge knows no {', '.join(unknown)}; it takes {', '.join(EXTRAS)}.",
        )


def _replaced(checkpoint: Checkpoint) -> tuple[str, ...]:
    if not checkpoint.replaced:
        return ()
    return (f"{checkpoint.path.name} refers to {', '.join(checkpoint.replaced[:3])}: read without importing it",)


def _latent_of(config: ModelConfig, checkpoint: Checkpoint) -> tuple[Latent, int, tuple[str, ...]]:
    """The latent space, the channels of its pictures, and messages."""
    parameters = config.first_stage.params
    ddconfig = parameters["ddconfig"]
    scale_factor, messages = _scale_factor(config.diffusion, checkpoint)
    latent = Latent(
        channels=int(parameters["embed_dim"]),
        downscale=2 ** (len(ddconfig.get("ch_mult", (1, 2, 4, 8))) - 1),
        scale_factor=scale_factor,
        encoding="kl" if config.first_stage.target.endswith("AutoencoderKL") else "vq",
    )
    return latent, int(ddconfig["in_channels"]), messages


def _scale_factor(diffusion: DiffusionConfig | None, checkpoint: Checkpoint) -> tuple[float, tuple[str, ...]]:
    """The YAML's number, or with ``scale_by_std`` the buffer that training measured."""
    if diffusion is None:
        return 1.0, ()
    stored = "scale_factor" in checkpoint.shapes
    if diffusion.scale_by_std and stored:
        return float(checkpoint.tensor("scale_factor")), ()
    if diffusion.scale_by_std:
        message = f"scale_by_std is true, but the file has no scale_factor: {diffusion.scale_factor} is used"
        return diffusion.scale_factor, (message,)
    if stored:
        message = f"the file has a scale_factor, but scale_by_std is false: {diffusion.scale_factor} is used"
        return diffusion.scale_factor, (message,)
    return diffusion.scale_factor, ()


def _latent_size(config: ModelConfig, latent: Latent) -> tuple[int, int]:
    diffusion = config.diffusion
    if diffusion is None:
        side = max(int(config.first_stage.params["ddconfig"]["resolution"]) // latent.downscale, 1)
        return side, side
    if "image_size" in diffusion.assumed:
        side = int(diffusion.unet_config.params.get("image_size", diffusion.image_size // latent.downscale))
        return side, side
    return diffusion.image_size, diffusion.image_size


def _situation(
    config: ModelConfig,
    diffusion: DiffusionConfig,
    networks: Networks,
    latent: Latent,
    size: tuple[int, int],
    folder: Path,
    options: SourceOptions,
) -> Situation:
    assert networks.unet is not None
    unet = networks.unet.skeleton()
    if (unet.label_emb is not None) is not (diffusion.conditioning == "adm"):
        raise LatentEdgeError(
            f"the U-Net {'has' if unet.label_emb is not None else 'lacks'} a label embedding, and conditioning_key is "
            f"{diffusion.conditioning_key}.",
            hint="num_classes of unet_config and conditioning_key adm belong together.",
        )
    if unet.out_channels != latent.channels:
        raise LatentEdgeError(
            f"the U-Net gives {unet.out_channels} channels, the first stage's latent has {latent.channels}.",
            hint="first_stage_config and unet_config of the YAML do not belong together.",
        )

    def tokenizer(need: TokenizerNeed) -> Any:
        return find_tokenizer(folder, options.tokenizer, need)

    return Situation(
        config=diffusion,
        latent=latent,
        extra_channels=unet.in_channels - latent.channels,
        context_width=unet.context_width,
        label_classes=unet.classes,
        condition=networks.condition,
        size=size,
        extras=config.extras,
        tokenizer=tokenizer,
    )


def _defaults(task: Task, situation: Situation) -> Defaults:
    steps, guidance, eta = SCRIPT_DEFAULTS[task.name]
    if situation.target.endswith("CLIPEmbedder"):
        guidance = CLIP_GUIDANCE
    if situation.config.conditioning == "hybrid" and task.name == "inpainting":
        guidance = CLIP_GUIDANCE
    if task.name == "class-to-image" and task.conditioning.classes != IMAGENET_AND_NONE:
        steps, guidance, eta = UNGUIDED_CLASSES
    scale = situation.latent.downscale
    return Defaults(
        height=situation.size[0] * scale,
        width=situation.size[1] * scale,
        sampler="ddim",
        steps=steps,
        guidance_scale=guidance if task.guided else 1.0,
        eta=eta,
        strength=1.0 if task.name == "inpainting" else Defaults.strength,
    )


def _with_extras(defaults: Defaults, config: ModelConfig) -> Defaults:
    """Defaults with what the YAML's ``latentedge: {defaults: ...}`` says."""
    given = config.extras.get("defaults", {})
    known = {item.name: type(getattr(defaults, item.name)) for item in dataclasses.fields(Defaults)}
    if not isinstance(given, dict) or set(given) - set(known):
        raise UsageError(f"{config.name}: latentedge.defaults takes {', '.join(known)}; found {given!r}.")
    values: dict[str, Any] = {}
    for name, value in given.items():
        fits = isinstance(value, str) if name == "sampler" else isinstance(value, (int, float))
        if not fits or isinstance(value, bool) or (known[name] is int and not isinstance(value, int)):
            raise UsageError(f"{config.name}: latentedge.defaults.{name} cannot be {value!r}.")
        values[name] = float(value) if known[name] is float else value
    return dataclasses.replace(defaults, **values)


def _assumed(diffusion: DiffusionConfig) -> tuple[str, ...]:
    """A message for each default that changes the pictures and that the YAML leaves unsaid."""
    names = {"timesteps"} & diffusion.assumed
    if diffusion.beta_schedule in ("linear", "sqrt_linear", "sqrt") and diffusion.given_betas is None:
        names |= {"linear_start", "linear_end"} & diffusion.assumed
    if not diffusion.scale_by_std:
        names |= {"scale_factor"} & diffusion.assumed
    if diffusion.conditioning is not None and diffusion.conditioning_key is None:
        names |= {"concat_mode"} & diffusion.assumed
    return tuple(f"{name} is not in the YAML and is {getattr(diffusion, name)} by default" for name in sorted(names))


def _model_index(pipeline: str, components: tuple[Any, ...]) -> dict[str, object]:
    """The index that other tools read: each component is an ONNX model."""
    entries = {component.spec.name: ["diffusers", "OnnxRuntimeModel"] for component in components}
    return {"_class_name": pipeline, **entries}
