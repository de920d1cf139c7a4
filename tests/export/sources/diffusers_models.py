"""Tiny pipelines of every kind, with random weights, saved as diffusers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMPipeline,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tokenizers import pre_tokenizers
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

WIDTH = 32
TOKENS = 77
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
LDM_BETAS = {**SD_BETAS, "beta_start": 0.0015, "beta_end": 0.0195}
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-pair vocabulary of CLIP's form with a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "t</w>"), ("c", "at</w>"), ("r", "e"), ("re", "d</w>"), ("t", "h"), ("th", "e</w>"), ("d", "o")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges), BEGIN, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=TOKENS)


def bert_vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "red", "the", *letters, *(f"##{x}" for x in letters)]
    return {token: number for number, token in enumerate(tokens)}


def lively(model: Any, scale: float = 0.1) -> Any:
    """Every constant of the initialisation (norms, biases) moved, so that none can be lost unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def clip_text(projected: bool = False, **changes: Any) -> Any:
    vocabulary, _ = clip_vocabulary()
    config = {
        "vocab_size": len(vocabulary),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "projection_dim": 24,
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
        "initializer_range": 0.1,
        **changes,
    }
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    model = lively(kind(CLIPTextConfig(**config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def unet(**changes: Any) -> Any:
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        **changes,
    }
    model = lively(UNet2DConditionModel(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name:  # random texts would hardly change the picture otherwise
                parameter.mul_(4)
    return model


def plain_unet(**changes: Any) -> Any:
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 16,
        "norm_num_groups": 8,
        **changes,
    }
    return lively(UNet2DModel(**config))


def autoencoder(**changes: Any) -> Any:
    config = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 16,
        "scaling_factor": 0.18215,
        **changes,
    }
    return lively(AutoencoderKL(**config))


def codebook(**changes: Any) -> Any:
    config = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 3,
        "num_vq_embeddings": 32,
        "norm_num_groups": 8,
        "sample_size": 16,
        **changes,
    }
    model = lively(VQModel(**config))
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
    return model


def tiny_autoencoder() -> Any:
    return lively(
        AutoencoderTiny(
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    )


def _pndm() -> Any:
    return PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


def _ddim(betas: dict[str, Any], **changes: Any) -> Any:
    return DDIMScheduler(**{**betas, "clip_sample": False, "set_alpha_to_one": False, **changes})


def _sd(kind: Any, unet_model: Any, scheduler: Any, **changes: Any) -> Any:
    parts = {
        "vae": autoencoder(),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "unet": unet_model,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **changes,
    }
    return kind(**parts)


def stable_diffusion() -> Any:
    return _sd(StableDiffusionPipeline, unet(), _pndm())


def stable_diffusion_2() -> Any:
    """Velocity, zero terminal SNR, heads by level, linear projections, gelu, padded with "!"."""
    scheduler = _ddim(
        SD_BETAS, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    model = unet(attention_head_dim=(4, 8), use_linear_projection=True)
    text = clip_text(hidden_act="gelu")
    return _sd(StableDiffusionPipeline, model, scheduler, tokenizer=clip_tokenizer("!"), text_encoder=text)


def _xl_unet(**changes: Any) -> Any:
    config = {
        "cross_attention_dim": WIDTH + 16,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
        **changes,
    }
    return unet(**config)


def stable_diffusion_xl(force_zeros: bool = True) -> Any:
    model = _xl_unet()
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.1, 0.9]),
        text_encoder=clip_text(),
        # Like SDXL's: 2 as the end token means the largest id (the layout before transformers 4.31).
        text_encoder_2=clip_text(True, hidden_size=16, num_hidden_layers=2, hidden_act="gelu", eos_token_id=2),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        unet=model,
        scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def latent_consistency() -> Any:
    scheduler = LCMScheduler(**SD_BETAS, set_alpha_to_one=True, original_inference_steps=50)
    return _sd(LatentConsistencyModelPipeline, unet(time_cond_proj_dim=16), scheduler)


def turbo() -> Any:
    scheduler = EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="trailing")
    return _sd(StableDiffusionPipeline, unet(), scheduler)


def inpainting() -> Any:
    return _sd(StableDiffusionInpaintPipeline, unet(in_channels=9), _pndm())


def pix2pix() -> Any:
    scheduler = EulerAncestralDiscreteScheduler(**SD_BETAS)
    return _sd(StableDiffusionInstructPix2PixPipeline, unet(in_channels=8), scheduler)


def with_tiny_autoencoder() -> Any:
    return _sd(StableDiffusionPipeline, unet(), _pndm(), vae=tiny_autoencoder())


def inpainting_by_latents() -> Any:
    """A UNet without mask channels."""
    return _sd(StableDiffusionInpaintPipeline, unet(), _pndm())


def from_picture() -> Any:
    return _sd(StableDiffusionImg2ImgPipeline, unet(), _ddim(SD_BETAS, steps_offset=1))


def xl_from_picture() -> Any:
    parts = dict(stable_diffusion_xl().components)
    return StableDiffusionXLImg2ImgPipeline(
        **{name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")},
        add_watermarker=False,
    )


def xl_inpainting() -> Any:
    """SDXL with mask and masked picture beside the latent."""
    parts = dict(stable_diffusion_xl().components)
    return StableDiffusionXLInpaintPipeline(
        **{name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor", "unet")},
        unet=_xl_unet(in_channels=9),
        add_watermarker=False,
    )


def xl_refiner() -> Any:
    """The second text encoder alone, and an aesthetic score in the place of the target size."""
    parts = dict(stable_diffusion_xl().components)
    kept = ("vae", "text_encoder_2", "tokenizer_2", "scheduler")
    return StableDiffusionXLImg2ImgPipeline(
        **{name: parts[name] for name in kept},
        text_encoder=None,
        tokenizer=None,
        unet=_xl_unet(cross_attention_dim=16, projection_class_embeddings_input_dim=24 + 5 * 8),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def ldm_text() -> Any:
    config = LDMBertConfig(
        vocab_size=len(bert_vocabulary()),
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=WIDTH,
        init_std=0.2,
    )
    # The pipeline makes latents of an eighth of the picture, so the first stage halves three times.
    first_stage = autoencoder(
        block_out_channels=(16, 16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return LDMTextToImagePipeline(
        vqvae=first_stage,
        bert=lively(LDMBertModel(config)),
        tokenizer=BertTokenizer(vocab=bert_vocabulary()),
        unet=unet(),
        scheduler=_ddim(SD_BETAS),
    )


def ldm_superresolution() -> Any:
    return LDMSuperResolutionPipeline(
        vqvae=codebook(), unet=plain_unet(in_channels=6, sample_size=32), scheduler=_ddim(LDM_BETAS)
    )


def ldm_unconditional() -> Any:
    return LDMPipeline(vqvae=codebook(), unet=plain_unet(), scheduler=_ddim(LDM_BETAS, set_alpha_to_one=True))


def ldm_resampling_in_blocks() -> Any:
    """Residual blocks that change the size of both of their branches, on the side with attention only."""
    model = plain_unet(downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift")
    return LDMPipeline(vqvae=codebook(), unet=model, scheduler=_ddim(LDM_BETAS))


MAKERS: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "lcm": latent_consistency,
    "turbo": turbo,
    "inpaint9": inpainting,
    "inpaint4": inpainting_by_latents,
    "img2img": from_picture,
    "sdxl-img2img": xl_from_picture,
    "sdxl-inpaint9": xl_inpainting,
    "sdxl-refiner": xl_refiner,
    "ip2p": pix2pix,
    "taesd": with_tiny_autoencoder,
    "ldm-text2im": ldm_text,
    "ldm-superres": ldm_superresolution,
    "ldm-uncond": ldm_unconditional,
    "ldm-uncond-resnet": ldm_resampling_in_blocks,
}


def save(name: str, folder: Path) -> Any:
    """Make the pipeline ``name``, save it to ``folder``, and give it as diffusers runs it."""
    torch.manual_seed(sum(name.encode()))
    pipeline = MAKERS[name]()
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    assert json.loads(index.read_text())["_class_name"] == type(pipeline).__name__
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
