"""Both training stages of the embedded default model, on synthetic pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from examples.emoji import diffusion, losses, pack, training  # noqa: E402
from examples.emoji.captions import Concept, build_tokenizer  # noqa: E402
from examples.emoji.corpus import Corpus  # noqa: E402
from examples.emoji.drawing import Denoiser  # noqa: E402
from examples.emoji.train_autoencoder import AutoencoderTrainer, batch, build_first_stage  # noqa: E402
from examples.emoji.train_denoiser import DenoiserTrainer  # noqa: E402
from examples.emoji.train_text_encoder import TextEncoderTrainer, TextEncoderWithHead, patches_of  # noqa: E402

CONCEPTS = [Concept("cat", ("cat", "kitty")), Concept("dog", ("dog",))]
DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 64,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "attn_type": "none",
}
FIRST_STAGES = {
    "kl": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": DDCONFIG}},
    "vq": {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {"embed_dim": 4, "n_embed": 64, "ddconfig": {**DDCONFIG, "double_z": False}},
    },
}
PARAMETERS = {
    **training.read_config(),
    "channels": 4,
    "unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 64,
            "num_res_blocks": 1,
            "attention_resolutions": [2],
            "channel_mult": [1, 1],
            "num_head_channels": 32,
            "use_spatial_transformer": True,
            "context_dim": 32,
        },
    },
    "cond_stage_config": {
        "target": "ldm.modules.encoders.modules.BERTEmbedder",
        "params": {"n_embed": 32, "n_layer": 1, "vocab_size": 512, "max_seq_len": 16},
    },
}


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def _discs(count: int = 6) -> np.ndarray:
    """Discs of random colours on nothing, uint8 [count, 64, 64, 4]."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64]
    inside = (rows - 32) ** 2 + (columns - 32) ** 2 < 24**2
    pictures = np.zeros((count, 64, 64, 4), np.uint8)
    for picture in pictures:
        picture[inside] = (*random.integers(0, 256, 3), 255)
    return pictures


def _autoencoder(kind: str, steps: int, discriminator_from: float = 2.0) -> AutoencoderTrainer:
    torch.manual_seed(0)
    return AutoencoderTrainer(
        training.build(FIRST_STAGES[kind]),
        training.Pace(steps=steps),
        peak=1e-3,
        discriminator_from=discriminator_from,
        bf16=False,
    )


def _train_autoencoder(trainer: AutoencoderTrainer, steps: int) -> list[float]:
    discs = _discs()
    weights = np.full(len(discs), 1 / len(discs))
    return [trainer.step(batch(discs, weights, 2, 16, trainer.session.random)) for _ in range(steps)]


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_autoencoder_learns(kind: str) -> None:
    values = _train_autoencoder(_autoencoder(kind, 40), 40)
    assert np.mean(values[-4:]) < 0.85 * np.mean(values[:4])


def test_discriminator_takes_part_from_its_share_on() -> None:
    trainer = _autoencoder("kl", 4, discriminator_from=0.5)
    before = [value.clone() for value in trainer.discriminator.parameters()]
    _train_autoencoder(trainer, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.discriminator.parameters(), strict=True))
    _train_autoencoder(trainer, 2)
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.discriminator.parameters(), strict=True))
    assert len(trainer.session.curves["discriminator"]) == 2


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = losses.adaptive_weight((3.0 * layer).sum(), (0.5 * layer).sum(), layer)
    assert float(weight) == pytest.approx(6.0, rel=1e-3)


def _corpus() -> Corpus:
    levels = torch.randn(len(CONCEPTS), 3, 10, 4, 1, 1, generator=torch.Generator().manual_seed(5))
    latents = levels.expand(-1, -1, -1, -1, 16, 16).contiguous()
    unseen = np.zeros((len(CONCEPTS), 3, 10), bool)
    unseen[0, 1] = True
    return Corpus(latents, CONCEPTS, unseen, build_tokenizer(CONCEPTS))


def _denoiser(steps: int) -> DenoiserTrainer:
    torch.manual_seed(0)
    denoiser = Denoiser(PARAMETERS)
    return DenoiserTrainer(
        denoiser,
        TextEncoderWithHead(denoiser.text_encoder, 32, 4),
        diffusion.alphas_cumprod(PARAMETERS),
        training.Pace(steps=steps),
        peak=4e-3,
        decay=0.9,
        bf16=False,
    )


def test_denoiser_learns() -> None:
    trainer, corpus = _denoiser(25), _corpus()
    fixed = corpus.batch(8, trainer.session.random)
    values = [trainer.step(*fixed) for _ in range(25)]
    assert np.mean(values[-5:]) < 0.85 * np.mean(values[:5])


def test_text_encoder_learns_what_captions_look_like() -> None:
    module = TextEncoderWithHead(training.build(PARAMETERS["cond_stage_config"]), 32, 4)
    trainer = TextEncoderTrainer(module, training.Pace(steps=60), peak=1e-2, bf16=False)
    corpus = _corpus()
    fixed = corpus.batch(8, trainer.session.random, dropped=0.0)
    values = [trainer.step(*fixed) for _ in range(60)]
    assert values[-1] < 0.5 * values[0]


def test_patches_keep_their_place() -> None:
    latents = torch.arange(2 * 4 * 16 * 16, dtype=torch.float32).reshape(2, 4, 16, 16)
    patches = patches_of(latents)
    assert patches.shape == (2, 16, 64)
    assert torch.equal(patches[1, 6].reshape(4, 4, 4), latents[1, :, 4:8, 8:12])


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    corpus, state = _corpus(), tmp_path / "state.pt"
    whole, first, second = _denoiser(4), _denoiser(4), _denoiser(4)
    expected = [whole.step(*corpus.batch(4, whole.session.random)) for _ in range(4)]
    found = [first.step(*corpus.batch(4, first.session.random)) for _ in range(2)]
    first.session.save(state)
    assert second.session.resume(state)
    found += [second.step(*corpus.batch(4, second.session.random)) for _ in range(2)]
    assert found == expected
    for name, value in whole.session.averages["denoiser"].weights.items():
        assert torch.equal(value, second.session.averages["denoiser"].weights[name]), name


def test_held_out_combinations_are_never_trained_on() -> None:
    corpus, random = _corpus(), np.random.default_rng(0)
    forbidden = corpus.latents[0, 1].flatten(1)
    for _ in range(20):
        latents, _ = corpus.batch(16, random)
        assert not (latents.flatten(1)[:, None] == forbidden[None]).all(dim=-1).any()


def test_noise_and_v_are_a_rotation() -> None:
    latents, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    alpha = torch.tensor([0.9, 0.5, 0.01])
    noisy, v = diffusion.noised(latents, noise, alpha)
    signal, deviation = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
    torch.testing.assert_close(signal * noisy - deviation * v, latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation * noisy + signal * v, noise, atol=1e-5, rtol=0)


def test_noisy_timesteps_count_fully_and_clean_ones_less() -> None:
    output, target = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    losses_by_alpha = [float(diffusion.v_loss(output, target, torch.tensor([alpha]))) for alpha in (0.01, 0.5, 0.99)]
    assert losses_by_alpha == pytest.approx([1.0, 1.0, 0.05], rel=1e-4)


def test_every_second_channel_starts_with_a_reference() -> None:
    torch.manual_seed(0)
    plain, referenced = (training.build(FIRST_STAGES["kl"]) for _ in range(2))
    referenced.load_state_dict(plain.state_dict())
    training.start_with_references(referenced)
    bias = referenced.encoder.conv_in.bias - plain.encoder.conv_in.bias
    assert bias.tolist() == pytest.approx([0.0, 1.0] * 32)


def test_timesteps_are_spread_over_the_schedule() -> None:
    drawn = diffusion.stratified_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert (drawn // 100).tolist() == list(range(10))


def test_pace_warms_up_and_decays() -> None:
    pace = training.Pace(steps=1000)
    rates = []
    for _ in range(1000):
        rates.append(pace.learning_rate(1.0, warm_up=100))
        pace.advance()
    assert rates[0] == pytest.approx(0.01, rel=1e-3)
    assert np.argmax(rates) == 99
    assert rates[-1] < 0.011
    assert pace.progress == 1.0


def test_packed_checkpoint_loads_into_the_same_networks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    first_stage, denoiser = build_first_stage("kl"), Denoiser(training.read_config())
    joined = pack.join(first_stage.state_dict(), denoiser.state_dict())
    assert all(value.dtype == torch.float16 for value in joined.values())
    assert "model.diffusion_model.input_blocks.0.0.weight" in joined
    assert "first_stage_model.quant_conv.weight" in joined
    assert "cond_stage_model.transformer.token_emb.weight" in joined
    save_file(joined, tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_text(training.CONFIG.read_text(encoding="utf-8"), encoding="utf-8")
    pack.write_scale_factor(tmp_path / "config.yaml", 0.321)
    loaded_stage, loaded, parameters = pack.load(tmp_path)
    assert parameters["scale_factor"] == pytest.approx(0.321)
    for name, value in denoiser.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    assert set(loaded_stage.state_dict()) == set(first_stage.state_dict())
