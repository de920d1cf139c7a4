"""The pictures that the denoiser was trained on: ``python -m examples.emoji.reference FOLDER pictures.npz``.

FOLDER/pictures.npz (see ``data.py``) holds emoji without backgrounds; the file written holds ``pictures`` uint8
[N, 64, 64, 3], a random part of all trained combinations, for ``latentedge compare --reference``.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from examples.emoji.captions import STYLES, read_concepts
from examples.emoji.data import Pictures, background_colours, compose, held_out


def trained_pictures(pictures: Pictures, count: int, seed: int = 0) -> np.ndarray:
    """``count`` different pictures of the training corpus, uint8 [count, 64, 64, 3]."""
    first = {label: index * len(STYLES) for index, label in enumerate(pictures.labels)}
    concepts = [first[concept.label] for concept in read_concepts()]
    places = np.argwhere(~held_out(len(concepts)))
    random = np.random.default_rng(seed)
    chosen = places[random.choice(len(places), min(count, len(places)), replace=False)]
    own = np.array(concepts)[chosen[:, 0]] + chosen[:, 1]
    colours = background_colours()[chosen[:, 2]]
    return np.stack([compose(pictures.pictures[one], colour) for one, colour in zip(own, colours, strict=True)])


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--count", default=2000, show_default=True)
def main(folder: Path, target: Path, count: int) -> None:
    """Compose COUNT pictures from FOLDER/pictures.npz."""
    np.savez_compressed(target, pictures=trained_pictures(Pictures.load(folder), count))


if __name__ == "__main__":
    main()
