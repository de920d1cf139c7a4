"""The CLIP text transformers against transformers' and torch's own attention, with the same random weights."""

from __future__ import annotations

from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch")

from latentedge.export.models.clip_text import ClipTextConfig, FrozenCLIPEmbedder  # noqa: E402
from latentedge.export.models.open_clip_text import FrozenOpenCLIPEmbedder  # noqa: E402
from latentedge.runtime.errors import UsageError  # noqa: E402

CONFIG = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 12,
}
TOLERANCE = 2e-6


def tokens() -> torch.Tensor:
    return torch.randint(0, 98, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_clip_equals_transformers(activation: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**CONFIG, hidden_act=activation, bos_token_id=97, eos_token_id=98)
    original = transformers.CLIPTextModel(config).eval()
    for parameter in original.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = FrozenCLIPEmbedder(text_config=ClipTextConfig.from_mapping(config.to_dict())).eval()
    names = {name.removeprefix("text_model."): value for name, value in original.state_dict().items()}
    state = {f"transformer.text_model.{name}": value for name, value in names.items()}
    state["transformer.text_model.embeddings.position_ids"] = torch.arange(12)[None]
    ours.load_state_dict(state)
    expected = original(input_ids=tokens(), output_hidden_states=True)
    assert float((ours(tokens()) - expected.last_hidden_state).abs().max()) < TOLERANCE
    hidden = FrozenCLIPEmbedder(text_config=ours.config, layer="hidden", layer_idx=1).eval()
    hidden.load_state_dict(ours.state_dict())
    assert float((hidden(tokens()) - expected.hidden_states[1]).abs().max()) < TOLERANCE


class Block(torch.nn.Module):
    """open_clip's residual block, around torch's own multi-head attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": torch.nn.Linear(width, 4 * width), "gelu": torch.nn.GELU()}
        self.mlp = torch.nn.Sequential(OrderedDict(**layers, c_proj=torch.nn.Linear(4 * width, width)))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        result: torch.Tensor = x + self.mlp(self.ln_2(x))
        return result


@pytest.mark.parametrize("layer", ["last", "penultimate"])
@torch.no_grad()
def test_open_clip_equals_torch_attention(layer: str) -> None:
    torch.manual_seed(0)
    width, heads, layers = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["num_hidden_layers"]
    config = ClipTextConfig.from_mapping({**CONFIG, "intermediate_size": 4 * width, "hidden_act": "gelu"})
    ours = FrozenOpenCLIPEmbedder(text_config=config, layer=layer).eval()
    for parameter in ours.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    blocks = torch.nn.ModuleList(Block(width, heads) for _ in range(layers)).eval()
    blocks.load_state_dict(ours.model.transformer.resblocks.state_dict())
    # What Stable Diffusion 2 takes: all blocks or all but the last, then the final norm.
    hidden = ours.model.token_embedding(tokens()) + ours.model.positional_embedding
    mask = torch.full((12, 12), float("-inf")).triu(1)
    for block in list(blocks)[: None if layer == "last" else -1]:
        hidden = block(hidden, mask)
    assert float((ours(tokens()) - ours.model.ln_final(hidden)).abs().max()) < TOLERANCE


def test_sizes_must_be_described() -> None:
    with pytest.raises(UsageError, match="version='somebody/other'"):
        FrozenCLIPEmbedder(version="somebody/other")
    with pytest.raises(UsageError, match="not a multiple"):
        ClipTextConfig.from_mapping({**CONFIG, "num_attention_heads": 5})
    with pytest.raises(UsageError, match="hidden_act"):
        ClipTextConfig.from_mapping({**CONFIG, "hidden_act": "relu"})
