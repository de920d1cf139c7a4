"""Stable Diffusion in one file, in the original layout, without a YAML: the networks are read from the shapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentedge.export.sources.compvis import CHECKPOINT_SUFFIXES
from latentedge.export.sources.diffusers_kinds import PIX2PIX, SD, SD_INPAINTING
from latentedge.runtime.bundle import Defaults
from latentedge.runtime.errors import LatentEdgeError, UsageError

if TYPE_CHECKING:
    from latentedge.export.model import SourceModel, SourceOptions
    from latentedge.export.sources.checkpoint import Checkpoint

#: What shapes do not tell, by the key that tells the versions apart. Facts: v1-inference.yaml of
#: CompVis/stable-diffusion, v2-inference.yaml of Stability-AI/stablediffusion.
VERSIONS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": {
        "key": "cond_stage_model.transformer.",
        "heads": {"num_heads": 8},
        "encoder": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "encoder_params": {},
        "side": {"epsilon": 64},
    },
    "Stable Diffusion 2": {
        "key": "cond_stage_model.model.",
        "heads": {"num_head_channels": 64},
        "encoder": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "encoder_params": {"layer": "penultimate"},
        "side": {"epsilon": 64, "v_prediction": 96},
    },
}
XL_KEY = "conditioner.embedders.1.model."
DIFFUSION = {
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "timesteps": 1000,
    "scale_factor": 0.18215,
    "use_ema": False,
    "image_size": 64,
    "cond_stage_key": "txt",
}
#: Correlation of the U-Net's output with pure noise at the last timestep: above, it predicts that noise; below, the
#: velocity, which is then all but the picture.
PREDICTS_NOISE, PREDICTS_VELOCITY = 0.8, 0.4

#: What the schedulers of all Stable Diffusion versions share.
SCALED_LINEAR: dict[str, object] = {
    "dialect": "diffusers",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
#: The scheduler that Stable Diffusion's diffusers folders come with.
SCHEDULE: dict[str, object] = {
    **SCALED_LINEAR,
    "_class_name": "PNDMScheduler",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
#: That of InstructPix2Pix's folder.
EDITING_SCHEDULE: dict[str, object] = {
    **SCALED_LINEAR,
    "_class_name": "EulerAncestralDiscreteScheduler",
    "timestep_spacing": "linspace",
}
#: What diffusers' pipeline of each task does by default.
PIPELINE_OF_TASK = {kind.task: kind for kind in (SD, SD_INPAINTING, PIX2PIX)}


def matches(path: Path | str, options: SourceOptions) -> bool:
    """A checkpoint file, or a folder with one and nothing that tells another layout; without ``--config``."""
    place = Path(path)
    if options.config is not None:
        return False
    if place.is_dir():
        others = (place / "model_index.json").exists() or any(place.rglob("*.onnx"))
        return not others and len(_checkpoints(place)) == 1
    return place.is_file() and place.suffix in CHECKPOINT_SUFFIXES


def load(path: Path | str, options: SourceOptions) -> SourceModel:
    """Read the model; ``UsageError`` for a file whose tensors are not Stable Diffusion's: it needs its YAML."""
    from latentedge.export.sources.checkpoint import open_checkpoint
    from latentedge.export.sources.compvis_model import clip_text_config, model_from

    place = Path(path)
    checkpoint = open_checkpoint(_checkpoints(place)[0] if place.is_dir() else place)
    if any(name.startswith(XL_KEY) for name in checkpoint.shapes):
        from latentedge.export.sources.single_file_xl import load_xl

        return load_xl(checkpoint, options)
    version = version_of(checkpoint)
    config = config_of(checkpoint, version)
    model = model_from(checkpoint, config, options, clip_text_config(checkpoint.path.parent))
    source = dataclasses.replace(model.source, layout="single-file", notes=(f"read as {version} from its shapes",))
    conditioning = dataclasses.replace(model.conditioning, guidance_below_one=False)
    prediction = "epsilon" if len(VERSIONS[version]["side"]) == 1 else measured_prediction(model)
    side = VERSIONS[version]["side"][prediction] * model.latent.downscale
    kind = PIPELINE_OF_TASK[model.task]
    defaults = Defaults(side, side, steps=kind.steps, guidance_scale=kind.guidance_scale, strength=kind.strength)
    own_schedule = EDITING_SCHEDULE if model.task == PIX2PIX.task else SCHEDULE
    return dataclasses.replace(
        model,
        family="stable-diffusion",
        source=source,
        schedule={**own_schedule, "prediction_type": prediction},
        conditioning=conditioning,
        defaults=defaults,
        messages=(*model.messages, f"{checkpoint.path.name} has no YAML and is read as {version}"),
    )


def measured_prediction(model: SourceModel) -> str:
    """What the U-Net predicts, which neither names nor shapes tell: it is run on noise at the last timestep."""
    import torch

    source = next(component for component in model.components if component.spec.name == "unet")
    assert source.build is not None
    network = source.build()
    generator = torch.Generator().manual_seed(0)
    sizes = {"batch": 1, **{name: 4 * axis.multiple for name, axis in source.spec.axes.items() if name != "batch"}}
    inputs = {
        spec.name: torch.randn(spec.resolve(sizes), generator=generator)
        if spec.name == "sample"
        else torch.full(spec.resolve(sizes), 999.0 if spec.name == "timestep" else 0.0)
        for spec in source.spec.inputs
    }
    with torch.no_grad():
        predicted = network(*inputs.values())
    noise = inputs["sample"][:, : predicted.shape[1]]
    correlation = float(torch.corrcoef(torch.stack([predicted.flatten(), noise.flatten()]))[0, 1])
    if correlation > PREDICTS_NOISE:
        return "epsilon"
    if abs(correlation) < PREDICTS_VELOCITY:
        return "v_prediction"
    raise LatentEdgeError(
        f"the U-Net's output on pure noise correlates with it by {correlation:.2f}: it predicts neither noise nor velocity.",
        hint="pass the model's YAML with `--config FILE`.",
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in CHECKPOINT_SUFFIXES and file.is_file())


def version_of(checkpoint: Checkpoint) -> str:
    """Which Stable Diffusion a file holds; ``UsageError`` for any other."""
    names = checkpoint.shapes
    whole = all(
        any(name.startswith(part) for name in names) for part in ("model.diffusion_model.", "first_stage_model.")
    )
    for version, facts in VERSIONS.items():
        if whole and any(name.startswith(facts["key"]) for name in names):
            return version
    raise UsageError(
        f"{checkpoint.path.name} is not a Stable Diffusion checkpoint in the original layout; "
        f"its tensors begin with {sorted({name.split('.')[0] for name in names})[:10]}.",
        hint="other models need their YAML: pass `--config FILE`, or put it beside the checkpoint.",
    )


def config_of(checkpoint: Checkpoint, version: str) -> Any:
    """The configuration that a checkpoint of this version would have had beside it."""
    from latentedge.export.sources.compvis_config import parse_config
    from latentedge.export.sources.single_file_shapes import below, first_stage_parameters, unet_parameters

    facts = VERSIONS[version]
    try:
        unet = unet_parameters(below(checkpoint.shapes, "model.diffusion_model."))
        first_stage = first_stage_parameters(below(checkpoint.shapes, "first_stage_model."))
    except (KeyError, IndexError) as error:
        raise LatentEdgeError(
            f"{checkpoint.path.name} lacks the tensor {error}, which every {version} has.",
            hint="the file is incomplete: compare its size and SHA-256 with its origin.",
        ) from error
    latent_channels = first_stage["embed_dim"]
    inpainting = unet["in_channels"] == 2 * latent_channels + 1
    edits = unet["in_channels"] == 2 * latent_channels
    kind = "LatentInpaintDiffusion" if inpainting else "LatentDiffusion"
    params = {
        **DIFFUSION,
        "channels": latent_channels,
        "conditioning_key": "hybrid" if inpainting or edits else "crossattn",
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {**unet, **facts["heads"]},
        },
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first_stage},
        "cond_stage_config": {"target": facts["encoder"], "params": facts["encoder_params"]},
    }
    model = {"target": f"ldm.models.diffusion.ddpm.{kind}", "params": params}
    return parse_config({"model": model}, f"the shapes of {version}")
