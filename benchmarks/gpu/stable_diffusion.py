"""A checkpoint with Stable Diffusion 1.5's architecture and random weights: speed does not depend on their values."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

#: What of runwayml/stable-diffusion-v1-5's configurations differs from the defaults of diffusers and transformers.
UNET = {"sample_size": 64, "cross_attention_dim": 768}
AUTOENCODER = {
    "sample_size": 512,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TEXT_ENCODER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}


def write_checkpoint(folder: Path) -> Path:
    """Write the UNet, the autoencoder, the text encoder and the scheduler to ``folder`` in diffusers' layout."""
    import torch

    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**AUTOENCODER),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_ENCODER)),
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
