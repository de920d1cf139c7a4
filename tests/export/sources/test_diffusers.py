"""The source's modules against diffusers' own components, and what it says about damaged or unknown folders."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from diffusers import StableDiffusionPipeline

from latentedge.export.model import ComponentSource, SourceModel, SourceOptions
from latentedge.export.onnx_from_torch import onnx_from_torch
from latentedge.export.passes.cleanup import clean_up
from latentedge.export.passes.upsampling import convolve_before_doubling
from latentedge.export.sources import diffusers as source
from latentedge.export.sources import load_source
from latentedge.export.sources.diffusers_kinds import KINDS, Kind
from latentedge.export.targets import DEFAULT_TARGET, targets
from latentedge.runtime.bundle import Defaults
from latentedge.runtime.errors import LatentEdgeError, UsageError
from tests.export.sources import diffusers_models

OPTIONS = SourceOptions()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Saved pipelines by name, and diffusers' own objects."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("saved")
    names = ("sd", "sdxl", "lcm", "ldm-text2im", "ldm-uncond", "taesd", "ldm-superres")
    return {name: (root / name, diffusers_models.save(name, root / name)) for name in names}


@pytest.fixture
def copied(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> Path:
    """A copy of Stable Diffusion that a test may damage."""
    return Path(shutil.copytree(folders["sd"][0], tmp_path / "sd"))


def component(model: SourceModel, name: str) -> ComponentSource:
    return next(part for part in model.components if part.spec.name == name)


def outputs(part: ComponentSource, **inputs: Any) -> list[torch.Tensor]:
    assert part.build is not None
    module = part.build()
    with torch.no_grad():
        found = module(*(torch.as_tensor(inputs[spec.name]) for spec in part.spec.inputs))
    return list(found) if isinstance(found, tuple) else [found]


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Within ``tolerance`` of the largest value."""
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (7, 6)])
@pytest.mark.parametrize("timesteps", [(0.0, 999.0), (412.0, 3.0), (17.25, 500.5)])
def test_unet_at_any_size_and_timestep(
    folders: dict[str, tuple[Path, Any]], size: tuple[int, int], timesteps: tuple[float, float]
) -> None:
    folder, pipeline = folders["sd"]
    part = component(load_source(folder, OPTIONS), "unet")
    sample, hidden = torch.randn(2, 4, *size), torch.randn(2, 77, diffusers_models.WIDTH)
    (found,) = outputs(part, sample=sample, timestep=np.array(timesteps, np.float32), encoder_hidden_states=hidden)
    whole = all(value.is_integer() for value in timesteps)
    upstream = torch.tensor(timesteps, dtype=torch.int64 if whole else torch.float32)
    with torch.no_grad():
        expected = pipeline.unet(sample, upstream, encoder_hidden_states=hidden).sample
    assert near(found, expected)


def test_unet_with_three_halvings_at_an_odd_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {
        "block_out_channels": (32, 32, 32, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "sample_size": 16,
    }
    pipeline = diffusers_models.stable_diffusion()
    pipeline.register_modules(unet=diffusers_models.unet(**blocks))
    pipeline.save_pretrained(tmp_path)
    part = component(source.load(tmp_path, OPTIONS), "unet")
    sample, hidden = torch.randn(1, 4, 17, 21), torch.randn(1, 77, diffusers_models.WIDTH)
    (found,) = outputs(part, sample=sample, timestep=np.float32([321]), encoder_hidden_states=hidden)
    with torch.no_grad():
        expected = pipeline.unet(sample, 321, encoder_hidden_states=hidden).sample
    assert near(found, expected)


@pytest.mark.parametrize("name", ["sd", "ldm-uncond"])
def test_even_sizes_only(folders: dict[str, tuple[Path, Any]], name: str) -> None:
    """The same network, without the sizes of skip connections: all doublings are plain and convolved before."""
    folder, pipeline = folders[name]
    part = component(source.load(folder, SourceOptions(even_sizes=True)), "unet")
    multiple = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    for lengths in (part.trace_axes, *part.compare_axes):
        assert all(length % multiple == 0 for axis, length in lengths.items() if axis != "batch")
    assert {part.spec.axes[axis].multiple for axis in ("latent_height", "latent_width")} == {multiple}
    size = (4 * multiple, 3 * multiple)
    channels = pipeline.unet.config.in_channels
    inputs = {"sample": torch.randn(2, channels, *size), "timestep": np.float32([321, 7])}
    upstream = [inputs["sample"], torch.tensor([321, 7])]
    if name == "sd":
        inputs["encoder_hidden_states"] = torch.randn(2, 77, diffusers_models.WIDTH)
        upstream.append(inputs["encoder_hidden_states"])
    (found,) = outputs(part, **inputs)
    with torch.no_grad():
        assert near(found, pipeline.unet(*upstream).sample)
    assert part.build is not None
    traced = part.sample_inputs(part.trace_axes, np.random.default_rng(0))
    model = onnx_from_torch(part.build(), part.spec, traced, targets()[DEFAULT_TARGET])
    clean_up(model)
    doublings = sum(node.op_type == "Resize" for node in model.graph)
    assert convolve_before_doubling(model) == doublings == len(pipeline.unet.config.block_out_channels) - 1


def test_even_sizes_of_a_model_whose_own_size_is_odd(tmp_path: Path) -> None:
    pipeline = diffusers_models.stable_diffusion()
    pipeline.register_modules(unet=diffusers_models.unet(sample_size=9))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="9x9 cannot be halved"):
        source.load(tmp_path, SourceOptions(even_sizes=True))
    assert component(source.load(tmp_path, OPTIONS), "unet").spec.axes["latent_height"].opt == 9


@pytest.mark.parametrize("name", ["sd", "ldm-uncond", "taesd"])
def test_axes_that_are_compared(folders: dict[str, tuple[Path, Any]], name: str) -> None:
    """Odd sides are allowed, and every export is compared on them, on other heights and on other batches."""
    for part in source.load(folders[name][0], OPTIONS).components:
        every = (part.trace_axes, *part.compare_axes)
        for axis, limits in part.spec.axes.items():
            lengths = [axes[axis] for axes in every]
            assert len(set(lengths)) > 1
            assert all(limits.min <= length <= limits.max for length in lengths)
            assert limits.multiple == 1
        if "latent_height" in part.spec.axes:
            assert any(axes["latent_height"] % 2 and axes["latent_width"] % 2 for axes in every)


@pytest.mark.parametrize("name", ["ldm-uncond", "ldm-superres"])
def test_unconditional_unet(folders: dict[str, tuple[Path, Any]], name: str) -> None:
    folder, pipeline = folders[name]
    part = component(source.load(folder, OPTIONS), "unet")
    sample = torch.randn(2, pipeline.unet.config.in_channels, 12, 8)
    (found,) = outputs(part, sample=sample, timestep=np.float32([40, 900]))
    with torch.no_grad():
        expected = pipeline.unet(sample, torch.tensor([40, 900])).sample
    assert near(found, expected)


def test_unet_of_sdxl(folders: dict[str, tuple[Path, Any]]) -> None:
    folder, pipeline = folders["sdxl"]
    model = source.load(folder, OPTIONS)
    assert [spec.name for spec in component(model, "unet").spec.inputs][2:] == [
        "encoder_hidden_states",
        "text_embeds",
        "time_ids",
    ]
    sample, hidden = torch.randn(2, 4, 8, 10), torch.randn(2, 77, diffusers_models.WIDTH + 16)
    added = {"text_embeds": torch.randn(2, 24), "time_ids": torch.tensor([[16.0, 20, 0, 4, 16, 20]] * 2)}
    (found,) = outputs(
        component(model, "unet"), sample=sample, timestep=np.float32([9, 9]), encoder_hidden_states=hidden, **added
    )
    with torch.no_grad():
        expected = pipeline.unet(sample, 9, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
    assert near(found, expected)


def test_text_encoders_of_sdxl(folders: dict[str, tuple[Path, Any]]) -> None:
    folder, pipeline = folders["sdxl"]
    model = source.load(folder, OPTIONS)
    for name, tokenizer in (("text_encoder", pipeline.tokenizer), ("text_encoder_2", pipeline.tokenizer_2)):
        ids = tokenizer(
            ["the cat", "", "9 " * 100], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        part = component(model, name)
        found = dict(zip([spec.name for spec in part.spec.outputs], outputs(part, input_ids=ids), strict=True))
        with torch.no_grad():
            expected = getattr(pipeline, name)(ids, output_hidden_states=True)
        inner = len(expected.hidden_states) - 2
        assert near(found[f"hidden_states.{inner}"], expected.hidden_states[-2])
        assert near(found["last_hidden_state"], expected.last_hidden_state)
        if name == "text_encoder_2":
            assert near(found["text_embeds"], expected.text_embeds)
        else:
            assert near(found["pooler_output"], expected.pooler_output)
    encoders = model.conditioning.encoders
    assert [entry.output for entry in encoders] == ["hidden_states.2", "hidden_states.1"]
    assert [entry.pooled_output for entry in encoders] == [None, "text_embeds"]
    assert model.conditioning.unconditional == "zeros"


def test_ldm_text_encoder(folders: dict[str, tuple[Path, Any]]) -> None:
    folder, pipeline = folders["ldm-text2im"]
    ids = pipeline.tokenizer("red cat 9", padding="max_length", max_length=77, return_tensors="pt").input_ids
    (found,) = outputs(component(source.load(folder, OPTIONS), "text_encoder"), input_ids=ids)
    with torch.no_grad():
        assert near(found, pipeline.bert(ids)[0])


@pytest.mark.parametrize("name", ["sd", "taesd", "ldm-uncond", "ldm-superres"])
def test_first_stages(folders: dict[str, tuple[Path, Any]], name: str) -> None:
    folder, pipeline = folders[name]
    first_stage = getattr(pipeline, "vqvae", None) or pipeline.vae
    model = source.load(folder, OPTIONS)
    sample = torch.rand(2, 3, 16, 24) * 2 - 1
    latent = torch.randn(2, model.latent.channels, 8, 12)
    (encoded,) = outputs(component(model, "vae_encoder"), sample=sample)
    (decoded,) = outputs(component(model, "vae_decoder"), latent_sample=latent)
    with torch.no_grad():
        theirs = first_stage.encode(sample)
        assert near(decoded, first_stage.decode(latent).sample)
    if model.latent.encoding == "kl":
        mean, log_variance = encoded.chunk(2, dim=1)
        assert near(mean, theirs.latent_dist.mean)
        assert near(log_variance.clamp(-30, 20), theirs.latent_dist.logvar)
    else:
        assert near(encoded, theirs.latents)
    assert model.latent.encoding == {"sd": "kl", "taesd": "plain"}.get(name, "vq")


def test_statistics_by_channel_are_undone(folders: dict[str, tuple[Path, Any]]) -> None:
    folder, pipeline = folders["sdxl"]
    model, config = source.load(folder, OPTIONS), pipeline.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    sample = torch.rand(1, 3, 16, 16) * 2 - 1
    (moments,) = outputs(component(model, "vae_encoder"), sample=sample)
    with torch.no_grad():
        theirs = pipeline.vae.encode(sample).latent_dist
    found_mean, found_log_variance = moments.chunk(2, dim=1)
    assert near(found_mean, (theirs.mean - mean) / std)
    assert near((0.5 * found_log_variance).exp(), theirs.std / std)
    (decoded,) = outputs(component(model, "vae_decoder"), latent_sample=found_mean)
    with torch.no_grad():
        assert near(decoded, pipeline.vae.decode(theirs.mean).sample)


@pytest.mark.parametrize("count", [4, 5])
def test_time_ids_of_an_unknown_number_are_to_be_given(
    folders: dict[str, tuple[Path, Any]], tmp_path: Path, count: int
) -> None:
    """Six are SDXL's sizes, five its refiner's, which the pipeline fills in; of any other number it cannot."""
    folder = Path(shutil.copytree(folders["sdxl"][0], tmp_path / "refiner"))
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "projection_class_embeddings_input_dim": 24 + count * 8}))
    model = source.load(folder, OPTIONS)
    assert model.conditioning.time_ids == count
    assert any(f"{count} time ids" in message for message in model.messages) == (count == 4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.class_name)
def test_defaults_are_the_pipelines_own(kind: Kind) -> None:
    import diffusers

    call = inspect.signature(getattr(diffusers, kind.class_name).__call__).parameters
    own = {name: parameter.default for name, parameter in call.items()}
    assert kind.steps == own["num_inference_steps"]
    assert kind.guidance_scale == own.get("guidance_scale", 1.0)
    assert own.get("eta", 0.0) == Defaults(8, 8).eta
    assert own.get("image_guidance_scale", 1.5) == Defaults(8, 8).image_guidance_scale
    # Pipelines without a strength of their own start from pictures as the image-to-image pipeline does.
    assert kind.strength == own.get("strength", 0.8)


def test_default_sizes_are_the_unets(folders: dict[str, tuple[Path, Any]]) -> None:
    found = {name: source.load(folder, OPTIONS).defaults for name, (folder, _) in folders.items()}
    sizes = {name: (entry.height, entry.width) for name, entry in found.items()}
    assert sizes["sd"] == sizes["sdxl"] == sizes["ldm-uncond"] == (16, 16)
    assert sizes["ldm-text2im"] == (64, 64)


def test_a_turbo_model_is_known_by_its_name(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd"][0], tmp_path / "my-turbo")
    model = source.load(folder, OPTIONS)
    assert (model.defaults.steps, model.defaults.guidance_scale) == (1, 0.0)
    assert any("Turbo" in message for message in model.messages)


def test_the_schedule_is_the_one_that_the_pipeline_runs(copied: Path) -> None:
    file = copied / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "steps_offset": 0}))
    assert source.load(copied, OPTIONS).schedule["steps_offset"] == 1


def test_a_folder_of_one_first_stage(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    model = load_source(folders["sd"][0] / "vae", OPTIONS)
    assert model.task == "reconstruction"
    assert [part.spec.name for part in model.components] == ["vae_encoder", "vae_decoder"]
    with torch.no_grad():
        expected = folders["sd"][1].vae.decode(torch.ones(1, 4, 4, 4)).sample
    assert near(outputs(model.components[1], latent_sample=torch.ones(1, 4, 4, 4))[0], expected)


def test_half_precision_files_and_pickles_are_read(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    _, pipeline = folders["ldm-uncond"]
    pipeline.unet.save_pretrained(tmp_path / "half" / "unet", variant="fp16")
    pipeline.unet.save_pretrained(tmp_path / "pickle" / "unet", safe_serialization=False)
    for kind in ("half", "pickle"):
        folder = shutil.copytree(folders["ldm-uncond"][0], tmp_path / f"whole-{kind}")
        shutil.rmtree(folder / "unet")
        shutil.copytree(tmp_path / kind / "unet", folder / "unet")
        sample = torch.randn(1, 3, 8, 8)
        (found,) = outputs(component(source.load(folder, OPTIONS), "unet"), sample=sample, timestep=np.float32([7]))
        with torch.no_grad():
            assert near(found, pipeline.unet(sample, 7).sample)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_half_precision_copy_beside_a_pickle(part: str, copied: Path, folders: dict[str, tuple[Path, Any]]) -> None:
    """diffusers takes the plain pickle, transformers any safetensors: as the pipeline has it, in float32."""
    module = getattr(folders["sd"][1], part)
    for file in (copied / part).glob("*.safetensors"):
        file.unlink()
    name = "diffusion_pytorch_model" if part == "unet" else "pytorch_model"
    torch.save(module.state_dict(), copied / part / f"{name}.bin")
    copy.deepcopy(module).half().save_pretrained(copied / part, variant="fp16")
    theirs = getattr(StableDiffusionPipeline.from_pretrained(copied, safety_checker=None), part).float()
    model = source.load(copied, OPTIONS)
    assert (
        f"{part}/{'diffusion_pytorch_model.bin' if part == 'unet' else 'model.fp16.safetensors'}" in model.source.files
    )
    with torch.no_grad():
        if part == "unet":
            sample, hidden = torch.randn(1, 4, 8, 8), torch.randn(1, 77, diffusers_models.WIDTH)
            inputs = {"sample": sample, "timestep": np.float32([9]), "encoder_hidden_states": hidden}
            expected = theirs(sample, 9, encoder_hidden_states=hidden).sample
        else:
            inputs = {"input_ids": torch.arange(77)[None]}
            expected = theirs(inputs["input_ids"]).last_hidden_state
    assert near(outputs(component(model, part), **inputs)[0], expected)


def test_a_codebook_narrower_than_its_encoder(tmp_path: Path) -> None:
    model = diffusers_models.codebook(latent_channels=4, vq_embed_dim=3)
    model.save_pretrained(tmp_path)
    found = load_source(tmp_path, OPTIONS)
    assert found.latent.channels == 3
    latent = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        assert near(outputs(component(found, "vae_decoder"), latent_sample=latent)[0], model.decode(latent).sample)


def test_parts_of_a_file_beside_the_whole(copied: Path) -> None:
    whole = copied / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(whole, whole.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    files = source.load(copied, OPTIONS).source.files
    assert [name for name in files if name.startswith("unet/")] == ["unet/diffusion_pytorch_model.safetensors"]


def test_weights_in_parts(copied: Path, folders: dict[str, tuple[Path, Any]]) -> None:
    for variant in (None, "fp16"):
        for file in (copied / "unet").glob("*.safetensors"):
            file.unlink()
        folders["sd"][1].unet.save_pretrained(copied / "unet", max_shard_size="200KB", variant=variant)
        assert len(list((copied / "unet").glob("*.safetensors"))) > 2
        part = component(source.load(copied, OPTIONS), "unet")
        sample, hidden = torch.randn(1, 4, 8, 8), torch.randn(1, 77, diffusers_models.WIDTH)
        (found,) = outputs(part, sample=sample, timestep=np.float32([9]), encoder_hidden_states=hidden)
        with torch.no_grad():
            assert near(found, folders["sd"][1].unet(sample, 9, encoder_hidden_states=hidden).sample)


def test_the_source_names_its_files_and_licence(copied: Path) -> None:
    (copied / "README.md").write_text("---\nlicense: openrail\n---\n# A model\n")
    found = source.load(copied, OPTIONS).source
    assert found.licence == "openrail"
    assert set(found.files) == {
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert all(len(digest) == 64 for digest in found.files.values())


def test_truncated_weights(copied: Path) -> None:
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    part = component(source.load(copied, OPTIONS), "unet")
    assert part.build is not None
    with pytest.raises(LatentEdgeError, match="cannot be loaded"):
        part.build()


class _Harmful:
    """A pickle that would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    ("part", "name"), [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")]
)
def test_pickles_are_read_without_running_them(part: str, name: str, copied: Path, tmp_path: Path) -> None:
    for file in (copied / part).glob("*.safetensors"):
        file.unlink()
    for damage in ("harmful", "truncated"):
        torch.save({"weight": _Harmful(tmp_path / "ran")}, copied / part / name)
        if damage == "truncated":
            (copied / part / name).write_bytes((copied / part / name).read_bytes()[:40])
        read = component(source.load(copied, OPTIONS), part)
        assert read.build is not None
        with pytest.raises(LatentEdgeError, match="cannot be loaded") as caught:
            read.build()
        assert "\n" not in caught.value.message
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture(copied: Path) -> None:
    file = copied / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "transformer_layers_per_block": 2}))
    part = component(source.load(copied, OPTIONS), "unet")
    assert part.build is not None
    with pytest.raises(LatentEdgeError, match=r"do not fit .* \d+ missing keys: .*, \.\.\.") as caught:
        part.build()
    assert caught.value.message.count(",") < 15
    file.write_text(json.dumps({**config, "conv_in_kernel": 1}))
    part = component(source.load(copied, OPTIONS), "unet")
    assert part.build is not None
    with pytest.raises(LatentEdgeError, match=r"do not fit .* expected shape") as caught:
        part.build()
    assert "ignore_mismatched_sizes" not in caught.value.message


@pytest.mark.parametrize(
    "damage",
    [{"block_out_channels": None}, {"block_out_channels": 32}, {"down_block_types": ["NoBlock", "DownBlock2D"]}],
)
def test_a_configuration_that_describes_no_network(damage: dict[str, Any], copied: Path) -> None:
    """Refused when it is read or when the network is built, in our words."""
    file = copied / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    with pytest.raises(LatentEdgeError) as caught:
        component(source.load(copied, OPTIONS), "unet").build()  # type: ignore[misc]
    assert str(copied) in caught.value.message


def test_missing_parts(copied: Path) -> None:
    shutil.rmtree(copied / "tokenizer")
    model = source.load(copied, OPTIONS)
    assert model.tokenizers == {}
    assert model.conditioning.encoders[0].tokenizer is None
    assert any("--tokenizer" in message for message in model.messages)
    (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(LatentEdgeError, match="holds no weights"):
        source.load(copied, OPTIONS)


def test_a_tokenizer_of_another_model(copied: Path) -> None:
    options = SourceOptions(tokenizer=str(copied / "other"))
    vocabulary = {**diffusers_models.clip_vocabulary()[0], "unheard": 600, "of": 601}
    (copied / "other").mkdir()
    (copied / "other" / "vocab.json").write_text(json.dumps(vocabulary))
    (copied / "other" / "merges.txt").write_text("#version: 0.2\na t</w>\n")
    with pytest.raises(LatentEdgeError, match="numbers its tokens up to 601"):
        source.load(copied, options)


def test_a_tokenizer_without_a_vocabulary(copied: Path) -> None:
    """transformers would make an empty one of the settings."""
    (copied / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(LatentEdgeError, match="holds no clip tokenizer"):
        source.load(copied, OPTIONS)


@pytest.mark.parametrize(
    ("part", "taken"),
    [("unet", ["diffusion_pytorch_model.bin"]), ("text_encoder", ["diffusion_pytorch_model.fp16.safetensors"])],
)
def test_what_is_downloaded_of_several_sets_of_weights(part: str, taken: list[str]) -> None:
    names = ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"]
    assert source._weight_files([f"{part}/{name}" for name in names]) == [f"{part}/{name}" for name in taken]
    names += ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"]
    found = source._weight_files([f"{part}/{name}" for name in names])
    if part == "unet":
        assert found == ["unet/diffusion_pytorch_model.safetensors"]


def test_the_list_of_weights_in_parts_is_downloaded(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    for variant in (None, "fp16"):
        folders["sd"][1].unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB", variant=variant)
    lists = [f"unet/{path.name}" for path in (tmp_path / "unet").glob("*.index*.json")]
    assert len(lists) == 2
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in source.HUB_FILES) for name in lists)


def test_channels_that_do_not_fit_the_class(copied: Path) -> None:
    file = copied / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 9}))
    with pytest.raises(LatentEdgeError, match="takes 5 channels beside its latent"):
        source.load(copied, OPTIONS)


def test_inpainting_without_mask_channels_replaces_latents(copied: Path) -> None:
    file = copied / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "StableDiffusionInpaintPipeline"}))
    model = source.load(copied, OPTIONS)
    assert model.task == "inpainting"
    assert model.conditioning.concat == ()


def test_an_unknown_pipeline(copied: Path) -> None:
    (copied / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(LatentEdgeError, match="FluxPipeline"):
        source.load(copied, OPTIONS)
    (copied / "model_index.json").write_text("{}")
    with pytest.raises(LatentEdgeError, match="names no pipeline class"):
        source.load(copied, OPTIONS)
    (copied / "model_index.json").write_text("{")
    with pytest.raises(LatentEdgeError, match="damaged"):
        source.load(copied, OPTIONS)


def test_which_paths_match(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = folders["sd"][0]
    assert source.matches(str(folder), OPTIONS)
    assert source.matches(folder / "vae", OPTIONS)
    assert source.matches(folder / "unet", OPTIONS)
    with pytest.raises(UsageError, match="a UNet2DConditionModel alone"):
        source.load(folder / "unet", OPTIONS)
    assert not source.matches(folder / "text_encoder", OPTIONS)
    assert source.matches("some-user/some-model", OPTIONS)
    assert not source.matches("folder/model.safetensors", OPTIONS)
    assert not source.matches(tmp_path, OPTIONS)
    graphs = Path(shutil.copytree(folder, tmp_path / "graphs"))
    (graphs / "unet" / "model.onnx").touch()
    assert source.matches(graphs, OPTIONS), "its weights are what can be compared with"
    exported = tmp_path / "exported"
    (exported / "unet").mkdir(parents=True)
    (exported / "model_index.json").write_text("{}")
    (exported / "unet" / "model.onnx").touch()
    assert not source.matches(exported, OPTIONS)
    with pytest.raises(UsageError, match="--config"):
        source.load(folder, SourceOptions(config=tmp_path / "x.yaml"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub that nothing answers for, and the empty folder that is its cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_without_network(no_network: Path) -> None:
    with pytest.raises(LatentEdgeError, match="not in the hub's local cache, and could not be downloaded") as caught:
        source.load("some-user/some-model", OPTIONS)
    assert caught.value.hint is not None
    assert "\n" not in str(caught.value.message)


def test_a_hub_id_in_the_cache(no_network: Path, folders: dict[str, tuple[Path, Any]]) -> None:
    """The layout that huggingface_hub keeps: a name for a commit, and the commit's files."""
    repository = no_network / "models--some-user--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    shutil.copytree(folders["sd"][0], repository / "snapshots" / "0123abcd")
    model = load_source("some-user/some-model", OPTIONS)
    assert model.task == "text-to-image"
    assert {part.spec.name for part in model.components} == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert "taken from the hub's local cache" in model.messages[0]
    assert outputs(component(model, "text_encoder"), input_ids=torch.ones(1, 77, dtype=torch.int64))
