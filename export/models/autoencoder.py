"""First stages: convolutional encoder and decoder, with a diagonal Gaussian (KL) or a codebook (VQ) between them.

Module names are those of the CompVis checkpoints (``ldm/modules/diffusionmodules/model.py``,
``ldm/models/autoencoder.py`` of CompVis/latent-diffusion), so that loading needs no key mapping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentedge.export.models.attention import attend
from latentedge.export.models.parameters import refuse_unknown, require_value
from latentedge.export.models.quantise import VectorQuantiser
from latentedge.export.models.unet import Upsample


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


class LinearAttnBlock(nn.Module):
    """Single-head attention whose keys are normalised over the pixels first (arXiv:1812.01243); no norm, no residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to the same shape."""
        query, key, value = self.to_qkv(x).flatten(2).chunk(3, dim=1)
        context = torch.softmax(key, dim=-1) @ value.transpose(1, 2)
        result: Tensor = self.to_out((context.transpose(1, 2) @ query).reshape(x.shape))
        return result


#: What stands where a configuration asks for attention, by its ``attn_type``.
ATTENTION: dict[str, type[nn.Module] | None] = {"vanilla": AttnBlock, "linear": LinearAttnBlock, "none": None}


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


class _Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where asked for, then the change of size."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        dropout: float,
        attention: type[nn.Module] | None,
        **resample: nn.Module | None,
    ) -> None:
        """``resample``: "downsample" or "upsample" by name, ``None`` at the level without one."""
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if index == 0 else channels, channels, dropout) for index in range(blocks)
        )
        self.attn = nn.ModuleList(attention(channels) for _ in range(blocks) if attention is not None)
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if (resample := getattr(self, name, None)) is not None:
                x = resample(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, dropout: float, attention: type[nn.Module] | None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = nn.Identity() if attention is None else attention(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return result


@dataclass(frozen=True)
class StageConfig:
    """The ``ddconfig`` that encoder and decoder share. Places of attention follow the nominal ``resolution``."""

    ch: int
    out_ch: int
    in_channels: int
    resolution: int
    z_channels: int
    num_res_blocks: int
    attn_resolutions: Sequence[int]
    ch_mult: Sequence[int] = (1, 2, 4, 8)
    dropout: float = 0.0
    resamp_with_conv: bool = True
    double_z: bool = True
    use_linear_attn: bool = False
    attn_type: str = "vanilla"
    tanh_out: bool = False
    give_pre_end: bool = False

    @classmethod
    def of(cls, ddconfig: Mapping[str, Any]) -> StageConfig:
        """From a YAML's mapping; ``KeyError`` for a field that has no default, ``UsageError`` for an unknown one."""
        known = {entry.name: entry for entry in fields(cls)}
        refuse_unknown("a first stage's ddconfig", {name: None for name in ddconfig if name not in known})
        needed = [name for name, entry in known.items() if entry.default is MISSING or name in ddconfig]
        return cls(**{name: ddconfig[name] for name in needed})

    def __post_init__(self) -> None:
        require_value("a first stage's ddconfig", "attn_type", self.attn_type, *ATTENTION)
        require_value("a first stage's ddconfig", "give_pre_end", self.give_pre_end, False)

    @property
    def encoded_channels(self) -> int:
        """Channels that the encoder gives."""
        return 2 * self.z_channels if self.double_z else self.z_channels

    @property
    def attention(self) -> type[nn.Module] | None:
        """What attends; ``None`` without attention."""
        return ATTENTION["linear" if self.use_linear_attn else self.attn_type]

    def attention_at(self, side: int) -> type[nn.Module] | None:
        """What attends at a nominal ``side``."""
        return self.attention if side in self.attn_resolutions else None


class Encoder(nn.Module):
    """Picture to features of the latent's size."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.ch
        for level, multiple in enumerate(config.ch_mult):
            channels, last = config.ch * multiple, level == len(config.ch_mult) - 1
            resample = None if last else Downsample(channels, config.resamp_with_conv)
            attention = config.attention_at(config.resolution // 2**level)
            arguments = (width, channels, config.num_res_blocks, config.dropout, attention)
            self.down.append(_Level(*arguments, downsample=resample))
            width = channels
        self.mid = _Middle(width, config.dropout, config.attention)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, config.encoded_channels, 3, padding=1)

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

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.tanh_out = config.tanh_out
        width = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = _Middle(width, config.dropout, config.attention)
        # A resolution that halving rounds is doubled back from the lowest one, as in the original.
        lowest = config.resolution // 2 ** (len(config.ch_mult) - 1)
        levels: list[nn.Module] = []
        for level in reversed(range(len(config.ch_mult))):
            channels = config.ch * config.ch_mult[level]
            resample = Upsample(channels, config.resamp_with_conv) if level > 0 else None
            attention = config.attention_at(lowest * 2 ** (len(config.ch_mult) - 1 - level))
            arguments = (width, channels, config.num_res_blocks + 1, config.dropout, attention)
            levels.insert(0, _Level(*arguments, upsample=resample))
            width = channels
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[batch, z_channels, height, width] to [batch, out_ch, f * height, f * width]."""
        hidden = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            hidden = level(hidden)
        result: Tensor = self.conv_out(functional.silu(self.norm_out(hidden)))
        return torch.tanh(result) if self.tanh_out else result


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


class FirstStage(nn.Module):
    """Encoder and decoder, with the 1x1 convolutions between them and the latent."""

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int, encoded_width: int) -> None:
        super().__init__()
        config = StageConfig.of(ddconfig)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(config.encoded_channels, encoded_width, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, config.z_channels, 1)
        self.embed_dim = embed_dim

    def encoded(self, x: Tensor) -> Tensor:
        """Picture in [-1, 1] to what the encoder gives, [batch, encoded_width, height / f, width / f].

        With KL mean and log variance, with a codebook the latent before it.
        """
        result: Tensor = self.quant_conv(self.encoder(x))
        return result

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latent [batch, embed_dim, height, width] to a picture, about [-1, 1] and not clamped."""
        result: Tensor = self.decoder(self.post_quant_conv(z))
        return result


class AutoencoderKL(FirstStage):
    """Autoencoder with a diagonal Gaussian latent (arXiv:2112.10752, section 3.1)."""

    def __init__(self, *, ddconfig: Mapping[str, Any], embed_dim: int, **training_only: object) -> None:
        refuse_unknown("AutoencoderKL", training_only)
        require_value("AutoencoderKL's ddconfig", "double_z", ddconfig.get("double_z", True), True)
        super().__init__(ddconfig, embed_dim, 2 * embed_dim)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Picture [batch, channels, height, width] in [-1, 1] to the posterior over latents."""
        return DiagonalGaussian(self.encoded(x))

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction and posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior


class VQModel(FirstStage):
    """Autoencoder with a codebook (arXiv:2012.09841); ``encode`` quantises and ``decode`` takes codewords.

    ``remap`` and ``sane_index_shape`` concern the codewords' numbers only, which nothing here reads.
    """

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
        refuse_unknown(type(self).__name__, training_only)
        super().__init__(ddconfig, embed_dim, embed_dim)
        self.quantize = VectorQuantiser(n_embed, embed_dim)

    def encode(self, x: Tensor) -> Any:
        """Picture to (codewords, codebook loss, indices)."""
        return self.quantize(self.encoded(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and codebook loss."""
        quantised, loss, _ = self.quantize(self.encoded(x))
        return super().decode(quantised), loss


class VQModelInterface(VQModel):
    """The VQ first stage inside a latent diffusion model: diffusion runs before the codebook, decoding quantises."""

    def encode(self, x: Tensor) -> Tensor:
        """Picture to the latent before the codebook."""
        return self.encoded(x)

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Unscaled latent to a picture, through the nearest codewords unless told not to."""
        return super().decode(z if force_not_quantize else self.quantize.nearest(z)[0])
