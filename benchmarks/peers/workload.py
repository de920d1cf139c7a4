"""A diffusers folder with random weights, for every peer to run: ``python workload.py sd15|medium|default FOLDER``.

``sd15`` is the architecture of Stable Diffusion 1.5 with its sizes, ``medium`` a denoiser of 61 million parameters,
``default`` has the sizes of the embedded default model. Random weights cost the same time as trained ones. Needs the
diffusers environment.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

Sizes = dict[str, Any]


def _unet(side: int, channels: tuple[int, ...], layers: int, width: int, heads: int) -> Sizes:
    """A denoiser without attention at its full resolution."""
    return {
        "sample_size": side,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "cross_attention_dim": width,
        "attention_head_dim": heads,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }


def _vae(side: int, channels: tuple[int, ...], layers: int, **others: int) -> Sizes:
    return {
        "sample_size": side,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        **others,
    }


def _text(width: int, inner: int, layers: int, heads: int) -> Sizes:
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}


#: Arguments of each network.
WORKLOADS: dict[str, dict[str, Sizes]] = {
    "sd15": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _vae(512, (128, 256, 512, 512), 2),
        "text": _text(768, 3072, 12, 12),
    },
    "medium": {
        "unet": _unet(32, (128, 256, 384), 2, 256, 8),
        "vae": _vae(128, (32, 64, 64), 1, norm_num_groups=8),
        "text": _text(256, 512, 2, 4),
    },
    "default": {
        "unet": _unet(16, (64, 128, 192), 1, 128, 4),
        "vae": _vae(64, (64, 64, 64), 1),
        "text": _text(128, 512, 2, 4),
    },
}


def write(name: str, folder: Path) -> None:
    """Write the workload ``name`` as a diffusers pipeline."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    diffusers: Any = import_module("diffusers")
    torch.manual_seed(0)
    sizes = WORKLOADS[name]
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**sizes["vae"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=49408, **sizes["text"])),
        tokenizer=_tokenizer(),
        unet=diffusers.UNet2DConditionModel(**sizes["unet"]),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    write_vocabulary(folder / "tokenizer")
    name_as_published(folder / "text_encoder" / "model.safetensors")


def _tokenizer() -> Any:
    """A CLIP tokenizer that knows single characters only: what a prompt costs does not depend on its words."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as name:
        write_vocabulary(Path(name))
        files = str(Path(name) / "vocab.json"), str(Path(name) / "merges.txt")
        return CLIPTokenizer(*files, model_max_length=77)


def write_vocabulary(folder: Path) -> None:
    """The tokenizer's two files of the older layout, which peers with an older transformers read."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({word: index for index, word in enumerate(words)})
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def name_as_published(path: Path) -> None:
    """Give a CLIP text encoder's tensors the names of published checkpoints, which begin with ``text_model.``.

    transformers 5 reads them and writes none; stable-diffusion.cpp knows a Stable Diffusion 1 by them.
    """
    from safetensors.torch import load_file, save_file

    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    written = path.with_suffix(".renamed")
    save_file(tensors, written, metadata={"format": "pt"})
    written.replace(path)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
