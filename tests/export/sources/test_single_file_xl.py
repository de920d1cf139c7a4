"""A Stable Diffusion XL file against diffusers' UNet and transformers' text encoders with the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")

from latentedge.export.model import SourceOptions  # noqa: E402
from latentedge.export.models.clip_text import ClipTextConfig, FrozenCLIPEmbedder  # noqa: E402
from latentedge.export.models.open_clip_text import FrozenOpenCLIPEmbedder  # noqa: E402
from latentedge.export.models.registry import build_network  # noqa: E402
from latentedge.export.sources import single_file  # noqa: E402
from latentedge.runtime.errors import LatentEdgeError, UsageError  # noqa: E402
from tests.export.sources import compvis_models  # noqa: E402

WIDTHS = (64, 128)
TOLERANCE = 2e-5


def clip_config(width: int, activation: str) -> ClipTextConfig:
    return ClipTextConfig(99, width, 2 * width, 3, width // 64, 77, activation)


def unet_config() -> dict[str, Any]:
    network = compvis_models.unet(4, 4, sum(WIDTHS), legacy=False, channel_mult=[1, 2, 2])
    network["params"] |= {
        "model_channels": 64,
        "attention_resolutions": [4, 2],
        "transformer_depth": [0, 1, 2],
        "num_heads": -1,
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": WIDTHS[1] + 6 * 256,
    }
    return network


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    unet, first_stage = unet_config(), compvis_models.kl()
    found = {
        "model.diffusion_model.": build_network(unet["target"], unet["params"]),
        "first_stage_model.": build_network(first_stage["target"], first_stage["params"]),
        "conditioner.embedders.0.": FrozenCLIPEmbedder(text_config=clip_config(WIDTHS[0], "quick_gelu")),
        "conditioner.embedders.1.": FrozenOpenCLIPEmbedder(text_config=clip_config(WIDTHS[1], "gelu")),
    }
    for network in found.values():
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found


@pytest.fixture
def file(networks: dict[str, Any], tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    state = {prefix + name: v for prefix, network in networks.items() for name, v in network.state_dict().items()}
    save_file(state, tmp_path / "xl.safetensors")
    return tmp_path / "xl.safetensors"


def test_xl(networks: dict[str, Any], file: Path) -> None:
    assert single_file.matches(file, SourceOptions())
    model = single_file.load(file, SourceOptions())
    assert (model.family, model.task) == ("stable-diffusion-xl", "text-to-image")
    assert model.latent.scale_factor == 0.13025
    assert model.conditioning.time_ids == 6
    assert [encoder.output for encoder in model.conditioning.encoders] == ["hidden_states.2", "hidden_states.2"]
    assert model.conditioning.encoders[1].pooled_output == "text_embeds"
    for component in model.components:
        axes = component.compare_axes[0]
        arrays = component.sample_inputs(axes, np.random.default_rng(0))
        assert component.build is not None
        with torch.no_grad():
            outputs = component.build()(*(torch.from_numpy(arrays[spec.name]) for spec in component.spec.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if component.spec.name.startswith("text_encoder"):
            assert component.spec.outputs[0].name == "last_hidden_state"
        shapes = [tuple(output.shape) for output in outputs]
        assert shapes == [spec.resolve(axes) for spec in component.spec.outputs]


@pytest.mark.parametrize("channels", [9, 8])
def test_inpainting_is_told_by_its_channels(channels: int, file: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    width = state[key].shape[0]
    save_file({**state, key: torch.randn(width, channels, 3, 3)}, file)
    if channels == 8:
        with pytest.raises(UsageError, match="takes 8 channels"):
            single_file.load(file, SourceOptions())
        return
    model = single_file.load(file, SourceOptions())
    assert model.task == "inpainting"
    assert [(entry.source, entry.channels) for entry in model.conditioning.concat] == [
        ("mask", 1),
        ("masked_image_latent", 4),
    ]
    assert (model.defaults.guidance_scale, model.defaults.strength) == (7.5, 0.9999)
    unet = next(component for component in model.components if component.spec.name == "unet")
    assert unet.spec.input("sample").shape[1] == 9
    assert unet.build is not None
    arrays = unet.sample_inputs(unet.compare_axes[0], np.random.default_rng(0))
    with torch.no_grad():
        output = unet.build()(*(torch.from_numpy(arrays[spec.name]) for spec in unet.spec.inputs))
    assert tuple(output.shape) == unet.spec.outputs[0].resolve(unet.compare_axes[0])


@torch.no_grad()
def test_unet_equals_diffusers(networks: dict[str, Any], file: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    original = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 256,
    ).eval()
    state = {f"model.diffusion_model.{name}": v for name, v in networks["model.diffusion_model."].state_dict().items()}
    original.load_state_dict(convert_ldm_unet_checkpoint(state, dict(original.config)))
    component = next(c for c in single_file.load(file, SourceOptions()).components if c.spec.name == "unet")
    assert component.build is not None
    ours = component.build()
    sample, context = torch.randn(2, 4, 8, 12), torch.randn(2, 77, sum(WIDTHS))
    timestep = torch.tensor([3.0, 951.0])
    added = {"text_embeds": torch.randn(2, WIDTHS[1]), "time_ids": torch.tensor([[64.0, 96, 0, 8, 64, 96]] * 2)}
    expected = original(sample, timestep, context, added_cond_kwargs=added).sample
    found = ours(sample, timestep, context, added["text_embeds"], added["time_ids"])
    assert float(expected.std()) > 0.05
    assert float((found - expected).abs().max()) < TOLERANCE


@torch.no_grad()
def test_text_encoders_give_what_xl_takes(networks: dict[str, Any], file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    parts = {component.spec.name: component for component in single_file.load(file, SourceOptions()).components}
    ids = torch.full((2, 77), 98)
    ids[0, :9], ids[1, :30] = torch.arange(1, 10), torch.arange(1, 31)
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=WIDTHS[0],
        intermediate_size=2 * WIDTHS[0],
        num_hidden_layers=3,
        num_attention_heads=1,
        bos_token_id=97,
        eos_token_id=98,
    )
    original = transformers.CLIPTextModel(config).eval()
    weights = networks["conditioner.embedders.0."].transformer.text_model.state_dict()
    names = {name.removeprefix("text_model."): name for name in original.state_dict()}
    original.load_state_dict({names[key]: value for key, value in weights.items() if key in names})
    expected = original(input_ids=ids, output_hidden_states=True)
    assert parts["text_encoder"].build is not None
    last, states = parts["text_encoder"].build()(ids)
    assert float((last - expected.last_hidden_state).abs().max()) < TOLERANCE
    assert float((states - expected.hidden_states[-2]).abs().max()) < TOLERANCE
    assert parts["text_encoder_2"].build is not None
    last, states, pooled = parts["text_encoder_2"].build()(ids)
    second = networks["conditioner.embedders.1."].model
    assert torch.equal(states, second.hidden_states(ids)[2])
    assert torch.equal(last, second.ln_final(second.hidden_states(ids)[3]))
    ends = last[torch.arange(2), torch.tensor([9, 30])]
    assert float((pooled - ends @ second.text_projection).abs().max()) < TOLERANCE


def test_an_incomplete_xl_file(networks: dict[str, Any], file: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    save_file({name: value for name, value in state.items() if "label_emb" not in name}, file)
    with pytest.raises(LatentEdgeError, match=r"lacks the tensor 'label_emb\.0\.0\.weight'"):
        single_file.load(file, SourceOptions())
    save_file({name: value for name, value in state.items() if "encoder.down.0.block.0" not in name}, file)
    with pytest.raises(LatentEdgeError):
        single_file.load(file, SourceOptions())
