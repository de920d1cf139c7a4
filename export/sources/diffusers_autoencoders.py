"""diffusers' first stages, encoder and decoder apart: AutoencoderKL, VQModel, AutoencoderTiny."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentedge.export.sources.diffusers_modules import made_exportable


class MomentsEncoder(nn.Module):
    """``AutoencoderKL``: picture [batch, 3, height, width] in -1..1 to moments [batch, 2 * channels, h, w], mean first.

    Where the model states its latents' mean and standard deviation by channel, the moments are of the latent that has
    been brought to mean 0 and deviation 1.
    """

    def __init__(self, model: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__()
        self.encoder = made_exportable(model.encoder)
        self.quant_conv = model.quant_conv
        self.mean, self.std = _by_channel(mean), _by_channel(std)

    def forward(self, sample: Tensor) -> Tensor:
        """Mean and log variance of the latent, joined along the channels."""
        moments: Tensor = self.encoder(sample)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        if self.mean is None or self.std is None:
            return moments
        mean, log_variance = moments.chunk(2, dim=1)
        return torch.cat([(mean - self.mean) / self.std, log_variance - 2.0 * self.std.log()], dim=1)


class LatentDecoder(nn.Module):
    """``AutoencoderKL``: latent [batch, channels, h, w] to picture [batch, 3, height, width] in -1..1."""

    def __init__(self, model: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__()
        self.decoder = made_exportable(model.decoder)
        self.post_quant_conv = model.post_quant_conv
        self.mean, self.std = _by_channel(mean), _by_channel(std)

    def forward(self, latent_sample: Tensor) -> Tensor:
        """The picture; values may leave -1..1."""
        if self.mean is not None and self.std is not None:
            latent_sample = latent_sample * self.std + self.mean
        if self.post_quant_conv is not None:
            latent_sample = self.post_quant_conv(latent_sample)
        result: Tensor = self.decoder(latent_sample)
        return result


class CodebookEncoder(nn.Module):
    """``VQModel``: picture in -1..1 to the latent before the codebook."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = made_exportable(model.encoder)
        self.quant_conv = model.quant_conv

    def forward(self, sample: Tensor) -> Tensor:
        """[batch, 3, height, width] to [batch, channels, h, w]."""
        result: Tensor = self.quant_conv(self.encoder(sample))
        return result


class CodebookDecoder(nn.Module):
    """``VQModel``: the latent is replaced by the nearest codewords, then decoded."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = made_exportable(model.decoder)
        self.post_quant_conv = model.post_quant_conv
        self.embedding = model.quantize.embedding
        self.spatial = model.config.norm_type == "spatial"

    def forward(self, latent_sample: Tensor) -> Tensor:
        """[batch, channels, h, w] to [batch, 3, height, width].

        The squared distance is |z|^2 + |e|^2 - 2 z.e; |z|^2 is the same for every codeword and left out.
        """
        codebook = self.embedding.weight
        distances = codebook.square().sum(dim=1) - 2.0 * (latent_sample.permute(0, 2, 3, 1) @ codebook.t())
        quantised = self.embedding(torch.argmin(distances, dim=-1)).permute(0, 3, 1, 2)
        result: Tensor = self.decoder(self.post_quant_conv(quantised), quantised if self.spatial else None)
        return result


class PlainCoder(nn.Module):
    """``AutoencoderTiny``'s encoder or decoder. diffusers' own map their pictures from and to -1..1."""

    def __init__(self, coder: nn.Module) -> None:
        super().__init__()
        self.coder = made_exportable(coder)

    def forward(self, sample: Tensor) -> Tensor:
        """Picture to latent, or latent to picture."""
        result: Tensor = self.coder(sample)
        return result


def _by_channel(values: Sequence[float] | None) -> nn.Buffer | None:
    return None if values is None else nn.Buffer(torch.tensor(values).view(1, -1, 1, 1))
