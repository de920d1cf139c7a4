"""A checkpoint with Stable Diffusion 1.5's denoiser and random weights: speed does not depend on their values."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: What of runwayml/stable-diffusion-v1-5's configuration differs from the defaults of diffusers.
UNET = {"sample_size": 64, "cross_attention_dim": 768}
#: The other networks are as small as they can be: what is measured is the denoiser.
AUTOENCODER = {
    "latent_channels": 4,
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TEXT_ENCODER = {
    "hidden_size": 768,
    "intermediate_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 1,
    "projection_dim": 768,
}


def write_checkpoint(folder: Path, unet: Mapping[str, Any] = UNET) -> Path:
    """Write the UNet, the autoencoder, the text encoder and the scheduler to ``folder`` in diffusers' layout.

    A folder that is there already is kept.
    """
    if folder.is_dir():
        return folder
    import torch

    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**AUTOENCODER, sample_size=8 * unet["sample_size"]),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_ENCODER)),
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**unet),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    aside = folder.with_name(f".{folder.name}.partial")
    pipeline.save_pretrained(aside)
    return aside.replace(folder)
