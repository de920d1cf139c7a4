"""The time-conditional U-Net of latent diffusion, with the parameters and module names of CompVis's ``UNetModel``.

Facts: ``ldm/modules/diffusionmodules/openaimodel.py`` of CompVis/latent-diffusion; the parameters that Stable
Diffusion 2 and XL added (linear projections, transformer depth by level, a vector condition) are understood too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentedge.export.models.attention import AttentionBlock, SpatialTransformer, zero_initialised
from latentedge.export.models.parameters import refuse_unknown, require_value
from latentedge.runtime.errors import UsageError


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-5)


def timestep_embedding(timesteps: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of float32 ``timesteps`` [batch]: [batch, width], cosines first, an odd width padded with 0.

    Frequencies are exp(-ln(max_period) * i / (width // 2)) (arXiv:1706.03762 without the -1 in the denominator).
    """
    half = width // 2
    # Multiplied before it is divided, as in the original: the other order rounds some frequencies differently, which
    # turns the angle of a late timestep by 6e-5.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    frequencies = torch.exp(exponents)
    angles = timesteps.float()[:, None] * frequencies[None]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return functional.pad(embedding, (0, 1)) if width % 2 else embedding


class Downsample(nn.Module):
    """Half the size: a stride-2 convolution, or a mean of 2x2."""

    def __init__(self, channels: int, with_convolution: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if with_convolution else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to half the height and width."""
        result: Tensor = self.op(x)
        return result


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then a convolution if asked for."""

    def __init__(self, channels: int, with_convolution: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_convolution else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to twice the height and width."""
        result: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return result


class ResBlock(nn.Module):
    """A residual block conditioned on the time embedding, by addition or by scale and shift.

    ``resample``: "up" and "down" change the size of both branches between the first SiLU and its convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_width: int,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample: nn.Module = nn.Identity()
        if resample is not None:
            self.resample = nn.AvgPool2d(2) if resample == "down" else Upsample(in_channels, with_convolution=False)
        self.in_layers = nn.Sequential(
            _norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding_width, 2 * out_channels if scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            _norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_initialised(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` [batch, in_channels, height, width], ``embedding`` [batch, width]."""
        norm, activation, convolution = self.in_layers
        hidden = convolution(self.resample(activation(norm(x))))
        condition = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            hidden = self.out_layers[0](hidden) * (1.0 + scale) + shift
            hidden = self.out_layers[1:](hidden)
        else:
            hidden = self.out_layers(hidden + condition)
        result: Tensor = self.skip_connection(self.resample(x)) + hidden
        return result


class Stage(nn.ModuleList):
    """Modules in a row, each given what it takes: the time embedding, the context, or neither."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """Feature map in, feature map out."""
        for module in self:
            if isinstance(module, ResBlock):
                x = module(x, embedding)
            elif isinstance(module, SpatialTransformer):
                x = module(x, context)
            else:
                x = module(x)
        return x


@dataclass(frozen=True)
class _Attention:
    """How attention is built at each level."""

    num_heads: int
    num_head_channels: int
    legacy: bool
    new_order: bool
    spatial_transformer: bool
    depths: tuple[int, ...]
    context_width: int | None
    linear: bool

    def build(self, channels: int, level: int) -> nn.Module:
        by_width = self.num_head_channels != -1
        heads = channels // self.num_head_channels if by_width else self.num_heads
        if not self.spatial_transformer:
            if heads < 1 or channels % heads or (by_width and channels % self.num_head_channels):
                raise UsageError(
                    f"UNetModel: a level's {channels} channels cannot be split into "
                    + (f"attention heads of {self.num_head_channels}." if by_width else f"{heads} attention heads."),
                    hint="num_heads and num_head_channels of unet_config must divide every level's channels.",
                )
            return AttentionBlock(channels, heads, self.new_order)
        head_width = self.num_head_channels if by_width and not self.legacy else channels // heads
        return SpatialTransformer(channels, heads, head_width, self.depths[level], self.context_width, self.linear)


@dataclass(frozen=True)
class _Builder:
    """What the levels are made of; builds the ways down and up."""

    model_channels: int
    channel_mult: tuple[int, ...]
    blocks: tuple[int, ...]
    attention_resolutions: tuple[int, ...]
    attention: _Attention
    #: On the way up.
    attention_up: _Attention
    dropout: float
    scale_shift: bool
    resblock_updown: bool
    conv_resample: bool

    def residual(self, channels: int, out: int, resample: str | None = None) -> ResBlock:
        return ResBlock(channels, out, 4 * self.model_channels, self.dropout, self.scale_shift, resample)

    def block(self, channels: int, level: int, attention: _Attention) -> list[nn.Module]:
        out = self.channel_mult[level] * self.model_channels
        modules: list[nn.Module] = [self.residual(channels, out)]
        if 2**level in self.attention_resolutions:
            modules.append(attention.build(out, level))
        return modules

    def down(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.residual(channels, channels, "down")
        return Downsample(channels, self.conv_resample)

    def up(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.residual(channels, channels, "up")
        return Upsample(channels, self.conv_resample)

    def input_blocks(self, in_channels: int) -> tuple[nn.ModuleList, list[int]]:
        """The way down, and the channels of each of its outputs."""
        stages = nn.ModuleList([Stage([nn.Conv2d(in_channels, self.model_channels, 3, padding=1)])])
        widths = [self.model_channels]
        for level, multiple in enumerate(self.channel_mult):
            for _ in range(self.blocks[level]):
                stages.append(Stage(self.block(widths[-1], level, self.attention)))
                widths.append(multiple * self.model_channels)
            if level < len(self.channel_mult) - 1:
                stages.append(Stage([self.down(widths[-1])]))
                widths.append(widths[-1])
        return stages, widths

    def middle_block(self, channels: int) -> Stage:
        attention = self.attention.build(channels, len(self.channel_mult) - 1)
        return Stage([self.residual(channels, channels), attention, self.residual(channels, channels)])

    def output_blocks(self, widths: list[int]) -> nn.ModuleList:
        """The way up: each stage takes its predecessor's output and one of the way down's, last first."""
        stages = nn.ModuleList()
        channels = widths[-1]
        skips = list(widths)
        for level in reversed(range(len(self.channel_mult))):
            for index in range(self.blocks[level] + 1):
                modules = self.block(channels + skips.pop(), level, self.attention_up)
                channels = self.channel_mult[level] * self.model_channels
                if level > 0 and index == self.blocks[level]:
                    modules.append(self.up(channels))
                stages.append(Stage(modules))
        return stages


class UNetModel(nn.Module):
    """The denoiser: noisy latent, timestep and condition in, model output of ``out_channels`` out."""

    def __init__(
        self,
        *,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        image_size: int | None = None,
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        adm_in_channels: int | None = None,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        use_linear_in_transformer: bool = False,
        spatial_transformer_attn_type: str = "softmax",
        **training_only: object,
    ) -> None:
        super().__init__()
        refuse_unknown("UNetModel", training_only)
        require_value("UNetModel", "dims", dims, 2)
        require_value("UNetModel", "n_embed", n_embed, None)
        require_value("UNetModel", "channel_mult[0]", channel_mult[0], 1)
        if num_heads == num_head_channels == -1:
            raise UsageError(
                "UNetModel has neither num_heads nor num_head_channels.",
                hint="the number of attention heads cannot be read from the weights: set one of them in the YAML.",
            )
        context = context_dim if context_dim is None or isinstance(context_dim, int) else context_dim[0]
        attention = _Attention(
            num_heads,
            num_head_channels,
            legacy,
            use_new_attention_order,
            use_spatial_transformer,
            _by_level(transformer_depth, len(channel_mult)),
            context,
            use_linear_in_transformer,
        )
        # The original reads num_heads_upsample for an AttentionBlock whose heads no width gives, and nowhere else.
        by_number = legacy and num_head_channels == -1 and not use_spatial_transformer
        heads_up = num_heads_upsample if by_number and num_heads_upsample != -1 else num_heads
        builder = _Builder(
            model_channels,
            tuple(channel_mult),
            _by_level(num_res_blocks, len(channel_mult)),
            tuple(attention_resolutions),
            attention,
            replace(attention, num_heads=heads_up),
            dropout,
            use_scale_shift_norm,
            resblock_updown,
            conv_resample,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.channel_mult = tuple(channel_mult)
        self.context_width = context if use_spatial_transformer else None
        self.model_channels = model_channels
        width = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.label_emb = _label_embedding(num_classes, adm_in_channels, width)
        self.classes = num_classes if isinstance(num_classes, int) else None
        self.input_blocks, widths = builder.input_blocks(in_channels)
        self.middle_block = builder.middle_block(widths[-1])
        self.output_blocks = builder.output_blocks(widths)
        self.out = nn.Sequential(
            _norm(model_channels), nn.SiLU(), zero_initialised(nn.Conv2d(model_channels, out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Denoiser output [batch, out_channels, height, width].

        ``x`` [batch, in_channels, height, width] holds latent and concatenated condition; ``timesteps`` [batch] may
        be fractional; ``context`` [batch, tokens, width] for cross-attention; ``y`` class numbers [batch] or a vector
        [batch, width] for networks with a label embedding.
        """
        embedding = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(y)
        hidden = x
        skips = []
        for block in self.input_blocks:
            hidden = block(hidden, embedding, context)
            skips.append(hidden)
        hidden = self.middle_block(hidden, embedding, context)
        for block in self.output_blocks:
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), embedding, context)
        result: Tensor = self.out(hidden)
        return result


def _by_level(value: int | Sequence[int], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)


def _label_embedding(num_classes: int | str | None, vector_width: int | None, width: int) -> nn.Module | None:
    if num_classes is None:
        return None
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, width)
    require_value("UNetModel", "num_classes", num_classes, "sequential")
    if vector_width is None:
        require_value("UNetModel", "adm_in_channels", vector_width, "the width of the vector condition")
    return nn.Sequential(nn.Sequential(nn.Linear(vector_width or 0, width), nn.SiLU(), nn.Linear(width, width)))
