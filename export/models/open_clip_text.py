"""OpenCLIP's text transformer, keyed as open_clip keys it (Stable Diffusion 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentedge.export.models.attention import attend, merge_heads, split_heads
from latentedge.export.models.clip_text import ClipTextConfig, causal_mask
from latentedge.export.models.parameters import refuse_unknown, require_value

VIT_H_14 = ClipTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"
)


class _Attention(nn.Module):
    """Query, key and value projections side by side, as ``torch.nn.MultiheadAttention`` stores them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        projected = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (split_heads(part, self.heads) for part in projected.chunk(3, dim=-1))
        result: Tensor = self.out_proj(merge_heads(attend(query, key, value, mask)))
        return result


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c_proj(functional.gelu(self.c_fc(x)))
        return result


class _Block(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = _Attention(config.hidden_size, config.num_attention_heads)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        result: Tensor = x + self.mlp(self.ln_2(x))
        return result


class _Blocks(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))


class OpenClipText(nn.Module):
    """The text half of an open_clip model; ``text_projection`` and ``logit_scale`` exist in the files only."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.positional_embedding = nn.Parameter(torch.empty(config.max_position_embeddings, width))
        self.text_projection = nn.Parameter(torch.empty(width, width))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.transformer = _Blocks(config)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.ln_final = nn.LayerNorm(width, eps=config.layer_norm_eps)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """Embeddings, then the output of each block, all before the final norm; each [batch, tokens, width]."""
        tokens = input_ids.shape[1]
        mask = causal_mask(tokens, input_ids.device)
        states = [self.token_embedding(input_ids) + self.positional_embedding[:tokens]]
        for block in self.transformer.resblocks:
            states.append(block(states[-1], mask))
        return states

    def forward(self, input_ids: Tensor, skipped: int) -> Tensor:
        """[batch, tokens] to [batch, tokens, width]: without the last ``skipped`` blocks, after the final norm."""
        result: Tensor = self.ln_final(self.hidden_states(input_ids)[-1 - skipped])
        return result


class FrozenOpenCLIPEmbedder(nn.Module):
    """OpenCLIP's hidden state after the last or the penultimate layer and the final norm."""

    def __init__(
        self,
        *,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        text_config: ClipTextConfig | None = None,
        **training_only: object,
    ) -> None:
        super().__init__()
        refuse_unknown("FrozenOpenCLIPEmbedder", training_only)
        require_value("FrozenOpenCLIPEmbedder", "layer", layer, "last", "penultimate")
        if text_config is None:
            require_value("FrozenOpenCLIPEmbedder (without a clip_text_config.json)", "arch", arch, "ViT-H-14")
        self.config = text_config or VIT_H_14
        self.max_length = max_length
        self.skipped = 1 if layer == "penultimate" else 0
        self.model = OpenClipText(self.config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids int64 [batch, tokens] to [batch, tokens, width]."""
        result: Tensor = self.model(input_ids, self.skipped)
        return result
