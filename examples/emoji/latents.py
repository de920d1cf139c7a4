"""Latents computed once: ``python -m examples.emoji.latents FOLDER`` writes FOLDER/latents.npz.

``latents`` float16 [concepts, styles, backgrounds, channels, 16, 16], unscaled means of the posterior; ``scale_factor``,
one over their standard deviation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.progress import track

from examples.emoji import training
from examples.emoji.captions import STYLES, read_concepts
from examples.emoji.data import Pictures, background_colours, compose
from examples.emoji.train_autoencoder import build_first_stage


def concept_pictures(pictures: Pictures) -> np.ndarray:
    """The model's own concepts in the order of concepts.txt, uint8 [concepts, styles, 64, 64, 4]."""
    first = {label: index * len(STYLES) for index, label in enumerate(pictures.labels)}
    return np.stack([pictures.pictures[first[one.label] : first[one.label] + len(STYLES)] for one in read_concepts()])


def load_first_stage(folder: Path, kind: str = "kl") -> Any:
    """The trained autoencoder of FOLDER."""
    network = build_first_stage(kind)
    network.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
    return network.eval()


@torch.no_grad()
def encode_all(network: Any, own: np.ndarray) -> np.ndarray:
    """float16 latents [concepts, styles, backgrounds, channels, 16, 16] of ``own`` on every background."""
    rows = []
    for concept in track(own, "latents"):
        composed = compose(concept[:, None], background_colours()[None])
        flat = training.to_network(composed.reshape(-1, *composed.shape[2:]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            means = network.encode(flat).mode()
        rows.append(means.float().numpy().reshape(*composed.shape[:2], *means.shape[1:]).astype(np.float16))
    return np.stack(rows)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", default=2)
def main(folder: Path, threads: int) -> None:
    """Encode every concept, style and background of FOLDER/pictures.npz."""
    torch.set_num_threads(threads)
    latents = encode_all(load_first_stage(folder), concept_pictures(Pictures.load(folder)))
    deviation = float(latents.astype(np.float32).std())
    np.savez(folder / "latents.npz", latents=latents, scale_factor=1.0 / deviation)
    click.echo(f"{latents.shape}: mean {latents.astype(np.float32).mean():.4f}, scale_factor {1.0 / deviation:.5f}")


if __name__ == "__main__":
    main()
