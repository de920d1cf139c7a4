"""Stage one: ``python -m examples.emoji.train_autoencoder FOLDER`` writes FOLDER/autoencoder.pt.

FOLDER holds pictures.npz (see ``data``). The run is resumed when FOLDER/autoencoder.state.pt is there.
The network is convolutional throughout, so most of the time goes to crops, a quarter of a picture each.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.progress import Progress, TextColumn
from torch import Tensor

from examples.emoji import losses, training
from examples.emoji.captions import read_concepts
from examples.emoji.data import SIZE, Pictures, background_colours, compose

KL_WEIGHT = 2e-4
DISCRIMINATOR_WEIGHT = 0.1


def held_out_pictures(pictures: Pictures, concepts: int = 85, seed: int = 7) -> np.ndarray:
    """Pictures that no autoencoder sees: all styles of ``concepts`` concepts, as bool [N]."""
    chosen = np.random.default_rng(seed).choice(len(pictures.labels), concepts, replace=False)
    return np.isin(pictures.concept, chosen)


def sampling_weights(pictures: Pictures) -> np.ndarray:
    """Probability of each picture: the model's own concepts twice as often, held-out pictures never."""
    labels = [concept.label for concept in read_concepts()]
    own = np.isin(pictures.concept, [pictures.labels.index(label) for label in labels])
    weights = np.where(held_out_pictures(pictures), 0.0, np.where(own, 2.0, 1.0))
    return np.asarray(weights / weights.sum())


def batch(pictures: np.ndarray, weights: np.ndarray, count: int, size: int, random: np.random.Generator) -> Tensor:
    """Random pictures on random backgrounds (four in five a named one), cropped to ``size``."""
    chosen = pictures[random.choice(len(pictures), count, p=weights)]
    named = background_colours()[random.integers(len(background_colours()), size=count)]
    colours = np.where(random.random((count, 1)) < 0.8, named, random.integers(0, 256, (count, 3)))
    top, left = random.integers(0, SIZE - size + 1, 2)
    crop = chosen[:, top : top + size, left : left + size]
    return training.to_network(compose(crop, colours))


def autocast(enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 arithmetic on processors that have it; weights and losses stay float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if enabled else contextlib.nullcontext()


def reconstruct(network: Any, pictures: Tensor, noise: torch.Generator, bf16: bool) -> tuple[Tensor, Tensor]:
    """Drawn pictures and the latent's own loss: KL for each number of the latent, or the codebook loss."""
    with autocast(bf16):
        if hasattr(network, "quantize"):
            codewords, loss, _ = network.quantize(network.encode(pictures).float())
            return network.decode(codewords, force_not_quantize=True).float(), loss
        posterior = network.encode(pictures)
        drawn = network.decode(posterior.sample(noise)).float()
    divergence: Tensor = posterior.kl().float().mean() / posterior.mean[0].numel()
    return drawn, KL_WEIGHT * divergence


class AutoencoderTrainer:
    """One training step of the autoencoder and, late in the run, of its discriminator."""

    def __init__(self, network: Any, pace: training.Pace, *, peak: float, discriminator_from: float, bf16: bool):
        self.network = network
        self.discriminator = losses.PatchDiscriminator()
        self.peak, self.discriminator_from, self.bf16 = peak, discriminator_from, bf16
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
        judge = torch.optim.AdamW(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.9))
        self.session = training.Session(
            {"network": network, "discriminator": self.discriminator},
            {"network": optimiser, "discriminator": judge},
            {"network": training.MovingAverage(network, 0.99)},
            pace,
            np.random.default_rng(1),
            torch.Generator().manual_seed(1),
        )

    def step(self, pictures: Tensor) -> float:
        """Train on [batch, 3, height, width] in [-1, 1]; returns the reconstruction loss."""
        session = self.session
        optimiser = session.optimisers["network"]
        training.set_learning_rate(optimiser, session.pace.learning_rate(self.peak, warm_up=50))
        drawn, latent_loss = reconstruct(self.network, pictures, session.noise, self.bf16)
        reconstruction = losses.reconstruction_loss(drawn, pictures)
        loss = reconstruction + latent_loss
        adversarial = session.pace.progress >= self.discriminator_from
        if adversarial:
            loss = loss + self._adversarial(reconstruction, drawn)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        optimiser.step()
        if adversarial:
            self._train_discriminator(pictures, drawn.detach())
        session.averages["network"].update(self.network)
        session.record(reconstruction=float(reconstruction.detach()), latent=float(latent_loss.detach()))
        session.pace.advance()
        return float(reconstruction.detach())

    def _adversarial(self, reconstruction: Tensor, drawn: Tensor) -> Tensor:
        adversarial = -self.discriminator(drawn).mean()
        last = self.network.decoder.conv_out.weight
        weight = DISCRIMINATOR_WEIGHT * losses.adaptive_weight(reconstruction, adversarial, last)
        weighted: Tensor = weight * adversarial
        return weighted

    def _train_discriminator(self, pictures: Tensor, drawn: Tensor) -> None:
        loss = losses.discriminator_loss(self.discriminator(pictures), self.discriminator(drawn))
        judge = self.session.optimisers["discriminator"]
        judge.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        judge.step()
        self.session.record(discriminator=float(loss.detach()))


@torch.no_grad()
def judge(network: Any, pictures: np.ndarray, count: int) -> tuple[float, list[np.ndarray]]:
    """PSNR in dB over ``count`` pictures on named backgrounds (peak 255, mean squared error over all), and a grid."""
    random = np.random.default_rng(3)
    chosen = pictures[random.choice(len(pictures), count, replace=False)]
    true = compose(chosen, background_colours()[random.integers(len(background_colours()), size=len(chosen))])
    drawn = np.concatenate(
        [training.to_pictures(_round_trip(network, part)) for part in np.array_split(true, 1 + count // 16)]
    )
    error = np.square(true.astype(np.float64) - drawn).mean()
    return float(10.0 * np.log10(255.0**2 / error)), [true[:16], drawn[:16], true[16:32], drawn[16:32]]


def _round_trip(network: Any, pictures: np.ndarray) -> Tensor:
    x = training.to_network(pictures)
    drawn: Tensor = network(x)[0] if hasattr(network, "quantize") else network(x, sample_posterior=False)[0]
    return drawn


def stage(kind: str, codewords: int = 1024) -> dict[str, Any]:
    """The configuration's first stage, or the VQ counterpart of it."""
    kl: dict[str, Any] = training.read_config()["first_stage_config"]
    if kind == "kl":
        return kl
    parameters = dict(kl["params"], n_embed=codewords, ddconfig=dict(kl["params"]["ddconfig"], double_z=False))
    return {"target": "ldm.models.autoencoder.VQModelInterface", "params": parameters}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--minutes", default=20.0, help="Wall-clock time of the whole run.")
@click.option("--weights", type=click.Path(path_type=Path, exists=True), help="Start from these weights.")
@click.option("--decoder-only", is_flag=True, help="Leave the encoder, and so all latents, as the weights have it.")
@click.option("--kind", type=click.Choice(["kl", "vq"]), default="kl")
@click.option("--batch-size", default=16)
@click.option("--crops-until", default=0.8, help="Share of the run on 32x32 crops; whole pictures after that.")
@click.option("--discriminator-from", default=0.9, help="Share of the run after which the discriminator takes part.")
@click.option("--learning-rate", default=1e-3)
@click.option("--threads", default=2)
@click.option("--bf16/--fp32", default=True)
def main(
    folder: Path,
    minutes: float,
    weights: Path | None,
    decoder_only: bool,
    kind: str,
    batch_size: int,
    crops_until: float,
    discriminator_from: float,
    learning_rate: float,
    threads: int,
    bf16: bool,
) -> None:
    """Train the autoencoder on FOLDER/pictures.npz."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    pictures = Pictures.load(folder)
    likelihood, unseen = sampling_weights(pictures), pictures.pictures[held_out_pictures(pictures)]
    pace = training.Pace(minutes=minutes)
    network = build_first_stage(kind)
    if weights is not None:
        network.load_state_dict(torch.load(weights, weights_only=True))
    if decoder_only:
        network.encoder.requires_grad_(False)
        network.quant_conv.requires_grad_(False)
    trainer = AutoencoderTrainer(network, pace, peak=learning_rate, discriminator_from=discriminator_from, bf16=bf16)
    session, state = trainer.session, folder / "autoencoder.state.pt"
    session.resume(state)
    with Progress(
        *Progress.get_default_columns(), TextColumn("step {task.fields[step]} loss {task.fields[loss]:.4f}")
    ) as bar:
        task = bar.add_task("autoencoder", total=1.0, step=pace.step, loss=0.0)
        while pace.progress < 1.0:
            size = SIZE // 2 if pace.progress < crops_until else SIZE
            loss = trainer.step(batch(pictures.pictures, likelihood, batch_size, size, session.random))
            bar.update(task, completed=pace.progress, step=pace.step, loss=loss)
            if pace.step % 50 == 0:
                bar.console.log(
                    f"step {pace.step}, {pace.spent / 60:.1f} min, loss {session.recent('reconstruction'):.4f}"
                )
            if pace.step % 500 == 0:
                bar.console.log(report(trainer, unseen, folder, 64))
                session.save(state)
    session.save(state)
    click.echo(report(trainer, unseen, folder, len(unseen)))


def build_first_stage(kind: str) -> Any:
    """The first stage of ``kind`` "kl" or "vq", with initial weights."""
    network = training.build(stage(kind))
    training.start_with_references(network)
    return network


def report(trainer: AutoencoderTrainer, unseen: np.ndarray, folder: Path, count: int) -> str:
    """Judge the averaged weights on held-out pictures; writes weights, grid and curves."""
    session = trainer.session
    current = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.network.load_state_dict(session.averages["network"].weights)
    decibels, grid = judge(trainer.network, unseen, count)
    torch.save(trainer.network.state_dict(), folder / "autoencoder.pt")
    trainer.network.load_state_dict(current)
    training.save_grid(grid, folder / "autoencoder.png")
    training.save_curves(session.curves, folder / "autoencoder_curves.png")
    session.record(held_out_decibels=decibels)
    minutes = session.pace.spent / 60
    mean = session.recent("reconstruction")
    return f"step {session.pace.step}, {minutes:.1f} min: held-out PSNR {decibels:.2f} dB, training loss {mean:.4f}"


if __name__ == "__main__":
    main()
