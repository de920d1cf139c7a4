"""Configurations that published models seldom have but diffusers runs: the same picture, or a refusal that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import numpy as np
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import CLIPTokenizer

from latentedge.export.bundle_writer import write_json
from latentedge.export.model import SourceOptions
from latentedge.export.parity import cases_without_reference, with_reference
from latentedge.export.sources import diffusers as source
from latentedge.runtime.errors import LatentEdgeError
from latentedge.runtime.samplers import SAMPLERS
from tests.export.sources import diffusers_models as models
from tests.export.sources.diffusers_running import Recorder, recorder, torch_pipeline
from tests.export.sources.test_diffusers_pictures import TEXT, Case, compare, picture

__all__ = ["recorder"]


@dataclass(frozen=True)
class Model:
    """A pipeline, the case that draws it, and its ``compare`` family."""

    make: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=lambda: {**TEXT, "num_inference_steps": 2})
    latents: tuple[int, ...] | None = (1, 4, 8, 8)
    draws: int = 0
    family: str = "sd"


def sd(**parts: Any) -> Any:
    pipeline = models.stable_diffusion()
    pipeline.register_modules(**parts)
    return pipeline


def sdxl(**parts: Any) -> Any:
    pipeline = models.stable_diffusion_xl()
    pipeline.register_modules(**parts)
    return pipeline


def tokenizer_of(length: int) -> CLIPTokenizer:
    vocabulary, merges = models.clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=models.END, model_max_length=length)


def masking_text_encoder() -> Any:
    text = models.clip_text()
    text.config.use_attention_mask = True
    return text


def ldm_text_of_more_positions() -> Any:
    pipeline = models.ldm_text()
    config = LDMBertConfig(**{**pipeline.bert.config.to_dict(), "max_position_embeddings": 100})
    pipeline.register_modules(bert=models.lively(LDMBertModel(config)))
    return pipeline


def ldm(**unet: Any) -> Any:
    pipeline = models.ldm_unconditional()
    pipeline.register_modules(unet=models.plain_unet(**unet))
    return pipeline


def sd_unet(**changes: Any) -> Callable[[], Any]:
    return lambda: sd(unet=models.unet(**changes))


UNCONDITIONAL: dict[str, Any] = {
    "call": {"num_inference_steps": 2},
    "latents": None,
    "draws": 1,
    "family": "ldm-uncond",
}
MODELS = {
    "padded to the tokenizer's length": Model(lambda: sd(tokenizer=tokenizer_of(40))),
    "a text encoder of more positions": Model(lambda: sd(text_encoder=models.clip_text(max_position_embeddings=100))),
    "padding is masked": Model(lambda: sd(text_encoder=masking_text_encoder())),
    "padding is masked, end token 2": Model(
        lambda: sd(text_encoder=masking_text_encoder(), tokenizer=models.clip_tokenizer("!"))
    ),
    "both of SDXL's text encoders project": Model(
        lambda: sdxl(text_encoder=models.clip_text(True, projection_dim=24)), family="sdxl"
    ),
    "LDM's text, of more positions": Model(
        ldm_text_of_more_positions, {"prompt": "the red cat", "guidance_scale": 3.0, "num_inference_steps": 2}
    ),
    "a UNet without a size": Model(
        sd_unet(sample_size=None), {**TEXT, "num_inference_steps": 2, "height": 16, "width": 16}
    ),
    "the text added to the timestep": Model(sd_unet(addition_embed_type="text", addition_embed_type_num_heads=4)),
    "the text projected": Model(
        sd_unet(encoder_hid_dim=32, encoder_hid_dim_type="text_proj", cross_attention_dim=40)
    ),
    "widths of levels without attention": Model(sd_unet(cross_attention_dim=(32, 40), mid_block_type=None)),
    "attention with the text's keys added": Model(
        sd_unet(
            down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            resnet_time_scale_shift="scale_shift",
        )
    ),
    "a table of timesteps": Model(lambda: ldm(time_embedding_type="learned", num_train_timesteps=1000), **UNCONDITIONAL),
    "Fourier features of timesteps": Model(sd_unet(time_embedding_type="fourier")),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_same_picture(name: str, tmp_path: Path, recorder: Recorder) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = MODELS[name]
    theirs = model.make()
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "model")
    ours = torch_pipeline(source.load(tmp_path / "model", SourceOptions()), tmp_path / "bundle")
    compare(Case(model.family, model.call, latents=model.latents, draws=model.draws), theirs, ours, recorder)


def test_a_large_picture_is_enlarged_whole(tmp_path: Path, recorder: Recorder) -> None:
    """Up to 128 pixels, as diffusers does it, however small the pictures are that the UNet was made for."""
    torch.manual_seed(1)
    theirs = models.ldm_superresolution()
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "model")
    ours = torch_pipeline(source.load(tmp_path / "model", SourceOptions()), tmp_path / "bundle")
    call = {"num_inference_steps": 1, "image": picture(96).resize((96, 64))}
    compare(Case("ldm-superres", call, latents=None, draws=1), theirs, ours, recorder)


def test_sides_of_a_unet_that_resamples_by_filters(tmp_path: Path) -> None:
    """It takes whole halvings only: so are the sides that are declared and compared."""
    torch.manual_seed(1)
    blocks = {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 32, 64),
        "sample_size": 10,
    }
    ldm(**blocks).save_pretrained(tmp_path)
    model = source.load(tmp_path, SourceOptions())
    part = next(component for component in model.components if component.spec.name == "unet")
    assert part.build is not None
    network = part.build()
    every = (part.trace_axes, *part.compare_axes)
    for name in ("latent_height", "latent_width"):
        axis = part.spec.axes[name]
        lengths = {axes[name] for axes in every}
        assert (axis.min, axis.opt, axis.multiple) == (4, 8, 4)
        assert len(lengths) > 1
        assert all(length % 4 == 0 for length in lengths)
    for axes in every:
        inputs = part.sample_inputs(axes, np.random.default_rng(0))
        with torch.no_grad():
            output = network(*(torch.from_numpy(inputs[spec.name]) for spec in part.spec.inputs))
        assert tuple(output.shape) == part.spec.outputs[0].resolve(axes)


def test_a_unet_of_the_timesteps_logarithm_is_not_compared_at_zero(tmp_path: Path) -> None:
    """The original gives no numbers there."""
    torch.manual_seed(1)
    ldm(time_embedding_type="fourier").save_pretrained(tmp_path)
    model = source.load(tmp_path, SourceOptions())
    part = next(component for component in model.components if component.spec.name == "unet")
    assert part.build is not None
    cases = cases_without_reference(part)
    assert min(float(case.inputs["timestep"].min()) for case in cases) == 1.0
    assert len(list(with_reference(part.build(), part.spec, cases))) == len(cases) > 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_class_embeds": 10}, "takes class labels, which a StableDiffusionPipeline does not give"),
        ({"class_embed_type": "timestep"}, "takes class labels"),
        ({"addition_embed_type": "text_image"}, "an added embedding of the type text_image"),
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "image_proj"}, "a condition of the type image_proj"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"cross_attention_dim": 40}, "takes texts of the width 40; text_encoder give 32"),
    ],
)
def test_a_unet_that_needs_more_than_its_pipeline_gives(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    models.save("sd", tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(LatentEdgeError, match=message):
        source.load(tmp_path, SourceOptions())


@pytest.mark.parametrize(("version", "side"), [("0.6.0.dev0", 64), ("0.8.1", 64), ("0.9.0", 8), ("0.42.1", 8)])
def test_the_size_of_an_older_unet_is_corrected(version: str, side: int, tmp_path: Path) -> None:
    models.save("sd", tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_diffusers_version": version}))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert theirs.unet.config.sample_size == side
    model = source.load(tmp_path, SourceOptions())
    assert (model.defaults.height, model.defaults.width) == (2 * side, 2 * side)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in SAMPLERS if hasattr(diffusers, name)])
def test_every_scheduler_that_diffusers_writes_is_written(name: str, tmp_path: Path) -> None:
    """Its configuration may hold what JSON has no number for."""
    folder = tmp_path / "model"
    models.save("sd", folder)
    getattr(diffusers, name)().save_pretrained(folder / "scheduler")
    model = source.load(folder, SourceOptions())
    assert model.schedule["_class_name"] == name
    assert not model.messages
    write_json(tmp_path / "schedule.json", model.schedule)


def test_a_scheduler_that_is_not_known_is_said(tmp_path: Path) -> None:
    models.save("sd", tmp_path)
    diffusers.CMStochasticIterativeScheduler().save_pretrained(tmp_path / "scheduler")
    assert any(
        "CMStochasticIterativeScheduler" in message for message in source.load(tmp_path, SourceOptions()).messages
    )
