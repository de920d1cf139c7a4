"""Encoder and decoder of a first stage as networks of their own."""

from __future__ import annotations

from torch import Tensor, nn

from latentedge.export.models.autoencoder import AutoencoderKL, VQModel


class FirstStageEncoder(nn.Module):
    """Picture to what the encoder gives before anything is drawn or quantised."""

    def __init__(self, first_stage: AutoencoderKL | VQModel) -> None:
        super().__init__()
        self.encoder = first_stage.encoder
        self.quant_conv = first_stage.quant_conv

    def forward(self, sample: Tensor) -> Tensor:
        """[batch, 3, height, width] in [-1, 1] to KL moments (mean first) or the VQ latent before the codebook."""
        result: Tensor = self.quant_conv(self.encoder(sample))
        return result


class FirstStageDecoder(nn.Module):
    """Unscaled latent to picture; with a codebook, through the nearest codewords."""

    def __init__(self, first_stage: AutoencoderKL | VQModel) -> None:
        super().__init__()
        self.quantize = first_stage.quantize if isinstance(first_stage, VQModel) else None
        self.post_quant_conv = first_stage.post_quant_conv
        self.decoder = first_stage.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, 3, f * height, f * width], about [-1, 1] and not clamped."""
        if self.quantize is not None:
            latent_sample = self.quantize.nearest(latent_sample)[0]
        result: Tensor = self.decoder(self.post_quant_conv(latent_sample))
        return result
