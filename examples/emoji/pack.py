"""From trained stages to a checkpoint: ``python -m examples.emoji.pack FOLDER`` writes model.safetensors,
tokenizer.json and the scale factor in config.yaml, beside this file.

The checkpoint has CompVis's layout: ``first_stage_model.``, ``cond_stage_model.`` and ``model.diffusion_model.`` keys,
half precision, the denoiser's moving average in place of its raw weights. The schedule follows from config.yaml.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.emoji import training
from examples.emoji.captions import HERE, build_tokenizer, read_concepts
from examples.emoji.drawing import Denoiser

PREFIXES = {
    "first_stage": "first_stage_model.",
    "unet": "model.diffusion_model.",
    "text_encoder": "cond_stage_model.",
}


def join(first_stage: dict[str, Tensor], denoiser: dict[str, Tensor]) -> dict[str, Tensor]:
    """One state_dict in half precision with CompVis's keys."""
    joined = {PREFIXES["first_stage"] + name: value for name, value in first_stage.items()}
    for name, value in denoiser.items():
        network, _, rest = name.partition(".")
        joined[PREFIXES[network] + rest] = value
    return {name: value.to(torch.float16).contiguous() for name, value in joined.items()}


def load(folder: Path = HERE) -> tuple[Any, Denoiser, dict[str, Any]]:
    """First stage, denoiser and parameters of a packed checkpoint, in float32 and evaluation mode."""
    parameters = training.read_config(folder / "config.yaml")
    weights = load_file(folder / "model.safetensors")
    first_stage, denoiser = training.build(parameters["first_stage_config"]), Denoiser(parameters)
    networks = {"first_stage": first_stage, "unet": denoiser.unet, "text_encoder": denoiser.text_encoder}
    for name, network in networks.items():
        prefix = PREFIXES[name]
        network.load_state_dict(
            {key.removeprefix(prefix): value.float() for key, value in weights.items() if key.startswith(prefix)}
        )
    return first_stage.eval(), denoiser.eval(), parameters


def write_scale_factor(path: Path, scale_factor: float) -> None:
    """Replace the one ``scale_factor`` of the YAML and leave the rest of its text as it is."""
    text, count = re.subn(r"(\n\s+scale_factor: )\S+", rf"\g<1>{scale_factor:.6f}", path.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{path} has {count} scale_factor entries, expected 1")
    path.write_text(text, encoding="utf-8")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--to", "target", type=click.Path(path_type=Path, exists=True), default=HERE)
def main(folder: Path, target: Path) -> None:
    """Pack FOLDER's autoencoder.pt and denoiser.pt."""
    import numpy as np

    first_stage = torch.load(folder / "autoencoder.pt", weights_only=True)
    denoiser = torch.load(folder / "denoiser.pt", weights_only=True)
    with np.load(folder / "latents.npz") as arrays:
        write_scale_factor(target / "config.yaml", float(arrays["scale_factor"]))
    path = target / "model.safetensors"
    save_file(join(first_stage, denoiser), path)
    build_tokenizer(read_concepts()).save(str(target / "tokenizer.json"))
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
