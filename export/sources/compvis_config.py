"""A CompVis YAML, read: networks, conditioning, schedule, and which of its defaults were assumed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from latentedge.runtime.errors import LatentEdgeError, UsageError

UNCONDITIONAL = "__is_unconditional__"
FIRST_STAGE = "__is_first_stage__"
IDENTITY = "torch.nn.Identity"

DIFFUSION_TARGETS = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": "latent",
    "ldm.models.diffusion.ddpm.Layout2ImgDiffusion": "latent",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": "inpaint",
}
CORRECT = "correct this line of the YAML, or take the YAML that was published with the checkpoint."
FIRST_STAGE_TARGETS = (
    "ldm.models.autoencoder.AutoencoderKL",
    "ldm.models.autoencoder.VQModel",
    "ldm.models.autoencoder.VQModelInterface",
)

#: Parameters of LatentDiffusion that matter to training, logging or resuming only.
TRAINING_ONLY = frozenset(
    {
        "loss_type",
        "ckpt_path",
        "ignore_keys",
        "load_only_unet",
        "monitor",
        "first_stage_key",
        "log_every_t",
        "clip_denoised",
        "original_elbo_weight",
        "l_simple_weight",
        "scheduler_config",
        "use_positional_encodings",
        "learn_logvar",
        "logvar_init",
        "num_timesteps_cond",
        "cond_stage_trainable",
        "make_it_fit",
        "ucg_training",
        "reset_ema",
        "reset_num_ema_updates",
        "finetune_keys",
        "keep_finetune_dims",
        "concat_keys",
        "masked_image_key",
        "c_concat_log_start",
        "c_concat_log_end",
        "base_learning_rate",
    }
)


@dataclass(frozen=True)
class NetworkConfig:
    """A ``target`` and its ``params``."""

    target: str
    params: dict[str, Any]


@dataclass(frozen=True)
class DiffusionConfig:
    """The parameters of LatentDiffusion that change what is drawn, with the original's defaults."""

    first_stage_config: NetworkConfig
    unet_config: NetworkConfig
    cond_stage_config: NetworkConfig | str
    variant: str = "latent"
    timesteps: int = 1000
    beta_schedule: str = "linear"
    linear_start: float = 1e-4
    linear_end: float = 2e-2
    cosine_s: float = 8e-3
    given_betas: tuple[float, ...] | None = None
    v_posterior: float = 0.0
    parameterization: str = "eps"
    use_ema: bool = True
    image_size: int = 256
    channels: int = 3
    cond_stage_key: str = "image"
    concat_mode: bool = True
    cond_stage_forward: str | None = None
    conditioning_key: str | None = None
    scale_factor: float = 1.0
    scale_by_std: bool = False
    #: Names that the YAML leaves to their defaults.
    assumed: frozenset[str] = frozenset()

    @property
    def conditioning(self) -> str | None:
        """How the condition reaches the U-Net: None, "concat", "crossattn", "hybrid" or "adm"."""
        if self.cond_stage_config == UNCONDITIONAL:
            return None
        return self.conditioning_key or ("concat" if self.concat_mode else "crossattn")


@dataclass(frozen=True)
class ModelConfig:
    """One YAML file: a diffusion model or a first stage of its own, and what ``latentedge:`` adds to it."""

    name: str
    diffusion: DiffusionConfig | None
    first_stage: NetworkConfig
    extras: dict[str, Any] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of YAML 1.2, as OmegaConf reads it: ``1e-4`` is a number, not text."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_config(path: Path) -> ModelConfig:
    """Read a YAML file; ``LatentEdgeError`` for one that is no model, ``UsageError`` for what is not supported."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LatentEdgeError(
            f"{path} is no YAML file: {' '.join(str(error).split())}.",
            hint="copy it again from the checkpoint's origin",
        ) from error
    return parse_config(data, path.name)


def parse_config(data: Any, name: str) -> ModelConfig:
    """As ``read_config``, from parsed YAML; ``name`` is the file's, for errors."""
    model = network_config(data.get("model") if isinstance(data, Mapping) else None, f"{name}: model")
    extras = data.get("latentedge", {})
    if not isinstance(extras, dict):
        raise UsageError(f"{name}: latentedge must be a mapping, found {type(extras).__name__}.", hint=CORRECT)
    if model.target in FIRST_STAGE_TARGETS:
        return ModelConfig(name, None, model, extras)
    if model.target not in DIFFUSION_TARGETS:
        raise UsageError(
            f"{name} describes a {model.target}, which is not supported.",
            hint=f"supported are {', '.join((*DIFFUSION_TARGETS, *FIRST_STAGE_TARGETS))}.",
        )
    diffusion = _diffusion_config(model, name)
    return ModelConfig(name, diffusion, diffusion.first_stage_config, extras)


def network_config(data: Any, where: str) -> NetworkConfig:
    """A mapping with ``target`` and maybe ``params``; ``LatentEdgeError`` says where there is none."""
    if not isinstance(data, Mapping) or not isinstance(data.get("target"), str):
        raise LatentEdgeError(
            f"{where} has no target.",
            hint="the YAML must be in the original layout, with `model: {target: ..., params: ...}`.",
        )
    params = data.get("params") or {}
    if not isinstance(params, Mapping):
        raise LatentEdgeError(f"{where}: params must be a mapping, found {type(params).__name__}.")
    return NetworkConfig(data["target"], dict(params))


def _diffusion_config(model: NetworkConfig, name: str) -> DiffusionConfig:
    params = model.params
    known = {item.name: item for item in fields(DiffusionConfig) if item.name not in ("variant", "assumed")}
    unknown = sorted(set(params) - set(known) - TRAINING_ONLY)
    if unknown:
        raise UsageError(
            f"{name}: {model.target} does not know {', '.join(unknown)}.",
            hint="a parameter that is ignored could change the pictures: correct its name, or remove it.",
        )
    values: dict[str, Any] = {
        "first_stage_config": network_config(params.get("first_stage_config"), f"{name}: first_stage_config"),
        "unet_config": network_config(params.get("unet_config"), f"{name}: unet_config"),
        "cond_stage_config": _condition_config(params.get("cond_stage_config"), name),
    }
    for key, item in known.items():
        if key in values or params.get(key) is None:
            continue
        values[key] = _converted(params[key], item.default, f"{name}: {key}")
    if values.get("cond_stage_forward") not in (None, "encode", "forward"):
        raise UsageError(
            f"{name}: cond_stage_forward {values['cond_stage_forward']!r} is not supported.",
            hint="leave it out where the condition is made by encode or forward.",
        )
    if model.target.endswith("LatentInpaintDiffusion"):
        values["variant"] = DIFFUSION_TARGETS[model.target]
        values.setdefault("conditioning_key", "hybrid")
    return DiffusionConfig(**values, assumed=frozenset(known) - set(values))


def _condition_config(data: Any, name: str) -> NetworkConfig | str:
    if data in (UNCONDITIONAL, FIRST_STAGE):
        return str(data)
    return network_config(data, f"{name}: cond_stage_config")


def _converted(value: Any, default: Any, where: str) -> Any:
    """``value`` in the type of ``default``: YAML reads ``1e-4`` as text."""
    if isinstance(default, bool) or default is None:
        expected = bool if isinstance(default, bool) else object
        if not isinstance(value, expected):
            raise UsageError(f"{where} must be true or false, found {value!r}.", hint=CORRECT)
        return tuple(value) if isinstance(value, list) else value
    try:
        converted = type(default)(value)
    except (TypeError, ValueError) as error:
        kind = type(default).__name__
        raise UsageError(f"{where} must be of type {kind}, found {value!r}.", hint=CORRECT) from error
    return converted
