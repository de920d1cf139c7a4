"""Stage two: ``python -m examples.emoji.train_denoiser FOLDER`` writes FOLDER/denoiser.pt.

FOLDER holds autoencoder.pt and latents.npz (see ``latents``). U-Net and text encoder are trained together; what is
written is their moving average. The run is resumed when FOLDER/denoiser.state.pt is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from rich.progress import Progress, TextColumn
from tokenizers import Tokenizer
from torch import Tensor

from examples.emoji import diffusion, training
from examples.emoji.captions import (
    BACKGROUNDS,
    DEFAULT_BACKGROUND,
    STYLES,
    Concept,
    build_tokenizer,
    caption,
    encode,
    random_caption,
    read_concepts,
)
from examples.emoji.data import held_out
from examples.emoji.drawing import Denoiser, draw
from examples.emoji.latents import load_first_stage
from examples.emoji.train_autoencoder import autocast

DROPPED_CONDITIONS = 0.1
WHITE_SHARE = 0.2


@dataclass(frozen=True)
class Corpus:
    """Scaled latents float32 [concepts, styles, backgrounds, 4, 16, 16], what they show, and what is held out."""

    latents: Tensor
    concepts: list[Concept]
    unseen: np.ndarray
    tokenizer: Tokenizer

    def batch(self, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Random seen combinations and one of their captions: latents [count, 4, 16, 16], ids [count, tokens]."""
        names, white = list(BACKGROUNDS), list(BACKGROUNDS).index(DEFAULT_BACKGROUND)
        places, sentences = [], []
        while len(places) < count:
            concept, style = int(random.integers(len(self.concepts))), int(random.integers(len(STYLES)))
            background = white if random.random() < WHITE_SHARE else int(random.integers(len(names)))
            if self.unseen[concept, style, background]:
                continue
            places.append((concept, style, background))
            dropped = random.random() < DROPPED_CONDITIONS
            said = random_caption(self.concepts[concept], STYLES[style], names[background], random)
            sentences.append("" if dropped else said)
        concept_index, style_index, background_index = np.array(places).T
        latents = self.latents[concept_index, style_index, background_index].float()
        return latents, torch.from_numpy(encode(self.tokenizer, sentences))


class DenoiserTrainer:
    """One training step of the denoiser."""

    def __init__(
        self, denoiser: Denoiser, alphas: Tensor, pace: training.Pace, *, peak: float, decay: float, bf16: bool
    ) -> None:
        self.denoiser, self.alphas, self.peak, self.bf16 = denoiser, alphas, peak, bf16
        optimiser = torch.optim.AdamW(denoiser.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        self.session = training.Session(
            {"denoiser": denoiser},
            {"denoiser": optimiser},
            {"denoiser": training.MovingAverage(denoiser, decay)},
            pace,
            np.random.default_rng(2),
            torch.Generator().manual_seed(2),
        )

    def step(self, latents: Tensor, input_ids: Tensor) -> float:
        """Train on scaled latents [batch, 4, 16, 16] and token ids [batch, tokens]; returns the loss."""
        session = self.session
        optimiser = session.optimisers["denoiser"]
        training.set_learning_rate(optimiser, session.pace.learning_rate(self.peak))
        noise = torch.randn(latents.shape, generator=session.noise)
        timesteps = diffusion.stratified_timesteps(len(latents), len(self.alphas), session.noise)
        alpha = self.alphas[timesteps]
        noisy, target = diffusion.noised(latents, noise, alpha)
        with autocast(self.bf16):
            output = self.denoiser(noisy, timesteps.float(), input_ids)
        loss = diffusion.v_loss(output.float(), target, alpha)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        optimiser.step()
        session.averages["denoiser"].update(self.denoiser)
        session.record(loss=float(loss.detach()))
        session.pace.advance()
        return float(loss.detach())


GRID = [
    caption(name, style, background)
    for style, background in zip(STYLES, ("white", "blue", "yellow"), strict=True)
    for name in (
        "red heart", "smiley", "blue heart", "cat", "car", "pizza", "rocket", "tree", "crying face", "star", "apple",
        "guitar", "panda", "umbrella", "ghost", "sunflower",
    )
]  # fmt: skip


def corpus_of(folder: Path) -> tuple[Corpus, float]:
    """The corpus of FOLDER/latents.npz, and its scale factor."""
    with np.load(folder / "latents.npz") as arrays:
        scale_factor = float(arrays["scale_factor"])
        latents = torch.from_numpy(arrays["latents"]) * scale_factor
    concepts = read_concepts()
    return Corpus(latents, concepts, held_out(len(concepts)), build_tokenizer(concepts)), scale_factor


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--minutes", default=75.0, help="Wall-clock time of the whole run.")
@click.option("--batch-size", default=32)
@click.option("--learning-rate", default=8e-4)
@click.option("--decay", default=0.998, help="Of the moving average.")
@click.option("--grid-every", default=500, help="Steps between grids and saved states.")
@click.option("--threads", default=2)
@click.option("--bf16/--fp32", default=True)
def main(
    folder: Path,
    minutes: float,
    batch_size: int,
    learning_rate: float,
    decay: float,
    grid_every: int,
    threads: int,
    bf16: bool,
) -> None:
    """Train U-Net and text encoder on FOLDER/latents.npz."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    parameters = training.read_config()
    corpus, scale_factor = corpus_of(folder)
    pace = training.Pace(minutes=minutes)
    alphas = diffusion.alphas_cumprod(parameters)
    trainer = DenoiserTrainer(Denoiser(parameters), alphas, pace, peak=learning_rate, decay=decay, bf16=bf16)
    session, state = trainer.session, folder / "denoiser.state.pt"
    session.resume(state)
    columns = (*Progress.get_default_columns(), TextColumn("step {task.fields[step]} loss {task.fields[loss]:.4f}"))
    with Progress(*columns) as bar:
        task = bar.add_task("denoiser", total=1.0, completed=pace.progress, step=pace.step, loss=0.0)
        while pace.progress < 1.0:
            loss = trainer.step(*corpus.batch(batch_size, session.random))
            bar.update(task, completed=pace.progress, step=pace.step, loss=loss)
            if pace.step % 50 == 0:
                bar.console.log(f"step {pace.step}, {pace.spent / 60:.1f} min, loss {session.recent('loss'):.4f}")
            if pace.step % grid_every == 0:
                session.save(state)
                bar.console.log(report(trainer, corpus, folder, scale_factor))
    session.save(state)
    click.echo(report(trainer, corpus, folder, scale_factor))


def report(trainer: DenoiserTrainer, corpus: Corpus, folder: Path, scale_factor: float) -> str:
    """Write the averaged weights, a grid drawn with them, and the loss curve."""
    session, parameters = trainer.session, training.read_config()
    averaged = Denoiser(parameters)
    averaged.load_state_dict(session.averages["denoiser"].weights)
    torch.save(averaged.state_dict(), folder / "denoiser.pt")
    pictures = draw(
        averaged.eval(), load_first_stage(folder), corpus.tokenizer, GRID, parameters=parameters,
        scale_factor=scale_factor, steps=20,
    )  # fmt: skip
    rows = np.array_split(pictures, len(STYLES))
    training.save_grid(rows, folder / "grids" / f"{session.pace.step:06d}.png")
    training.save_curves({"loss": session.curves["loss"]}, folder / "denoiser_curves.png")
    return f"step {session.pace.step}, {session.pace.spent / 60:.1f} min: loss {session.recent('loss', 200):.4f}"


if __name__ == "__main__":
    main()
