"""Parts of the U-Net that no recorded model uses, or that recorded models cannot tell apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from latentedge.export.models.attention import AttentionBlock, SpatialTransformer  # noqa: E402
from latentedge.export.models.conditioning import SpatialRescaler  # noqa: E402
from latentedge.export.models.unet import UNetModel, timestep_embedding  # noqa: E402
from latentedge.runtime.errors import UsageError  # noqa: E402

GOLDEN = Path(__file__).parents[2] / "golden" / "compvis" / "timestep_embedding.npz"
SMALL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 4,
}


@pytest.mark.parametrize("width", [32, 33, 320])
def test_timestep_embedding(width: int) -> None:
    with np.load(GOLDEN) as arrays:
        timesteps, expected = torch.from_numpy(arrays["temb_t"]), torch.from_numpy(arrays[f"temb_{width}"])
    found = timestep_embedding(timesteps.float(), width)
    assert found.shape == expected.shape
    # Angles reach a thousand, where one bit of a frequency is 6e-5; torch's exponential differs between processors.
    assert float((found - expected).abs().max()) < 5e-5
    assert float((found[timesteps < 10] - expected[timesteps < 10]).abs().max()) < 1e-6


@pytest.mark.parametrize("width", [160, 192, 224, 320])
def test_frequencies_are_rounded_as_in_the_original(width: int) -> None:
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = torch.tensor([[999.0]]) * frequencies
    expected = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    assert torch.equal(timestep_embedding(torch.tensor([999.0]), width), expected)


@torch.no_grad()
def test_both_orders_of_attention_are_the_same_network() -> None:
    legacy, new = AttentionBlock(64, 4), AttentionBlock(64, 4, new_order=True)
    state = {name: torch.randn_like(value) for name, value in legacy.state_dict().items()}
    legacy.load_state_dict(state)
    # Heads first, query, key and value inside each; or query, key and value first, heads inside each.
    for name in ("qkv.weight", "qkv.bias"):
        parts = state[name].reshape(4, 3, 16, -1).transpose(0, 1)
        state[name] = parts.reshape(legacy.state_dict()[name].shape)
    new.load_state_dict(state)
    x = torch.randn(2, 64, 5, 3)
    assert float((legacy(x) - new(x)).abs().max()) < 1e-4
    assert float((legacy(x) - x).std()) > 0.1


@torch.no_grad()
@torch.no_grad()
def test_transformer_hands_on_the_layout_that_the_original_does() -> None:
    """The original's sum has the memory layout of its tokens; in another one, torch's kernels round differently."""
    block = SpatialTransformer(64, heads=4, head_width=16, context_width=24).eval()
    out = block(torch.randn(2, 64, 6, 4), torch.randn(2, 5, 24))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_fresh_network_gives_zero_and_a_residual_block_its_input() -> None:
    network = UNetModel(**SMALL).eval()
    x = torch.randn(1, 3, 8, 8)
    assert not network(x, torch.tensor([5.0])).any()
    block = network.middle_block[0]
    hidden = torch.randn(1, 64, 4, 4)
    assert torch.equal(block(hidden, torch.randn(1, 128)), hidden)


@pytest.mark.parametrize(
    ("parameters", "up"),
    [
        ({"num_heads": 4, "num_heads_upsample": 2}, 2),
        ({"num_heads": 4}, 4),
        ({"num_heads": 4, "num_heads_upsample": 2, "legacy": False}, 4),
        ({"num_head_channels": 8, "num_heads_upsample": 2}, 4),
    ],
)
def test_attention_heads_on_the_way_up(parameters: dict[str, Any], up: int) -> None:
    network = UNetModel(
        in_channels=3,
        model_channels=32,
        out_channels=3,
        num_res_blocks=1,
        attention_resolutions=[1],
        channel_mult=[1],
        **parameters,
    )
    heads = [
        [block.heads for block in part.modules() if isinstance(block, AttentionBlock)] for part in network.children()
    ]
    assert [found for found in heads if found] == [[4], [4], [up, up]]


@torch.no_grad()
def test_class_numbers_reach_a_network_with_label_embedding() -> None:
    network = UNetModel(**SMALL, num_classes=5).eval()
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([5.0, 5.0])
    first, second = (network(x, timesteps, y=torch.tensor(labels)) for labels in ([0, 1], [0, 4]))
    assert float((first[0] - second[0]).abs().max()) < 1e-5
    assert float((first[1] - second[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": -1}, "neither num_heads nor num_head_channels"),
        ({"channel_mult": [2, 2]}, r"channel_mult\[0\]=2"),
        ({"dims": 3}, "dims=3"),
        ({"n_embed": 16}, "n_embed=16"),
        ({"num_classes": "sequential"}, "adm_in_channels"),
        ({"surprise": 1, "another": 2}, "parameters another, surprise"),
    ],
)
def test_unsupported_parameters(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        UNetModel(**{**SMALL, **change})


@pytest.mark.parametrize("method", ["bilinear", "area", "nearest", "bicubic"])
@torch.no_grad()
def test_rescaler_equals_interpolation(method: str) -> None:
    rescaler = SpatialRescaler(n_stages=1, method=method, in_channels=4)
    for size in ((8, 12), (9, 7)):
        x = torch.randn(2, 4, *size)
        expected = torch.nn.functional.interpolate(x, scale_factor=0.5, mode=method)
        assert float((rescaler(x) - expected).abs().max()) < 1e-6
