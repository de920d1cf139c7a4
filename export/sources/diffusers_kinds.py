"""The pipeline classes of diffusers that are known: task, parts and conditioning of each, one line in a table."""

from __future__ import annotations

from dataclasses import dataclass

from latentedge.runtime.bundle import ConcatInput


@dataclass(frozen=True)
class Kind:
    """A pipeline class: where its parts are and how they are used."""

    class_name: str
    family: str
    task: str
    first_stage: str = "vae"
    #: Text encoder and tokenizer folders, in order.
    text: tuple[tuple[str, str], ...] = ()
    concat: tuple[ConcatInput, ...] = ()
    image_guidance: bool = False
    guidance_below_one: bool = False
    #: Whether latents are divided by the first stage's scaling_factor.
    scaled: bool = True
    #: The class that reads LoRA files for this family.
    lora_pipeline: str | None = None
    #: What the class's constructor sets in its scheduler, whatever the scheduler's configuration says.
    schedule: tuple[tuple[str, object], ...] = ()


CLIP = (("text_encoder", "tokenizer"),)
CLIP_TWICE = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
INPAINTING = (
    ConcatInput("mask", 1, mask_values=(0.0, 1.0)),
    ConcatInput("masked_image_latent", 4, scaled=True, posterior="sample", hole_value=0.0),
)
EDITING = (ConcatInput("image_latent", 4, scaled=False, posterior="mode"),)
SD, SDXL, LDM = "stable-diffusion", "stable-diffusion-xl", "latent-diffusion"
OFFSET, NO_CLIPPING, PLMS_ONLY = ("steps_offset", 1), ("clip_sample", False), ("skip_prk_steps", True)
SD_LORA, SDXL_LORA = "StableDiffusionPipeline", "StableDiffusionXLPipeline"

KINDS = (
    Kind(
        "StableDiffusionPipeline", SD, "text-to-image", text=CLIP, lora_pipeline=SD_LORA, schedule=(OFFSET, NO_CLIPPING)
    ),
    Kind(
        "StableDiffusionImg2ImgPipeline",
        SD,
        "text-to-image",
        text=CLIP,
        lora_pipeline=SD_LORA,
        schedule=(OFFSET, NO_CLIPPING),
    ),
    Kind(
        "StableDiffusionInpaintPipeline",
        SD,
        "inpainting",
        text=CLIP,
        concat=INPAINTING,
        lora_pipeline=SD_LORA,
        schedule=(OFFSET, PLMS_ONLY),
    ),
    Kind(
        "StableDiffusionInstructPix2PixPipeline",
        SD,
        "instruct-pix2pix",
        text=CLIP,
        concat=EDITING,
        image_guidance=True,
        lora_pipeline=SD_LORA,
    ),
    Kind("LatentConsistencyModelPipeline", SD, "text-to-image", text=CLIP, lora_pipeline=SD_LORA),
    Kind("LatentConsistencyModelImg2ImgPipeline", SD, "text-to-image", text=CLIP, lora_pipeline=SD_LORA),
    Kind("StableDiffusionXLPipeline", SDXL, "text-to-image", text=CLIP_TWICE, lora_pipeline=SDXL_LORA),
    Kind("StableDiffusionXLImg2ImgPipeline", SDXL, "text-to-image", text=CLIP_TWICE, lora_pipeline=SDXL_LORA),
    Kind(
        "StableDiffusionXLInpaintPipeline",
        SDXL,
        "inpainting",
        text=CLIP_TWICE,
        concat=INPAINTING,
        lora_pipeline=SDXL_LORA,
    ),
    Kind(
        "LDMTextToImagePipeline",
        LDM,
        "text-to-image",
        first_stage="vqvae",
        text=(("bert", "tokenizer"),),
        guidance_below_one=True,
    ),
    Kind(
        "LDMSuperResolutionPipeline",
        LDM,
        "super-resolution",
        first_stage="vqvae",
        concat=(ConcatInput("low_resolution_image", 3),),
        scaled=False,
    ),
    Kind("LDMPipeline", LDM, "unconditional", first_stage="vqvae"),
)
PIPELINES = {kind.class_name: kind for kind in KINDS}
