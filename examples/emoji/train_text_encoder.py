"""Before stage two: ``python -m examples.emoji.train_text_encoder FOLDER`` writes FOLDER/text_encoder.pt.

The text encoder first learns what each caption looks like: its first sixteen output tokens predict the latent, one
quarter-by-quarter patch each, through one linear layer that is thrown away afterwards. A caption costs a small
part of a denoising step, so rare names are learned here far sooner than through the denoiser alone.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from rich.progress import Progress, TextColumn
from torch import Tensor, nn
from torch.nn import functional

from examples.emoji import training
from examples.emoji.corpus import Corpus, corpus_of
from examples.emoji.train_autoencoder import autocast

PATCHES, PATCH = 4, 4


class TextEncoderWithHead(nn.Module):
    """The text encoder, and the linear layer that reads one patch of the latent from each of its first tokens."""

    def __init__(self, text_encoder: nn.Module, width: int, channels: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.head = nn.Linear(width, channels * PATCH * PATCH)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [batch, tokens] to predicted patches [batch, 16, channels * 16]."""
        return self.read(self.text_encoder(input_ids))

    def read(self, context: Tensor) -> Tensor:
        """The text encoder's output [batch, tokens, width] to predicted patches."""
        patches: Tensor = self.head(context[:, : PATCHES * PATCHES])
        return patches


def patches_of(latents: Tensor) -> Tensor:
    """[batch, channels, 16, 16] to [batch, 16, channels * 16], row by row."""
    batch, channels = latents.shape[:2]
    split = latents.reshape(batch, channels, PATCHES, PATCH, PATCHES, PATCH)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, PATCHES * PATCHES, channels * PATCH * PATCH)


class TextEncoderTrainer:
    """One training step of the text encoder on captions and latents."""

    def __init__(self, module: TextEncoderWithHead, pace: training.Pace, *, peak: float, bf16: bool) -> None:
        self.module, self.peak, self.bf16 = module, peak, bf16
        self.session = training.Session(
            {"module": module},
            {"module": torch.optim.AdamW(module.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=1e-3)},
            {},
            pace,
            np.random.default_rng(4),
            torch.Generator().manual_seed(4),
        )

    def step(self, latents: Tensor, input_ids: Tensor) -> float:
        """Train on scaled latents [batch, channels, 16, 16] and token ids; returns the mean squared error."""
        session = self.session
        optimiser = session.optimisers["module"]
        training.set_learning_rate(optimiser, session.pace.learning_rate(self.peak))
        with autocast(self.bf16):
            patches = self.module(input_ids)
        loss = functional.mse_loss(patches.float(), patches_of(latents))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        optimiser.step()
        session.record(error=float(loss.detach()))
        session.pace.advance()
        return float(loss.detach())


def build_text_encoder() -> TextEncoderWithHead:
    """The configuration's text encoder with a head, initial weights."""
    parameters = training.read_config()
    stage = parameters["cond_stage_config"]
    return TextEncoderWithHead(training.build(stage), stage["params"]["n_embed"], parameters["channels"])


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--minutes", default=6.0, help="Wall-clock time of the whole run.")
@click.option("--weights", type=click.Path(path_type=Path, exists=True), help="Start from what fits of these.")
@click.option("--batch-size", default=64)
@click.option("--learning-rate", default=1.5e-3)
@click.option("--threads", default=2)
@click.option("--bf16/--fp32", default=True)
def main(
    folder: Path, minutes: float, weights: Path | None, batch_size: int, learning_rate: float, threads: int, bf16: bool
) -> None:
    """Train the text encoder on FOLDER/latents.npz."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    corpus, _ = corpus_of(folder)
    module = build_text_encoder()
    if weights is not None:
        fresh = training.load_fitting(module, torch.load(weights, weights_only=True))
        click.echo(f"{len(fresh)} tensors of the text encoder start anew")
    trainer = TextEncoderTrainer(module, training.Pace(minutes=minutes), peak=learning_rate, bf16=bf16)
    session, state = trainer.session, folder / "text_encoder.state.pt"
    session.resume(state)
    columns = (*Progress.get_default_columns(), TextColumn("step {task.fields[step]} error {task.fields[error]:.4f}"))
    with Progress(*columns) as bar:
        task = bar.add_task("text encoder", total=1.0, step=0, error=0.0)
        while session.pace.progress < 1.0:
            error = trainer.step(*corpus.batch(batch_size, session.random, dropped=0.0))
            bar.update(task, completed=session.pace.progress, step=session.pace.step, error=error)
            if session.pace.step % 100 == 0:
                bar.console.log(report(trainer, corpus, folder))
                session.save(state)
    session.save(state)
    click.echo(report(trainer, corpus, folder))


def report(trainer: TextEncoderTrainer, corpus: Corpus, folder: Path) -> str:
    """Write the weights; say how much of the latents' variance the captions explain."""
    session = trainer.session
    torch.save(trainer.module.state_dict(), folder / "text_encoder.pt")
    explained = 1.0 - session.recent("error") / float(corpus.latents.float().var())
    return f"step {session.pace.step}, {session.pace.spent / 60:.1f} min: {100 * explained:.1f}% of variance explained"


if __name__ == "__main__":
    main()
