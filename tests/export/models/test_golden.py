"""The networks reproduce arrays that the original code recorded (FP32, a few units in the sixth decimal)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
yaml = pytest.importorskip("yaml")

from latentedge.export.models.autoencoder import DiagonalGaussian  # noqa: E402
from latentedge.export.models.registry import build_network  # noqa: E402

GOLDEN = Path(__file__).parents[2] / "golden" / "compvis"
UNET_TOLERANCE = 1e-5
ENCODER_TOLERANCE = 5e-5


class Recorded:
    """One recorded family: its networks with their weights, and its arrays as tensors."""

    def __init__(self, family: str) -> None:
        folder = GOLDEN / family
        model = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"]
        self.target, self.params = model["target"], model["params"]
        self.state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
        with np.load(folder / "golden.npz") as arrays:
            self.arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def __getitem__(self, name: str) -> Any:
        return self.arrays[name]

    def network(self, part: str, prefix: str) -> Any:
        network = build_network(self.params[part]["target"], self.params[part].get("params", {}))
        network.load_state_dict({k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)})
        return network.eval()

    def unet(self, averaged: bool = False) -> Any:
        network = self.network("unet_config", "model.diffusion_model.")
        if averaged:
            names = {name: f"model_ema.diffusion_model{name.replace('.', '')}" for name in network.state_dict()}
            network.load_state_dict({name: self.state[key] for name, key in names.items()})
        return network

    def first_stage(self) -> Any:
        return self.network("first_stage_config", "first_stage_model.")


def distance(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.fixture(scope="module")
def text_to_image() -> Recorded:
    return Recorded("txt2img_kl_bert")


@pytest.fixture(scope="module")
def unconditional() -> Recorded:
    return Recorded("uncond_vq")


@pytest.fixture(scope="module")
def kl_first_stage() -> Recorded:
    return Recorded("ae_kl")


@torch.no_grad()
def test_text_to_image_unet(text_to_image: Recorded) -> None:
    unet = text_to_image.unet()
    for index, timestep in enumerate(text_to_image["unet_t"]):
        out = unet(text_to_image["unet_x"], timestep.float().expand(2), text_to_image["cond"])
        assert distance(out, text_to_image["unet_out"][index]) < UNET_TOLERANCE
    mixed = unet(text_to_image["unet_x"], text_to_image["unet_tmix"].float(), text_to_image["cond"])
    assert distance(mixed, text_to_image["unet_out_tmix"]) < UNET_TOLERANCE
    oblong = unet(text_to_image["rect_unet_x"], torch.tensor([501.0, 501.0]), text_to_image["cond"])
    assert distance(oblong, text_to_image["rect_unet_out"]) < UNET_TOLERANCE


@torch.no_grad()
def test_text_encoder(text_to_image: Recorded) -> None:
    encoder = text_to_image.network("cond_stage_config", "cond_stage_model.")
    assert distance(encoder(text_to_image["token_ids"]), text_to_image["cond"]) < UNET_TOLERANCE
    assert distance(encoder(text_to_image["uncond_token_ids"]), text_to_image["uncond"]) < UNET_TOLERANCE


@torch.no_grad()
def test_kl_first_stage_of_a_diffusion_model(text_to_image: Recorded) -> None:
    first_stage = text_to_image.first_stage()
    posterior = first_stage.encode(text_to_image["enc_image"])
    assert distance(posterior.moments, text_to_image["enc_moments"]) < ENCODER_TOLERANCE
    latent = posterior.mean + posterior.std * text_to_image["enc_sample_noise"]
    assert distance(text_to_image["scale_factor"] * latent, text_to_image["enc_z"]) < ENCODER_TOLERANCE
    decoded = first_stage.decode(text_to_image["dec_latent"] / text_to_image["scale_factor"])
    assert distance(decoded, text_to_image["dec_image"]) < ENCODER_TOLERANCE
    oblong = first_stage.encoded(text_to_image["rect_enc_image"])
    assert distance(oblong, text_to_image["rect_enc_moments"]) < ENCODER_TOLERANCE


@torch.no_grad()
def test_unconditional_unet_with_averaged_weights(unconditional: Recorded) -> None:
    unet = unconditional.unet(averaged=True)
    raw = unconditional.unet(averaged=False)
    for index, timestep in enumerate(unconditional["unet_t"]):
        inputs = (unconditional["unet_x"], timestep.float().expand(2))
        assert distance(unet(*inputs), unconditional["unet_out"][index]) < UNET_TOLERANCE
        assert distance(raw(*inputs), unconditional["unet_out_noema"][index]) < UNET_TOLERANCE


@torch.no_grad()
def test_vq_first_stage_of_a_diffusion_model(unconditional: Recorded) -> None:
    first_stage = unconditional.first_stage()
    assert distance(first_stage.encode(unconditional["enc_image"]), unconditional["enc_prequant"]) < ENCODER_TOLERANCE
    codewords, indices = first_stage.quantize.nearest(unconditional["enc_prequant"])
    assert torch.equal(indices, unconditional["enc_indices"])
    # The recorded codewords went through z + (codeword - z).
    assert distance(codewords, unconditional["enc_quant"]) < 1e-6
    assert torch.equal(first_stage.quantize.nearest(unconditional["dec_latent"])[1], unconditional["dec_indices"])
    decoded = first_stage.decode(unconditional["dec_latent"])
    assert distance(decoded, unconditional["dec_image"]) < ENCODER_TOLERANCE
    unquantised = first_stage.decode(unconditional["dec_latent"], force_not_quantize=True)
    assert distance(unquantised, unconditional["dec_image_noquant"]) < ENCODER_TOLERANCE


@torch.no_grad()
def test_first_stage_alone(kl_first_stage: Recorded) -> None:
    network = build_network(kl_first_stage.target, kl_first_stage.params).eval()
    network.load_state_dict({k: v for k, v in kl_first_stage.state.items() if not k.startswith("loss.")})
    assert distance(network.encoded(kl_first_stage["enc_image"]), kl_first_stage["enc_moments"]) < ENCODER_TOLERANCE
    assert distance(network.decode(kl_first_stage["dec_latent"]), kl_first_stage["dec_image"]) < ENCODER_TOLERANCE
    posterior = DiagonalGaussian(kl_first_stage["enc_moments"])
    assert distance(posterior.std, kl_first_stage["enc_std"]) < ENCODER_TOLERANCE
    # Encoder and decoder in a row: the original itself moves by 2.8e-4 between two ways to compute convolutions.
    oblong = network(kl_first_stage["rect_enc_image"], sample_posterior=False)[0]
    assert distance(oblong, kl_first_stage["rect_rec_mode"]) < 5e-4


def test_gradients_reach_every_trained_parameter(text_to_image: Recorded) -> None:
    unet = text_to_image.unet().train()
    encoder = text_to_image.network("cond_stage_config", "cond_stage_model.").train()
    with torch.autocast("cpu", torch.bfloat16):
        context = encoder(text_to_image["token_ids"])
        out = unet(text_to_image["unet_x"], torch.tensor([10.0, 900.0]), context)
    out.float().square().mean().backward()
    named = [*unet.named_parameters(), *encoder.named_parameters()]
    idle = [name for name, parameter in named if parameter.grad is None or not parameter.grad.any()]
    assert idle == ["transformer.to_logits.weight", "transformer.to_logits.bias"]


def test_codebook_trains_encoder_and_codewords(unconditional: Recorded) -> None:
    first_stage = unconditional.first_stage().train()
    latent = first_stage.encode(unconditional["enc_image"])
    latent.retain_grad()
    codewords, loss, _ = first_stage.quantize(latent)
    (codewords.sum() + loss).backward()
    assert first_stage.quantize.embedding.weight.grad.any()
    # Straight through: the sum alone gives every latent value a gradient of one.
    assert float((latent.grad - 1.0).abs().max()) < 0.1
