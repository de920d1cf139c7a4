"""The networks of diffusers' pipelines as modules with positional inputs, written to export well.

Attention is MatMul, Softmax, MatMul. Upsampling restores the size that the matching downsampling halved, so every
latent size works, odd ones too, and no size is compared while tracing. Masks are finite in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from latentedge.export.models.attention import attend, merge_heads, split_heads

#: Added to the logits of masked tokens: exp of it is zero, and half precision holds it.
MASKED = -10000.0


class PlainAttention:
    """Attention processor for diffusers' ``Attention``: tokens [batch, tokens, width] or feature maps, no mask."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Self-attention, or attention to ``encoder_hidden_states`` [batch, context tokens, context width]."""
        residual = hidden_states
        if attention.spatial_norm is not None:
            hidden_states = attention.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attention.group_norm is not None:
            hidden_states = attention.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attention.norm_cross:
            context = attention.norm_encoder_hidden_states(context)
        query = split_heads(attention.to_q(hidden_states), attention.heads)
        key = split_heads(attention.to_k(context), attention.heads)
        value = split_heads(attention.to_v(context), attention.heads)
        attended: Tensor = attention.to_out[0](merge_heads(attend(query, key, value, attention_mask)))
        if len(shape) == 4:
            attended = attended.transpose(1, 2).reshape(shape)
        if attention.residual_connection:
            attended = attended + residual
        return attended if attention.rescale_output_factor == 1 else attended / attention.rescale_output_factor


class RecordedDownsampling(nn.Module):
    """A downsampling that notes the size it halves in ``sizes``.

    A residual block that resamples does it twice, to both of its branches: ``twice`` notes the size once.
    """

    def __init__(self, downsampling: nn.Module, sizes: list[torch.Size], twice: bool) -> None:
        super().__init__()
        self.downsampling = downsampling
        self.sizes = sizes
        self.twice = twice
        self.again = False

    def forward(self, hidden_states: Tensor, *_: object) -> Tensor:
        """[batch, channels, height, width] to half the size, rounded up."""
        if not self.again:
            self.sizes.append(hidden_states.shape[2:])
        self.again = self.twice and not self.again
        result: Tensor = self.downsampling(hidden_states)
        return result


class Upsampling(nn.Module):
    """Nearest-neighbour upsampling and a convolution: by two, or to the last size noted in ``sizes``.

    ``twice``: as for the downsampling, the second branch takes the size of the first.
    """

    def __init__(self, convolution: nn.Module | None, sizes: list[torch.Size] | None, twice: bool) -> None:
        super().__init__()
        self.convolution = convolution
        self.sizes = sizes
        self.twice = twice
        self.again = False

    def forward(self, hidden_states: Tensor, *_: object) -> Tensor:
        """[batch, channels, height, width] to twice the size, or to the noted one."""
        if self.sizes is None:
            hidden_states = functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        else:
            self.again = self.twice and not self.again
            height, width = self.sizes[-1] if self.again else self.sizes.pop()
            hidden_states = functional.interpolate(hidden_states, size=(height, width), mode="nearest")
        return hidden_states if self.convolution is None else self.convolution(hidden_states)


def made_exportable(model: nn.Module, sizes: list[torch.Size] | None = None) -> nn.Module:
    """``model`` (a diffusers UNet or autoencoder) in evaluation mode, with plain attention and resampling.

    ``sizes`` joins the two halves of a UNet; an autoencoder has none, it only doubles.
    """
    for module in list(model.modules()):
        if isinstance(module, Attention) and module.norm_q is None and module.add_k_proj is None:
            module.set_processor(PlainAttention())
        twice = isinstance(module, ResnetBlock2D)
        for name, child in list(module.named_children()):
            if isinstance(child, Upsample2D) and not child.use_conv_transpose and child.norm is None:
                convolution = child.conv if child.name == "conv" else child.Conv2d_0
                setattr(module, name, Upsampling(convolution if child.use_conv else None, sizes, twice))
            elif isinstance(child, Downsample2D) and sizes is not None:
                setattr(module, name, RecordedDownsampling(child, sizes, twice))
    return model.eval().requires_grad_(False)
