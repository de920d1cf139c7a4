"""Attention as the U-Nets use it: over pictures (AttentionBlock) and with a context (SpatialTransformer).

Every attention is MatMul, Softmax, MatMul on [batch, heads, tokens, head width], which graph compilers fuse.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over [batch, heads, tokens, head width]; ``mask`` is added to the logits."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        logits = logits + mask
    return torch.softmax(logits, dim=-1) @ value


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * width] to [batch, heads, tokens, width]."""
    batch, _, channels = tokens.shape
    return tokens.reshape(batch, -1, heads, channels // heads).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """[batch, heads, tokens, width] to [batch, tokens, heads * width]."""
    batch, heads, _, width = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, -1, heads * width)


def zero_initialised(module: nn.Module) -> nn.Module:
    """``module`` with all parameters at zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual.

    ``new_order``: ``qkv`` holds all queries, then all keys, then all values; otherwise heads come first, and query,
    key and value lie side by side inside each head.
    """

    def __init__(self, channels: int, heads: int, new_order: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = nn.GroupNorm(32, channels, eps=1e-5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_initialised(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to the same shape."""
        batch, channels, height, width = x.shape
        head_width = channels // self.heads
        qkv = self.qkv(self.norm(x).reshape(batch, channels, height * width))
        if self.new_order:
            qkv = qkv.reshape(batch, 3, self.heads, head_width, height * width)
            query, key, value = qkv.unbind(1)
        else:
            qkv = qkv.reshape(batch, self.heads, 3 * head_width, height * width)
            query, key, value = qkv.split(head_width, dim=2)
        attended = attend(query.transpose(-1, -2), key.transpose(-1, -2), value.transpose(-1, -2))
        attended = attended.transpose(-1, -2).reshape(batch, channels, height * width)
        result: Tensor = x + self.proj_out(attended).reshape(batch, channels, height, width)
        return result


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves when there is none."""

    def __init__(
        self, width: int, context_width: int | None, heads: int, head_width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        context_width = width if context_width is None else context_width
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_width, inner, bias=False)
        self.to_v = nn.Linear(context_width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x`` [batch, tokens, width], ``context`` [batch, context tokens, context width]; shaped as ``x``."""
        context = x if context is None else context
        query, key, value = (
            split_heads(projected, self.heads) for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        projected: Tensor = self.to_out(merge_heads(attend(query, key, value)))
        return projected


class GEGLU(nn.Module):
    """A linear layer whose first half is multiplied with the exact GELU of its second half (arXiv:2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., inner]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        result: Tensor = value * functional.gelu(gate)
        return result


class FeedForward(nn.Module):
    """GEGLU of four times the width, then a linear layer back."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        result: Tensor = self.net(x)
        return result


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and feed-forward, each with a residual."""

    def __init__(
        self, width: int, heads: int, head_width: int, context_width: int | None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, None, heads, head_width, dropout)
        self.ff = FeedForward(width, dropout)
        self.attn2 = CrossAttention(width, context_width, heads, head_width, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[batch, tokens, width] to the same shape."""
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        result: Tensor = self.ff(self.norm3(x)) + x
        return result


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual.

    ``linear``: the projections in and out are linear layers on tokens (Stable Diffusion 2, XL) instead of 1x1
    convolutions.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_width: int,
        depth: int = 1,
        context_width: int | None = None,
        linear: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.linear = linear
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in: nn.Module = nn.Linear(channels, inner) if linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads, head_width, context_width) for _ in range(depth)
        )
        self.proj_out = zero_initialised(nn.Linear(inner, channels) if linear else nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x`` [batch, channels, height, width], ``context`` [batch, tokens, width]; shaped as ``x``."""
        batch, _, height, width = x.shape
        hidden = self.norm(x)
        if not self.linear:
            hidden = self.proj_in(hidden)
        tokens = hidden.flatten(2).transpose(1, 2)
        if self.linear:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if self.linear:
            tokens = self.proj_out(tokens)
        hidden = tokens.transpose(1, 2).reshape(batch, -1, height, width)
        if not self.linear:
            hidden = self.proj_out(hidden)
        # In this order the sum keeps the memory layout of the projection, as in the original: torch then picks its kernels.
        result: Tensor = hidden + x
        return result
