"""Small checkpoints of every family of the zoo, with random weights, written in the original layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from latentedge.export.model import SourceModel
from latentedge.export.models.registry import build_network
from latentedge.runtime import Pipeline
from latentedge.runtime.bundle import Bundle, Component, Manifest
from latentedge.runtime.engines.base import Engine
from latentedge.runtime.engines.null import NullEngine

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
IDENTITY = {"target": "torch.nn.Identity"}
PREFIXES = {
    "unet_config": "model.diffusion_model.",
    "first_stage_config": "first_stage_model.",
    "cond_stage_config": "cond_stage_model.",
}


def ddconfig(levels: int, channels: int, double: bool = False, **others: Any) -> dict[str, Any]:
    return {
        "double_z": double,
        "z_channels": channels,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1] * levels,
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
        **others,
    }


def vq(target: str = "VQModelInterface", channels: int = 3, levels: int = 3, **others: Any) -> dict[str, Any]:
    params = {"embed_dim": channels, "n_embed": 32, "ddconfig": ddconfig(levels, channels, **others)}
    return {"target": f"ldm.models.autoencoder.{target}", "params": {**params, "lossconfig": IDENTITY}}


def kl(channels: int = 4, levels: int = 4, **others: Any) -> dict[str, Any]:
    params = {"embed_dim": channels, "ddconfig": ddconfig(levels, channels, double=True, **others)}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {**params, "lossconfig": IDENTITY}}


def unet(inputs: int, outputs: int, context: int | None = None, **others: Any) -> dict[str, Any]:
    params: dict[str, Any] = {
        "image_size": 8,
        "in_channels": inputs,
        "out_channels": outputs,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_heads": 4,
        **others,
    }
    if context is not None:
        params |= {"use_spatial_transformer": True, "context_dim": context, "num_heads": 4}
    return {"target": UNET, "params": params}


def encoder(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.modules.encoders.modules.{name}", "params": params}


def ldm(first_stage: Any, network: Any, condition: Any, channels: int, **params: Any) -> dict[str, Any]:
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.0015,
            "linear_end": 0.0195,
            "timesteps": 1000,
            "image_size": 8,
            "channels": channels,
            "monitor": "val/loss",
            "first_stage_config": first_stage,
            "unet_config": network,
            "cond_stage_config": condition,
            **params,
        },
    }


CLIP_CONFIG = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "eos_token_id": 63,
    "model_type": "clip_text_model",
}
BERT = {"n_embed": 24, "n_layer": 1, "vocab_size": 64}
CROSS: dict[str, Any] = {"conditioning_key": "crossattn"}

DIFFUSION: dict[str, dict[str, Any]] = {
    "unconditional-vq": ldm(
        vq(), unet(3, 3, num_heads=-1, num_head_channels=16), "__is_unconditional__", 3, concat_mode=False
    ),
    "unconditional-kl": ldm(
        kl(), unet(4, 4, use_scale_shift_norm=True, resblock_updown=True), "__is_unconditional__", 4, scale_by_std=True
    ),
    "class": ldm(vq(), unet(3, 3, 16), encoder("ClassEmbedder", embed_dim=16), 3, **CROSS),
    "class-null": ldm(vq(), unet(3, 3, 16), encoder("ClassEmbedder", embed_dim=16, n_classes=1001), 3, **CROSS),
    "class-in-unet": ldm(
        vq(), unet(3, 3, num_classes=11), IDENTITY, 3, conditioning_key="adm", cond_stage_key="class_label"
    ),
    "text-bert": ldm(
        kl(),
        unet(4, 4, 24, legacy=False),
        encoder("BERTEmbedder", **BERT),
        4,
        **CROSS,
        scale_factor=0.18215,
        use_ema=False,
    ),
    "layout": ldm(
        vq(),
        unet(3, 3, 24, transformer_depth=2),
        encoder("BERTEmbedder", n_embed=24, n_layer=1, vocab_size=8192, max_seq_len=92, use_tokenizer=False),
        3,
        **CROSS,
        cond_stage_key="coordinates_bbox",
    ),
    "semantic": ldm(
        vq(), unet(6, 3), encoder("SpatialRescaler", n_stages=2, in_channels=7, out_channels=3), 3, concat_mode=True
    ),
    "super-resolution": ldm(vq(), unet(6, 3), IDENTITY, 3, cond_stage_key="LR_image", concat_mode=True),
    "inpainting": ldm(
        vq(attn_type="none"),
        unet(7, 3, resblock_updown=True),
        "__is_first_stage__",
        3,
        cond_stage_key="masked_image",
        concat_mode=True,
    ),
    "inpainting-text": ldm(
        kl(),
        unet(9, 4, 24, legacy=False),
        encoder("BERTEmbedder", **BERT),
        4,
        conditioning_key="hybrid",
        scale_factor=0.18215,
        use_ema=False,
    ),
    "retrieval": ldm(kl(levels=3), unet(4, 4, 16), IDENTITY, 4, **CROSS, cond_stage_key="nix", scale_factor=0.22765929),
    "stable-diffusion": ldm(
        kl(),
        unet(4, 4, 24, legacy=False),
        encoder("FrozenCLIPEmbedder"),
        4,
        **CROSS,
        scale_factor=0.18215,
        use_ema=False,
    ),
}

#: The nine first stages of the zoo, each with its levels, latent channels and places of attention.
FIRST_STAGES: dict[str, dict[str, Any]] = {
    "vq-f4": vq("VQModel", 3, 3),
    "vq-f4-noattn": vq("VQModel", 3, 3, attn_type="none"),
    "vq-f8": vq("VQModel", 4, 4, attn_resolutions=[4]),
    "vq-f8-n256": vq("VQModel", 4, 4, attn_resolutions=[4], ch_mult=[1, 1, 1, 2]),
    "vq-f16": vq("VQModel", 8, 5, attn_resolutions=[2]),
    "kl-f4": kl(3, 3),
    "kl-f8": kl(4, 4),
    "kl-f16": kl(16, 5, attn_resolutions=[2]),
    "kl-f32": kl(64, 6, attn_resolutions=[2, 1]),
}


def networks(model: dict[str, Any], clip: Any = None) -> dict[str, Any]:
    """The networks of a model with random weights, by the name of their part ("" for a first stage of its own)."""
    torch.manual_seed(0)
    params = model["params"]
    parts = {"": model} if "unet_config" not in params else {name: params[name] for name in PREFIXES}
    built = {}
    for name, config in parts.items():
        if isinstance(config, str) or config == IDENTITY:
            continue
        extra = {"text_config": clip} if config["target"].endswith("CLIPEmbedder") and clip is not None else {}
        network = build_network(config["target"], {**config.get("params", {}), **extra}).eval()
        built[name] = network.requires_grad_(False)
        for key, parameter in network.named_parameters():
            # Layers that start at zero would hide what comes before them.
            spread = 0.3 if "embedding" in key else 0.08
            parameter.copy_(parameter + spread * torch.randn_like(parameter))
    return built


def state_dict(model: dict[str, Any], built: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that the original would have saved, with averaged weights that differ from the raw ones."""
    state: dict[str, torch.Tensor] = {}
    for part, network in built.items():
        state |= {PREFIXES.get(part, "") + name: value.clone() for name, value in network.state_dict().items()}
    params = model["params"]
    if "" in built:
        return {**state, "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2, 3, 4, 4)}
    betas = np.linspace(params["linear_start"] ** 0.5, params["linear_end"] ** 0.5, 1000) ** 2
    state["betas"] = torch.from_numpy(betas).float()
    state["alphas_cumprod"] = torch.from_numpy(np.cumprod(1 - betas)).float()
    if params.get("scale_by_std"):
        state["scale_factor"] = torch.tensor(0.37)
    if params["cond_stage_config"] == "__is_first_stage__":
        first_stage = built["first_stage_config"].state_dict()
        state |= {f"cond_stage_model.{name}": value.clone() for name, value in first_stage.items()}
    if params.get("use_ema", True):
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9, dtype=torch.int32)}
        for name, value in built["unet_config"].state_dict().items():
            raw = PREFIXES["unet_config"] + name
            state["model_ema.diffusion_model" + name.replace(".", "")] = value.clone()
            state[raw] = value + 0.5 * torch.randn_like(value)
    return state


def write(folder: Path, model: dict[str, Any], state: dict[str, torch.Tensor], **others: Any) -> Path:
    """Write checkpoint and YAML to ``folder``; ``others`` are further top-level keys of the YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "global_step": 7}, folder / "model.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, **others}), encoding="utf-8")
    return folder


def torch_pipeline(source: SourceModel) -> Pipeline:
    """A pipeline whose engines are the source's own networks in torch."""
    engines: dict[str, Engine] = {}
    for component in source.components:
        assert component.build is not None
        engines[component.spec.name] = NullEngine(component.spec, as_function(component.spec, component.build()))
    manifest = Manifest(
        source.family,
        source.task,
        source.source,
        {},
        source.latent,
        source.conditioning,
        dict(source.schedule),
        source.defaults,
        {component.spec.name: component.spec for component in source.components},
    )
    return Pipeline(Bundle(Path("tiny.bundle"), manifest), "null", "fp32", engines=engines)


def as_function(spec: Component, network: Any) -> Callable[[Any], Any]:
    @torch.no_grad()
    def function(inputs: Any) -> Any:
        return {spec.outputs[0].name: network(*(torch.from_numpy(inputs[entry.name]) for entry in spec.inputs)).numpy()}

    return function
