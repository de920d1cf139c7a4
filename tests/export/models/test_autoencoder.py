"""Options of first stages that no published model uses."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from latentedge.export.models.autoencoder import AttnBlock, AutoencoderKL, LinearAttnBlock  # noqa: E402
from latentedge.runtime.errors import UsageError  # noqa: E402


def stage(**changes: Any) -> Any:
    ddconfig = {"ch": 32, "out_ch": 3, "in_channels": 3, "resolution": 32, "z_channels": 4, "num_res_blocks": 1,
                "attn_resolutions": [16], "ch_mult": [1, 1, 1], **changes}  # fmt: skip
    return AutoencoderKL(ddconfig=ddconfig, embed_dim=4).eval()


@torch.no_grad()
def test_linear_attention_sums_values_over_normalised_keys() -> None:
    torch.manual_seed(0)
    block, x = LinearAttnBlock(8), torch.randn(2, 8, 3, 5)
    query, key, value = block.to_qkv(x).reshape(2, 3, 8, 15).unbind(1)
    context = torch.einsum("bdn,ben->bde", key.softmax(dim=-1), value)
    expected = block.to_out(torch.einsum("bde,bdn->ben", context, query).reshape(2, 8, 3, 5))
    assert float((block(x) - expected).abs().max()) < 1e-5
    assert float(expected.std()) > 1e-2


@pytest.mark.parametrize("changes", [{"attn_type": "linear"}, {"use_linear_attn": True}])
def test_linear_attention_takes_every_place_of_attention(changes: dict[str, Any]) -> None:
    network = stage(**changes)
    kinds = [type(module) for module in network.modules()]
    # One block on the way down, two on the way up, and both middles.
    assert kinds.count(LinearAttnBlock) == 5
    assert AttnBlock not in kinds
    assert {"encoder.mid.attn_1.to_qkv.weight", "decoder.up.1.attn.1.to_out.bias"} <= set(network.state_dict())


def test_the_decoder_doubles_the_lowest_nominal_side() -> None:
    names = set(stage(resolution=42, attn_resolutions=[21, 40]).state_dict())
    assert "encoder.down.1.attn.0.q.weight" in names  # 42, 21, 10 on the way down
    assert "decoder.up.0.attn.0.q.weight" in names  # 10, 20, 40 on the way up
    assert "decoder.up.1.attn.0.q.weight" not in names


def test_other_attention_is_refused() -> None:
    with pytest.raises(UsageError, match="attn_type='flash'"):
        stage(attn_type="flash")
