"""Judge the packed model: ``python -m examples.emoji.evaluate FOLDER`` prints figures and writes evaluation.json and
the contact sheets beside this file. FOLDER holds pictures.npz and latents.npz.

A drawn picture counts as its prompt's concept, or style, when the nearest picture of the training corpus (squared
distance of the autoencoder's latents) has that concept, or style. Its background is the named colour nearest to the
median of its border.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from examples.emoji import training
from examples.emoji.captions import BACKGROUNDS, HERE, STYLES, Concept, build_tokenizer, caption, read_concepts
from examples.emoji.data import Pictures, background_colours, held_out
from examples.emoji.drawing import Denoiser, draw
from examples.emoji.pack import load
from examples.emoji.train_autoencoder import held_out_pictures, judge
from examples.emoji.train_denoiser import GRID


@dataclass(frozen=True)
class Model:
    """The packed model with its concepts, and the latents of its whole corpus [concepts, styles, backgrounds, ...]."""

    first_stage: Any
    denoiser: Denoiser
    parameters: dict[str, Any]
    concepts: list[Concept]
    corpus: np.ndarray

    def draw(self, places: np.ndarray, *, steps: int, guidance_scale: float, seed: int) -> np.ndarray:
        """Pictures of [N, 3] concept, style and background numbers, each by its full caption."""
        styles, backgrounds = list(STYLES), list(BACKGROUNDS)
        sentences = [caption(self.concepts[c].names[0], styles[s], backgrounds[b]) for c, s, b in places]
        return self.draw_prompts(sentences, steps=steps, guidance_scale=guidance_scale, seed=seed)

    def draw_prompts(self, sentences: list[str], *, steps: int, guidance_scale: float, seed: int) -> np.ndarray:
        """Pictures of prompts, uint8 [sentences, 64, 64, 3]."""
        return draw(
            self.denoiser,
            self.first_stage,
            build_tokenizer(self.concepts),
            sentences,
            parameters=self.parameters,
            scale_factor=self.parameters["scale_factor"],
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
        )

    @torch.no_grad()
    def nearest(self, pictures: np.ndarray) -> np.ndarray:
        """Concept, style and background numbers, [N, 3], of the nearest corpus picture of each."""
        latents = self.first_stage.encode(training.to_network(pictures)).mode().flatten(1)
        corpus = torch.from_numpy(self.corpus.reshape(-1, latents.shape[1]).astype(np.float32))
        indices = torch.cdist(latents, corpus).argmin(dim=1).numpy()
        return np.stack(np.unravel_index(indices, self.corpus.shape[:3]), axis=1)


def border_backgrounds(pictures: np.ndarray) -> np.ndarray:
    """Number of the named colour nearest to the median of each picture's outermost pixels, [N]."""
    border = np.concatenate([pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1]], axis=1)
    median = np.median(border, axis=1)
    distances = np.square(median[:, None] - background_colours()[None].astype(np.float64)).sum(axis=-1)
    return np.asarray(distances.argmin(axis=1))


def scores(model: Model, places: np.ndarray, pictures: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Shares of right concepts, styles and backgrounds, and which concepts are right, bool [N]."""
    found = model.nearest(pictures)
    right = found[:, 0] == places[:, 0]
    figures = {
        "concept": float(right.mean()),
        "style": float((found[:, 1] == places[:, 1]).mean()),
        "background": float((border_backgrounds(pictures) == places[:, 2]).mean()),
    }
    return {name: round(value, 4) for name, value in figures.items()}, right


def random_places(count: int, allowed: np.ndarray, seed: int) -> np.ndarray:
    """``count`` different combinations among the ``allowed`` [concepts, styles, backgrounds], as [N, 3]."""
    places = np.argwhere(allowed)
    return places[np.random.default_rng(seed).choice(len(places), count, replace=False)]


def grid(pictures: np.ndarray, columns: int) -> list[np.ndarray]:
    """Whole rows of ``columns`` pictures."""
    rows = len(pictures) // columns
    return list(pictures[: rows * columns].reshape(rows, columns, *pictures.shape[1:]))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=20)
@click.option("--guidance-scale", default=2.5)
@click.option("--prompts", default=200, help="Number of random prompts.")
@click.option("--threads", default=2)
@click.option("--to", "target", type=click.Path(path_type=Path, exists=True), default=HERE)
def main(folder: Path, steps: int, guidance_scale: float, prompts: int, threads: int, target: Path) -> None:
    """Judge the packed model against FOLDER/pictures.npz."""
    torch.set_num_threads(threads)
    pictures, (first_stage, denoiser, parameters) = Pictures.load(folder), load()
    unseen = pictures.pictures[held_out_pictures(pictures)]
    decibels, _ = judge(first_stage, unseen, len(unseen))
    with np.load(folder / "latents.npz") as arrays:
        corpus = arrays["latents"]
    model = Model(first_stage, denoiser, parameters, read_concepts(), corpus)
    new = held_out(len(model.concepts))
    sampling: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "seed": 11}
    figures: dict[str, Any] = {
        "autoencoder_decibels": round(decibels, 2),
        "autoencoder_pictures": len(unseen),
        "concepts": len(model.concepts),
        "prompts": prompts,
        "sampler": "ddim",
        **sampling,
    }
    seen_places, new_places = random_places(prompts, ~new, 12), random_places(48, new, 13)
    drawn = model.draw(seen_places, **sampling)
    figures["seen_combinations"], right = scores(model, seen_places, drawn)
    drawn_new = model.draw(new_places, **sampling)
    figures["new_combinations"], _ = scores(model, new_places, drawn_new)
    training.save_grid(grid(model.draw_prompts(GRID, **sampling), 16), target / "contact_sheet.png")
    training.save_grid(grid(drawn, 20), target / "sheet_random.png")
    training.save_grid(grid(drawn_new, 16), target / "sheet_new_combinations.png")
    wrong = np.flatnonzero(~right)[:20]
    names = [model.concepts[c].names[0] for c in seen_places[wrong, 0]]
    figures["wrong_concepts"] = names
    (target / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
