"""Stage two: ``python -m examples.emoji.train_denoiser FOLDER`` writes FOLDER/denoiser.pt.

FOLDER holds autoencoder.pt, latents.npz (see ``latents``) and text_encoder.pt (see ``train_text_encoder``). U-Net and
text encoder are trained together; what is written is their moving average. The run is resumed when
FOLDER/denoiser.state.pt is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.progress import Progress, TextColumn
from torch import Tensor
from torch.nn import functional

from examples.emoji import diffusion, training
from examples.emoji.captions import (
    STYLES,
    caption,
)
from examples.emoji.corpus import Corpus, corpus_of
from examples.emoji.drawing import Denoiser, draw
from examples.emoji.latents import load_first_stage
from examples.emoji.train_autoencoder import autocast
from examples.emoji.train_text_encoder import TextEncoderWithHead, build_text_encoder, patches_of

# Tokens of the empty prompt that are not padding: its start and its end.
EMPTY_TOKENS = 2
# How fast the text encoder learns, beside the U-Net: it comes trained (see ``train_text_encoder``).
TEXT_ENCODER_SCALE = 0.3
# Weight of what the text encoder was trained on before, which it shall not forget.
PATCHES_WEIGHT = 0.1


class DenoiserTrainer:
    """One training step of the denoiser."""

    def __init__(
        self,
        denoiser: Denoiser,
        text: TextEncoderWithHead,
        alphas: Tensor,
        pace: training.Pace,
        *,
        peak: float,
        decay: float,
        bf16: bool,
    ) -> None:
        self.denoiser, self.text, self.alphas, self.peak, self.bf16 = denoiser, text, alphas, peak, bf16
        denoiser.text_encoder = text.text_encoder
        groups: list[dict[str, Any]] = [
            {"params": list(denoiser.unet.parameters())},
            {"params": list(text.parameters()), "scale": TEXT_ENCODER_SCALE},
        ]
        optimiser = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        self.session = training.Session(
            {"denoiser": denoiser, "head": text.head},
            {"denoiser": optimiser},
            {"denoiser": training.MovingAverage(denoiser, decay)},
            pace,
            np.random.default_rng(2),
            torch.Generator().manual_seed(2),
        )

    def step(self, latents: Tensor, input_ids: Tensor) -> float:
        """Train on scaled latents [batch, channels, 16, 16] and token ids [batch, tokens]; returns its loss."""
        session = self.session
        optimiser = session.optimisers["denoiser"]
        training.set_learning_rate(optimiser, session.pace.learning_rate(self.peak))
        noise = torch.randn(latents.shape, generator=session.noise)
        timesteps = diffusion.stratified_timesteps(len(latents), len(self.alphas), session.noise)
        alpha = self.alphas[timesteps]
        noisy, target = diffusion.noised(latents, noise, alpha)
        with autocast(self.bf16):
            context = self.denoiser.text_encoder(input_ids)
            output = self.denoiser.unet(noisy, timesteps.float(), context)
            patches = self.text.read(context)
        loss = diffusion.v_loss(output.float(), target, alpha)
        named = input_ids.count_nonzero(dim=1) > EMPTY_TOKENS
        patches_loss = functional.mse_loss(patches.float()[named], patches_of(latents)[named])
        optimiser.zero_grad(set_to_none=True)
        (loss + PATCHES_WEIGHT * patches_loss).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*self.denoiser.parameters(), *self.text.head.parameters()], 1.0)
        optimiser.step()
        session.averages["denoiser"].update(self.denoiser)
        session.record(loss=float(loss.detach()), patches=float(patches_loss.detach()))
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


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--minutes", default=75.0, help="Wall-clock time of the whole run.")
@click.option("--weights", type=click.Path(path_type=Path, exists=True), help="Start from what fits of these.")
@click.option("--batch-size", default=32)
@click.option("--learning-rate", default=8e-4)
@click.option("--decay", default=0.998, help="Of the moving average.")
@click.option("--grid-every", default=500, help="Steps between grids and saved states.")
@click.option("--threads", default=2)
@click.option("--bf16/--fp32", default=True)
def main(
    folder: Path,
    minutes: float,
    weights: Path | None,
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
    denoiser, text = Denoiser(parameters), build_text_encoder()
    text.load_state_dict(torch.load(folder / "text_encoder.pt", weights_only=True))
    if weights is not None:
        fresh = training.load_fitting(denoiser, torch.load(weights, weights_only=True))
        click.echo(f"{len(fresh)} tensors of the denoiser start anew")
    trainer = DenoiserTrainer(denoiser, text, alphas, pace, peak=learning_rate, decay=decay, bf16=bf16)
    session, state = trainer.session, folder / "denoiser.state.pt"
    session.resume(state)
    columns = (*Progress.get_default_columns(), TextColumn("step {task.fields[step]} loss {task.fields[loss]:.4f}"))
    with Progress(*columns) as bar:
        task = bar.add_task("denoiser", total=1.0, step=pace.step, loss=0.0)
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
    training.save_curves(session.curves, folder / "denoiser_curves.png")
    return f"step {session.pace.step}, {session.pace.spent / 60:.1f} min: loss {session.recent('loss', 200):.4f}"


if __name__ == "__main__":
    main()
