"""The text encoders of diffusers' pipelines with ``input_ids`` in and named states out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from latentedge.export.models.attention import attend, merge_heads, split_heads
from latentedge.export.sources.diffusers_modules import MASKED


class ClipTextEncoder(nn.Module):
    """transformers' ``CLIPTextModel`` or ``CLIPTextModelWithProjection``.

    ``outputs`` names what ``forward`` returns, in order: ``last_hidden_state`` (after the final norm),
    ``pooler_output`` (the state at the end of the text), ``text_embeds`` (projected), ``hidden_states.N`` (after N
    layers, without a norm). ``masked``: what comes after the end of the text is padding, which no token attends to.
    """

    def __init__(self, model: Any, outputs: Iterable[str], *, masked: bool = False) -> None:
        super().__init__()
        text = getattr(model, "text_model", model)
        self.embeddings = text.embeddings
        self.layers = text.encoder.layers
        self.final_layer_norm = text.final_layer_norm
        self.projection = getattr(model, "text_projection", None)
        self.outputs = tuple(outputs)
        self.masked = masked
        self.heads = int(model.config.num_attention_heads)
        self.end_token = int(model.config.eos_token_id)
        length = int(model.config.max_position_embeddings)
        self.mask = nn.Buffer(torch.full((length, length), MASKED).triu(1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Token ids int64 [batch, tokens] to the named outputs."""
        hidden = self.embeddings(input_ids=input_ids)
        tokens = input_ids.shape[1]
        mask = self.mask[:tokens, :tokens]
        if self.masked:
            mask = mask + self._padding(input_ids)
        states = {"hidden_states.0": hidden}
        for number, layer in enumerate(self.layers, start=1):
            hidden = hidden + self._attention(layer.self_attn, layer.layer_norm1(hidden), mask)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
            states[f"hidden_states.{number}"] = hidden
        states["last_hidden_state"] = self.final_layer_norm(hidden)
        states["pooler_output"] = self._pooled(states["last_hidden_state"], input_ids)
        if self.projection is not None:
            states["text_embeds"] = self.projection(states["pooler_output"])
        return tuple(states[name] for name in self.outputs)

    def _attention(self, attention: Any, hidden: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            split_heads(projection(hidden), self.heads)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        result: Tensor = attention.out_proj(merge_heads(attend(query, key, value, mask)))
        return result

    def _pooled(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """The state at the end of the text."""
        positions = self._end(input_ids)[:, None, None].expand(-1, 1, hidden.shape[2])
        return hidden.gather(1, positions).squeeze(1)

    def _padding(self, input_ids: Tensor) -> Tensor:
        """[batch, 1, 1, tokens] to add to the logits."""
        after = torch.arange(input_ids.shape[1]) > self._end(input_ids)[:, None]
        return (after.to(self.mask.dtype) * MASKED)[:, None, None]

    def _end(self, input_ids: Tensor) -> Tensor:
        """Position of the first end token. Configurations that give 2 as its id mean the largest id (transformers)."""
        ids = input_ids.to(torch.int32)
        ends = ids if self.end_token == 2 else (ids == self.end_token).to(torch.int32)
        return ends.argmax(dim=-1)


class LdmBertTextEncoder(nn.Module):
    """diffusers' ``LDMBertModel``: bidirectional, no padding mask, ``last_hidden_state`` after the final norm."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        encoder = model.model
        self.tokens = encoder.embed_tokens
        self.positions = encoder.embed_positions
        self.layers = encoder.layers
        self.final_layer_norm = encoder.layer_norm
        self.heads = int(model.config.encoder_attention_heads)
        self.eval().requires_grad_(False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Token ids int64 [batch, tokens] to states [batch, tokens, width]."""
        hidden = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            attention, normed = layer.self_attn, layer.self_attn_layer_norm(hidden)
            query, key, value = (
                split_heads(projection(normed), self.heads)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            hidden = hidden + attention.out_proj(merge_heads(attend(query, key, value)))
            hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))
        return (self.final_layer_norm(hidden),)
