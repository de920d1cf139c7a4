"""Stable Diffusion files without a YAML: the networks are read from the shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")

from latentedge.export.model import SourceOptions  # noqa: E402
from latentedge.export.models.clip_text import ClipTextConfig  # noqa: E402
from latentedge.export.sources import compvis, single_file  # noqa: E402
from latentedge.export.sources.checkpoint import open_checkpoint  # noqa: E402
from latentedge.export.sources.single_file_shapes import below, first_stage_parameters, unet_parameters  # noqa: E402
from latentedge.runtime.errors import LatentEdgeError, UsageError  # noqa: E402
from tests.export.models.test_zoo_keys import CONFIGS, recorded_keys  # noqa: E402
from tests.export.sources import compvis_models  # noqa: E402

CLIP = ClipTextConfig.from_mapping(compvis_models.CLIP_CONFIG)


def stable_diffusion(inputs: int = 4, version: int = 1) -> dict[str, Any]:
    heads: dict[str, Any] = {"num_heads": 8} if version == 1 else {"num_head_channels": 64, "num_heads": -1}
    network = compvis_models.unet(inputs, 4, 24, legacy=False, num_res_blocks=2, channel_mult=[1, 2, 2])
    network["params"] |= {**heads, "attention_resolutions": [1, 2], "use_linear_in_transformer": version == 2}
    network["params"]["model_channels"] = 64
    name = "FrozenCLIPEmbedder" if version == 1 else "FrozenOpenCLIPEmbedder"
    options = {} if version == 1 else {"layer": "penultimate"}
    model = compvis_models.ldm(compvis_models.kl(), network, compvis_models.encoder(name, **options), 4)
    model["params"] |= {"use_ema": False, "conditioning_key": "crossattn"}
    return model


def write(folder: Path, model: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    networks = compvis_models.networks(model, CLIP)
    file = folder / "model.ckpt"
    torch.save(compvis_models.state_dict(model, networks), file)
    (folder / "clip_text_config.json").write_text(json.dumps(compvis_models.CLIP_CONFIG))
    return file, networks


def test_the_real_model_is_read_from_its_shapes() -> None:
    shapes = {name: shape for name, (_, shape) in recorded_keys("sd-v1").items()}
    params = CONFIGS["sd-v1"]["model"]["params"]
    found = unet_parameters(below(shapes, "model.diffusion_model."))
    expected = params["unet_config"]["params"]
    for name in ("in_channels", "out_channels", "model_channels", "channel_mult", "context_dim", "legacy"):
        assert found[name] == expected[name]
    assert found["num_res_blocks"] == [2, 2, 2, 2]
    assert sorted(found["attention_resolutions"]) == sorted(expected["attention_resolutions"])
    assert found["transformer_depth"] == [1, 1, 1, 1]
    assert found["use_linear_in_transformer"] is False
    first_stage = first_stage_parameters(below(shapes, "first_stage_model."))
    published = params["first_stage_config"]["params"]
    assert first_stage["embed_dim"] == published["embed_dim"]
    for name in ("z_channels", "ch", "ch_mult", "num_res_blocks", "in_channels", "out_ch", "attn_resolutions"):
        assert first_stage["ddconfig"][name] == published["ddconfig"][name]


@pytest.mark.parametrize("name", ["kl-f4", "kl-f8", "kl-f16", "kl-f32"])
def test_first_stages_are_read_from_their_shapes(name: str) -> None:
    shapes = {key: shape for key, (_, shape) in recorded_keys(name).items()}
    config = single_config(first_stage_parameters(shapes))
    assert config == shapes


def single_config(params: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from latentedge.export.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in AutoencoderKL(**params).state_dict().items()}


@torch.no_grad()
def test_stable_diffusion_1(tmp_path: Path) -> None:
    file, networks = write(tmp_path, stable_diffusion())
    options = SourceOptions()
    assert not compvis.matches(file, options)
    assert not compvis.matches(tmp_path, options)
    assert single_file.matches(file, options)
    assert single_file.matches(tmp_path, options)
    model = single_file.load(file, options)
    assert (model.task, model.source.layout, model.latent.scale_factor) == ("text-to-image", "single-file", 0.18215)
    assert model.schedule["_class_name"] == "PNDMScheduler"
    assert (model.defaults.height, model.defaults.width) == (512, 512)
    parts = {component.spec.name: component for component in model.components}
    inputs = (torch.randn(2, 4, 8, 12), torch.tensor([3.0, 900.5]), torch.randn(2, 77, 24))
    assert torch.equal(parts["unet"].build()(*inputs), networks["unet_config"](*inputs))
    ids = torch.randint(0, 64, (2, 77))
    assert torch.equal(parts["text_encoder"].build()(ids), networks["cond_stage_config"](ids))


def test_inpainting_is_told_by_its_channels(tmp_path: Path) -> None:
    file, _ = write(tmp_path, stable_diffusion(inputs=9))
    model = single_file.load(file, SourceOptions())
    assert model.task == "inpainting"
    assert [entry.source for entry in model.conditioning.concat] == ["mask", "masked_image_latent"]
    assert (model.defaults.steps, model.defaults.guidance_scale, model.defaults.strength) == (50, 7.5, 1.0)


@torch.no_grad()
def test_editing_is_told_by_its_channels(tmp_path: Path) -> None:
    """InstructPix2Pix: the picture's latent beside the model's own, and what its diffusers folder has by default."""
    file, networks = write(tmp_path, stable_diffusion(inputs=8))
    model = single_file.load(file, SourceOptions())
    assert model.task == "instruct-pix2pix"
    (entry,) = model.conditioning.concat
    assert (entry.source, entry.channels, entry.scaled, entry.posterior) == ("image_latent", 4, False, "mode")
    assert model.conditioning.image_guidance
    assert model.conditioning.unconditional == "empty_text"
    assert model.schedule["_class_name"] == "EulerAncestralDiscreteScheduler"
    assert (model.defaults.steps, model.defaults.guidance_scale) == (100, 7.5)
    parts = {component.spec.name: component for component in model.components}
    inputs = (torch.randn(2, 8, 8, 12), torch.tensor([3.0, 900.5]), torch.randn(2, 77, 24))
    assert torch.equal(parts["unet"].build()(*inputs), networks["unet_config"](*inputs))


@torch.no_grad()
def test_stable_diffusion_2_measures_what_it_predicts(tmp_path: Path) -> None:
    description = stable_diffusion(version=2)
    networks = compvis_models.networks(description, CLIP)
    network = networks["unet_config"]
    (tmp_path / "clip_text_config.json").write_text(json.dumps(compvis_models.CLIP_CONFIG))
    file = tmp_path / "model.ckpt"

    def load() -> Any:
        torch.save(compvis_models.state_dict(description, networks), file)
        return single_file.load(file, SourceOptions())

    model = load()
    # Random weights give an output that has nothing to do with the noise, as a velocity has at the last timestep.
    assert model.schedule["prediction_type"] == "v_prediction"
    assert model.defaults.height == 768
    parts = {component.spec.name: component for component in model.components}
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 77, 24))
    assert torch.equal(parts["unet"].build()(*inputs), network(*inputs))
    # A network whose last layer passes its input's first channels on predicts the noise.
    pass_noise_through(network)
    model = load()
    assert model.schedule["prediction_type"] == "epsilon"
    assert model.defaults.height == 512


def pass_noise_through(network: Any) -> None:
    """Make a U-Net return nearly its input: the first convolution's copy reaches the last block through its skip."""
    for parameter in network.parameters():
        parameter.zero_()
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.fill_(1.0)
            # SiLU is close to the identity far above zero; the offset is taken off at the end.
            module.bias.fill_(8.0)
    width = network.model_channels
    first, out = network.input_blocks[0][0], network.out[2]
    skip = network.output_blocks[-1][0].skip_connection
    for channel in range(width):
        first.weight[channel, channel % 4, 1, 1] = 1.0
        skip.weight[channel, skip.weight.shape[1] - width + channel, 0, 0] = 1.0
    for channel in range(4):
        # GroupNorm takes groups of two channels: what is left of a pair is its difference.
        out.weight[channel, channel::4, 1, 1] = 1.0
        out.bias[channel] = -8.0 * (width // 4)


def test_other_files_need_their_yaml(tmp_path: Path) -> None:
    model = compvis_models.DIFFUSION["unconditional-vq"]
    networks = compvis_models.networks(model)
    file = tmp_path / "model.ckpt"
    torch.save(compvis_models.state_dict(model, networks), file)
    with pytest.raises(UsageError, match="is not a Stable Diffusion checkpoint") as caught:
        single_file.load(file, SourceOptions())
    assert "--config" in str(caught.value.hint)
    assert caught.value.exit_code == 2


def test_an_incomplete_file(tmp_path: Path) -> None:
    file, _ = write(tmp_path, stable_diffusion())
    state = torch.load(file, weights_only=True)
    del state["model.diffusion_model.out.2.weight"]
    torch.save(state, file)
    with pytest.raises(LatentEdgeError, match=r"lacks the tensor 'out\.2\.weight'"):
        single_file.load(file, SourceOptions())
    assert open_checkpoint(file).path == file
