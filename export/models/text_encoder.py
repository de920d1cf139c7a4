"""The transformer text encoder that latent diffusion trains itself, keyed as x-transformers keys it.

Pre-norm layers alternate attention (even) and feed-forward (odd). It is not causal and has no padding mask: padding
tokens are attended to. Facts: ``ldm/modules/x_transformer.py`` of CompVis/latent-diffusion.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from latentedge.export.models.attention import attend, merge_heads, split_heads
from latentedge.export.models.parameters import refuse_unknown

HEADS = 8
HEAD_WIDTH = 64


class Attention(nn.Module):
    """Self-attention with 8 heads of 64, whatever the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same shape."""
        query, key, value = (split_heads(projected, HEADS) for projected in (self.to_q(x), self.to_k(x), self.to_v(x)))
        result: Tensor = self.to_out(merge_heads(attend(query, key, value)))
        return result


class FeedForward(nn.Module):
    """Linear, exact GELU, linear, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()), nn.Dropout(0.0), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        result: Tensor = self.net(x)
        return result


class AttentionLayers(nn.Module):
    """``layers.{i}.0`` is a LayerNorm and ``layers.{i}.1`` the block whose output is added."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(nn.ModuleList([nn.LayerNorm(width), Attention(width)]))
            self.layers.append(nn.ModuleList([nn.LayerNorm(width), FeedForward(width)]))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same shape."""
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            norm, block = layer
            x = x + block(norm(x))
        return x


class AbsolutePositions(nn.Module):
    """A learned embedding for each position."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to [tokens, width]."""
        return self.emb.weight[: x.shape[1]]


class TransformerWrapper(nn.Module):
    """Token and position embeddings, attention layers, a final norm; ``to_logits`` exists in the files only."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocabulary, width)
        self.pos_emb = AbsolutePositions(width, length)
        self.emb_dropout = nn.Dropout(dropout)
        self.attn_layers = AttentionLayers(width, depth)
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, vocabulary)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        nn.init.normal_(self.pos_emb.emb.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids int64 [batch, tokens] to embeddings [batch, tokens, width]."""
        x = self.token_emb(input_ids)
        x = self.emb_dropout(x + self.pos_emb(x))
        result: Tensor = self.norm(self.attn_layers(x))
        return result


class BERTEmbedder(nn.Module):
    """The text encoder as the configurations name it; it takes token ids, a tokenizer is not part of it."""

    def __init__(
        self,
        *,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        **training_only: object,
    ) -> None:
        super().__init__()
        refuse_unknown(type(self).__name__, training_only)
        self.use_tokenizer = use_tokenizer
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size
        self.width = n_embed
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, n_embed, n_layer, embedding_dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids int64 [batch, tokens] to embeddings [batch, tokens, n_embed]."""
        result: Tensor = self.transformer(input_ids)
        return result


class TransformerEmbedder(BERTEmbedder):
    """The same transformer for tokens that are not words."""

    def __init__(
        self, *, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77, **training_only: Any
    ) -> None:
        super().__init__(
            n_embed=n_embed,
            n_layer=n_layer,
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            use_tokenizer=False,
            **training_only,
        )
