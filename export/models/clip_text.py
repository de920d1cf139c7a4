"""CLIP's text transformer (arXiv:2103.00020), keyed as transformers keys CLIPTextModel (Stable Diffusion 1).

It is causal and takes no padding mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentedge.export.models.attention import attend, merge_heads, split_heads
from latentedge.export.models.parameters import refuse_unknown, require_value
from latentedge.runtime.errors import UsageError


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": functional.gelu}


@dataclass(frozen=True)
class ClipTextConfig:
    """Size of a CLIP text transformer, with transformers' field names; the defaults are ViT-L/14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> ClipTextConfig:
        """From a ``clip_text_config.json``; fields that do not describe the network are left aside."""
        known = {field.name for field in fields(cls)}
        config = cls(**{name: value for name, value in values.items() if name in known})  # type: ignore[arg-type]
        require_value("CLIP's text transformer", "hidden_act", config.hidden_act, *ACTIVATIONS)
        if config.hidden_size % config.num_attention_heads:
            raise UsageError(
                f"CLIP's hidden_size {config.hidden_size} is not a multiple of its "
                f"{config.num_attention_heads} attention heads.",
                hint="compare clip_text_config.json with the checkpoint.",
            )
        return config


def causal_mask(length: int, device: torch.device) -> Tensor:
    """[length, length], 0 where a token may look and -10000 where not: its softmax is 0 in every float format."""
    return torch.full((length, length), -10000.0, device=device).triu(1)


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            split_heads(projected, self.heads) for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        result: Tensor = self.out_proj(merge_heads(attend(query, key, value, mask)))
        return result


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.activation(self.fc1(x)))
        return result


class _Layer(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = _SelfAttention(width, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = _FeedForward(width, config.intermediate_size, ACTIVATIONS[config.hidden_act])
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        result: Tensor = x + self.mlp(self.layer_norm2(x))
        return result


class _Embeddings(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        # Older files store it; nothing reads it.
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
        return result


class _Layers(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class ClipTextTransformer(nn.Module):
    """Embeddings, causal layers, final norm."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """Embeddings, then the output of each layer, all before the final norm."""
        mask = causal_mask(input_ids.shape[1], input_ids.device)
        states = [self.embeddings(input_ids)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1], mask))
        return states

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids int64 [batch, tokens] to [batch, tokens, hidden_size], after the final norm."""
        result: Tensor = self.final_layer_norm(self.hidden_states(input_ids)[-1])
        return result


class ClipTextModel(nn.Module):
    """The level ``text_model`` of transformers' key names."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.text_model = ClipTextTransformer(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """As ``ClipTextTransformer``."""
        result: Tensor = self.text_model(input_ids)
        return result


class FrozenCLIPEmbedder(nn.Module):
    """CLIP's last hidden state, after the final norm."""

    def __init__(
        self,
        *,
        version: str = "openai/clip-vit-large-patch14",
        max_length: int = 77,
        layer: str = "last",
        layer_idx: int | None = None,
        freeze: bool = True,
        text_config: ClipTextConfig | None = None,
        **training_only: object,
    ) -> None:
        super().__init__()
        refuse_unknown("FrozenCLIPEmbedder", training_only)
        require_value("FrozenCLIPEmbedder", "layer", layer, "last", "hidden")
        if text_config is None:
            require_value(
                "FrozenCLIPEmbedder (without a clip_text_config.json)",
                "version",
                version,
                "openai/clip-vit-large-patch14",
            )
        self.config = text_config or ClipTextConfig()
        self.max_length = max_length
        self.layer_index = -1 if layer == "last" or layer_idx is None else layer_idx
        self.layer = layer
        self.transformer = ClipTextModel(self.config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids int64 [batch, tokens] to [batch, tokens, hidden_size]."""
        transformer = self.transformer.text_model
        if self.layer == "hidden":
            return transformer.hidden_states(input_ids)[self.layer_index]
        result: Tensor = transformer(input_ids)
        return result
