"""First stages: convolutional encoder and decoder, with a diagonal Gaussian (KL) or a codebook (VQ) between them.

Module names are those of the CompVis checkpoints (``ldm/modules/diffusionmodules/model.py``,
``ldm/models/autoencoder.py`` of CompVis/latent-diffusion), so that loading needs no key mapping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentedge.export.models.attention import attend
from latentedge.export.models.parameters import refuse_unknown, require_value
from latentedge.export.models.quantise import VectorQuantiser


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two norm-SiLU-convolution layers with a residual."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, height, width] to [batch, out_channels, height, width]."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(functional.silu(self.norm2(hidden))))
        result: Tensor = self.nin_shortcut(x) + hidden
        return result


class AttnBlock(nn.Module):
    """Single-head self-attention over pixels, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to the same shape."""
        hidden = self.norm(x)
        query, key, value = (
            projected.flatten(2).transpose(1, 2)[:, None]
            for projected in (self.q(hidden), self.k(hidden), self.v(hidden))
        )
        attended = attend(query, key, value)[:, 0].transpose(1, 2).reshape(x.shape)
        result: Tensor = x + self.proj_out(attended)
        return result


class Downsample(nn.Module):
    """Half the size: a stride-2 convolution padded at the right and bottom only, or a mean of 2x2."""

    def __init__(self, channels: int, with_convolution: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_convolution else None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, channels, height // 2, width // 2]."""
        if self.conv is None:
            return functional.avg_pool2d(x, 2)
        result: Tensor = self.conv(functional.pad(x, (0, 1, 0, 1)))
        return result


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, with_convolution: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_convolution else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, channels, 2 * height, 2 * width]."""
        result: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return result


class _Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where the configuration asks for it."""

    def __init__(self, in_channels: int, channels: int, blocks: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if index == 0 else channels, channels, dropout) for index in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(channels) for _ in range(blocks if attention else 0))

    def run_blocks(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[index](x)
        return x


class _DownLevel(_Level):
    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        dropout: float,
        attention: bool,
        *,
        downsample: bool,
        with_convolution: bool,
    ) -> None:
        super().__init__(in_channels, channels, blocks, dropout, attention)
        self.downsample = Downsample(channels, with_convolution) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.downsample(self.run_blocks(x))
        return result


class _UpLevel(_Level):
    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        dropout: float,
        attention: bool,
        *,
        upsample: bool,
        with_convolution: bool,
    ) -> None:
        super().__init__(in_channels, channels, blocks, dropout, attention)
        self.upsample = Upsample(channels, with_convolution) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.upsample(self.run_blocks(x))
        return result


class _Middle(nn.Module):
    def __init__(self, channels: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return result


class Encoder(nn.Module):
    """Picture to features of the latent's size. Places of attention follow the nominal ``resolution``."""

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        in_channels: int,
        resolution: int,
        z_channels: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        tanh_out: bool = False,
        give_pre_end: bool = False,
    ) -> None:
        super().__init__()
        _check_ddconfig(attn_type, use_linear_attn, give_pre_end)
        attention = attn_type != "none"
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for level, multiple in enumerate(ch_mult):
            here = attention and resolution // 2**level in attn_resolutions
            last = level == len(ch_mult) - 1
            arguments = (width, ch * multiple, num_res_blocks, dropout, here)
            self.down.append(_DownLevel(*arguments, downsample=not last, with_convolution=resamp_with_conv))
            width = ch * multiple
        self.mid = _Middle(width, dropout, attention)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, height, width] to [batch, (2 *) z_channels, height / f, width / f]."""
        hidden = self.conv_in(x)
        for level in self.down:
            hidden = level(hidden)
        hidden = functional.silu(self.norm_out(self.mid(hidden)))
        result: Tensor = self.conv_out(hidden)
        return result


class Decoder(nn.Module):
    """Latent to picture; ``up.0`` is the level of full resolution, which runs last."""

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        in_channels: int,
        resolution: int,
        z_channels: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        tanh_out: bool = False,
        give_pre_end: bool = False,
    ) -> None:
        super().__init__()
        _check_ddconfig(attn_type, use_linear_attn, give_pre_end)
        attention = attn_type != "none"
        self.tanh_out = tanh_out
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _Middle(width, dropout, attention)
        levels: list[nn.Module] = []
        for level in reversed(range(len(ch_mult))):
            here = attention and resolution // 2**level in attn_resolutions
            arguments = (width, ch * ch_mult[level], num_res_blocks + 1, dropout, here)
            levels.insert(0, _UpLevel(*arguments, upsample=level > 0, with_convolution=resamp_with_conv))
            width = ch * ch_mult[level]
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[batch, z_channels, height, width] to [batch, out_ch, f * height, f * width]."""
        hidden = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            hidden = level(hidden)
        result: Tensor = self.conv_out(functional.silu(self.norm_out(hidden)))
        return torch.tanh(result) if self.tanh_out else result


def _check_ddconfig(attn_type: str, use_linear_attn: bool, give_pre_end: bool) -> None:
    require_value("a first stage's ddconfig", "attn_type", attn_type, "vanilla", "none")
    require_value("a first stage's ddconfig", "use_linear_attn", use_linear_attn, False)
    require_value("a first stage's ddconfig", "give_pre_end", give_pre_end, False)


class DiagonalGaussian:
    """The KL encoder's posterior; ``moments`` [batch, 2 * channels, height, width], mean first, then log variance."""

    def __init__(self, moments: Tensor) -> None:
        self.moments = moments
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviation, shaped as the mean."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw: mean + std * N(0, 1)."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Divergence from N(0, 1), summed over each sample: [batch]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """Autoencoder with a diagonal Gaussian latent (arXiv:2112.10752, section 3.1)."""

    def __init__(self, *, ddconfig: Mapping[str, Any], embed_dim: int, **training_only: object) -> None:
        super().__init__()
        refuse_unknown("AutoencoderKL", training_only)
        require_value("AutoencoderKL's ddconfig", "double_z", ddconfig.get("double_z", True), True)
        z_channels = ddconfig["z_channels"]
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.embed_dim = embed_dim

    def moments(self, x: Tensor) -> Tensor:
        """Picture in [-1, 1] to mean and log variance, [batch, 2 * embed_dim, height / f, width / f]."""
        result: Tensor = self.quant_conv(self.encoder(x))
        return result

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Picture [batch, channels, height, width] in [-1, 1] to the posterior over latents."""
        return DiagonalGaussian(self.moments(x))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latent [batch, embed_dim, height, width] to a picture, about [-1, 1] and not clamped."""
        result: Tensor = self.decoder(self.post_quant_conv(z))
        return result

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction and posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior


class VQModel(nn.Module):
    """Autoencoder with a codebook (arXiv:2012.09841); ``encode`` quantises and ``decode`` does not."""

    def __init__(
        self,
        *,
        ddconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        remap: str | None = None,
        sane_index_shape: bool = False,
        **training_only: object,
    ) -> None:
        super().__init__()
        refuse_unknown(type(self).__name__, training_only)
        require_value(type(self).__name__, "remap", remap, None)
        z_channels = ddconfig["z_channels"]
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quantize = VectorQuantiser(n_embed, embed_dim)
        encoder_channels = 2 * z_channels if ddconfig.get("double_z", True) else z_channels
        self.quant_conv = nn.Conv2d(encoder_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.embed_dim = embed_dim

    def prequantised(self, x: Tensor) -> Tensor:
        """Picture in [-1, 1] to the latent before the codebook, [batch, embed_dim, height / f, width / f]."""
        result: Tensor = self.quant_conv(self.encoder(x))
        return result

    def reconstruct(self, quantised: Tensor) -> Tensor:
        """Codewords [batch, embed_dim, height, width] to a picture, about [-1, 1] and not clamped."""
        result: Tensor = self.decoder(self.post_quant_conv(quantised))
        return result

    def encode(self, x: Tensor) -> Any:
        """Picture to (codewords, codebook loss, indices)."""
        return self.quantize(self.prequantised(x))

    def decode(self, z: Tensor) -> Tensor:
        """Codewords to a picture."""
        return self.reconstruct(z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and codebook loss."""
        quantised, loss, _ = self.quantize(self.prequantised(x))
        return self.reconstruct(quantised), loss


class VQModelInterface(VQModel):
    """The VQ first stage inside a latent diffusion model: diffusion runs before the codebook, decoding quantises."""

    def encode(self, x: Tensor) -> Tensor:
        """Picture to the latent before the codebook."""
        return self.prequantised(x)

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Unscaled latent to a picture, through the nearest codewords unless told not to."""
        return self.reconstruct(z if force_not_quantize else self.quantize.nearest(z)[0])
