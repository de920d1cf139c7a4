"""Networks in the form that is exported: encoder and decoder of a first stage, and a U-Net that takes classes."""

from __future__ import annotations

from torch import Tensor, nn

from latentedge.export.models.autoencoder import AutoencoderKL, VQModel
from latentedge.export.models.unet import UNetModel


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
    """Unscaled latent to picture; with a codebook, through the nearest codewords unless told not to."""

    def __init__(self, first_stage: AutoencoderKL | VQModel, quantised: bool = True) -> None:
        super().__init__()
        self.quantize = first_stage.quantize if isinstance(first_stage, VQModel) and quantised else None
        self.post_quant_conv = first_stage.post_quant_conv
        self.decoder = first_stage.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, 3, f * height, f * width], about [-1, 1] and not clamped."""
        if self.quantize is not None:
            latent_sample = self.quantize.nearest(latent_sample)[0]
        result: Tensor = self.decoder(self.post_quant_conv(latent_sample))
        return result


class ClassUNet(nn.Module):
    """A U-Net whose class is added to its time embedding (``conditioning_key: adm``)."""

    def __init__(self, unet: UNetModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """As ``UNetModel``; ``class_labels`` int64 [batch]."""
        result: Tensor = self.unet(sample, timestep, None, class_labels)
        return result
