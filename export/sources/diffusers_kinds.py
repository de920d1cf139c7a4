"""The pipeline classes of diffusers that are known: task, parts, conditioning and defaults of each, as a table.

The defaults are those of the class's own ``__call__``; a test compares them with the library's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    steps: int = 50
    guidance_scale: float = 1.0
    strength: float = 0.8


CLIP = (("text_encoder", "tokenizer"),)
CLIP_TWICE = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
INPAINTING = (
    ConcatInput("mask", 1, mask_values=(0.0, 1.0)),
    ConcatInput("masked_image_latent", 4, scaled=True, posterior="sample", hole_value=0.0),
)
EDITING = (ConcatInput("image_latent", 4, scaled=False, posterior="mode"),)
OFFSET, NO_CLIPPING, PLMS_ONLY = ("steps_offset", 1), ("clip_sample", False), ("skip_prk_steps", True)
LDM = "latent-diffusion"

SD = Kind(
    "StableDiffusionPipeline",
    "stable-diffusion",
    "text-to-image",
    text=CLIP,
    lora_pipeline="StableDiffusionPipeline",
    schedule=(OFFSET, NO_CLIPPING),
    guidance_scale=7.5,
)
SD_INPAINTING = replace(
    SD,
    class_name="StableDiffusionInpaintPipeline",
    task="inpainting",
    concat=INPAINTING,
    schedule=(OFFSET, PLMS_ONLY),
    strength=1.0,
)
PIX2PIX = replace(
    SD,
    class_name="StableDiffusionInstructPix2PixPipeline",
    task="instruct-pix2pix",
    concat=EDITING,
    image_guidance=True,
    schedule=(),
    steps=100,
)
LCM = replace(SD, class_name="LatentConsistencyModelPipeline", schedule=(), steps=4, guidance_scale=8.5)
SDXL = Kind(
    "StableDiffusionXLPipeline",
    "stable-diffusion-xl",
    "text-to-image",
    text=CLIP_TWICE,
    lora_pipeline="StableDiffusionXLPipeline",
    guidance_scale=5.0,
)
SDXL_INPAINTING = replace(
    SDXL,
    class_name="StableDiffusionXLInpaintPipeline",
    task="inpainting",
    concat=INPAINTING,
    guidance_scale=7.5,
    strength=0.9999,
)
LDM_TEXT = Kind(
    "LDMTextToImagePipeline",
    LDM,
    "text-to-image",
    first_stage="vqvae",
    text=(("bert", "tokenizer"),),
    guidance_below_one=True,
)
LDM_SUPERRESOLUTION = Kind(
    "LDMSuperResolutionPipeline",
    LDM,
    "super-resolution",
    first_stage="vqvae",
    concat=(ConcatInput("low_resolution_image", 3),),
    scaled=False,
    steps=100,
)
LDM_UNCONDITIONAL = Kind("LDMPipeline", LDM, "unconditional", first_stage="vqvae")

KINDS = (
    SD,
    replace(SD, class_name="StableDiffusionImg2ImgPipeline"),
    SD_INPAINTING,
    PIX2PIX,
    LCM,
    replace(LCM, class_name="LatentConsistencyModelImg2ImgPipeline"),
    SDXL,
    replace(SDXL, class_name="StableDiffusionXLImg2ImgPipeline", strength=0.3),
    SDXL_INPAINTING,
    LDM_TEXT,
    LDM_SUPERRESOLUTION,
    LDM_UNCONDITIONAL,
)
PIPELINES = {kind.class_name: kind for kind in KINDS}
