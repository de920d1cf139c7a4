"""Every family of the zoo is understood from checkpoint and YAML, with the weights that the original samples with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")


from latentedge.export.model import SourceModel, SourceOptions  # noqa: E402
from latentedge.export.models.clip_text import ClipTextConfig  # noqa: E402
from latentedge.export.sources import compvis  # noqa: E402
from latentedge.export.sources.compvis_config import read_config  # noqa: E402
from latentedge.runtime import samplers  # noqa: E402
from latentedge.runtime.bundle import ConcatInput, Layout  # noqa: E402
from latentedge.runtime.errors import LatentEdgeError, UsageError  # noqa: E402
from tests.export.sources import compvis_models  # noqa: E402

CLIP = ClipTextConfig.from_mapping(compvis_models.CLIP_CONFIG)
TASKS = {
    "unconditional-vq": "unconditional",
    "unconditional-kl": "unconditional",
    "class": "class-to-image",
    "class-null": "class-to-image",
    "class-in-unet": "class-to-image",
    "text-bert": "text-to-image",
    "layout": "layout-to-image",
    "semantic": "semantic-to-image",
    "super-resolution": "super-resolution",
    "inpainting": "inpainting",
    "inpainting-text": "inpainting",
    "retrieval": "embeddings-to-image",
    "stable-diffusion": "text-to-image",
}


class Written:
    """A tiny model on disk: its networks, its checkpoint folder, and what the source made of it."""

    def __init__(self, folder: Path, model: dict[str, Any], **others: Any) -> None:
        self.model = copy.deepcopy(model)
        self.networks = compvis_models.networks(self.model, CLIP)
        self.state = compvis_models.state_dict(self.model, self.networks)
        self.folder = folder
        self.others = others
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "clip_text_config.json").write_text(json.dumps(compvis_models.CLIP_CONFIG))

    def load(self, **options: Any) -> SourceModel:
        compvis_models.write(self.folder, self.model, self.state, **self.others)
        chosen = SourceOptions(**options)
        assert compvis.matches(self.folder, chosen)
        return compvis.load(self.folder, chosen)


def components(model: SourceModel) -> dict[str, Any]:
    return {component.spec.name: component for component in model.components}


def run(component: Any, axes: dict[str, int]) -> tuple[dict[str, Any], Any]:
    """Inputs and output of a built component on its own sample inputs."""
    arrays = component.sample_inputs(axes, np.random.default_rng(3))
    inputs = {spec.name: torch.from_numpy(arrays[spec.name]) for spec in component.spec.inputs}
    for spec in component.spec.inputs:
        assert arrays[spec.name].dtype == np.dtype(spec.dtype)
        assert arrays[spec.name].shape == spec.resolve(axes)
    with torch.no_grad():
        output = component.build()(*inputs.values())
    assert tuple(output.shape) == component.spec.outputs[0].resolve(axes)
    return inputs, output


REFERENCES: dict[str, Any] = {
    "unet": lambda nets, inputs: nets["unet_config"](
        inputs["sample"], inputs["timestep"], inputs.get("encoder_hidden_states"), inputs.get("class_labels")
    ),
    "text_encoder": lambda nets, inputs: nets["cond_stage_config"](inputs["input_ids"]),
    "cond_encoder": lambda nets, inputs: nets["cond_stage_config"](*inputs.values()),
}


def first_stage_reference(network: Any, name: str, inputs: dict[str, Any]) -> Any:
    if name == "vae_encoder":
        return network.encoded(inputs["sample"])
    latent = inputs["latent_sample"]
    if hasattr(network, "quantize"):
        # Distances one by one, as their definition has them.
        book = network.quantize.embedding.weight
        distances = (latent.permute(0, 2, 3, 1)[..., None, :] - book).square().sum(-1)
        latent = book[distances.argmin(-1)].permute(0, 3, 1, 2)
    return network.decoder(network.post_quant_conv(latent))


@pytest.mark.parametrize("family", compvis_models.DIFFUSION)
def test_family(family: str, tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION[family])
    model = written.load()
    assert model.task == TASKS[family]
    assert model.source.layout == "compvis"
    assert list(model.source.files) == ["model.ckpt"]
    parts = components(model)
    assert {"unet", "vae_encoder", "vae_decoder"} <= set(parts)
    for name, component in parts.items():
        for axes in (component.trace_axes, component.compare_axes[0]):
            inputs, found = run(component, axes)
            with torch.no_grad():
                if name in REFERENCES:
                    expected = REFERENCES[name](written.networks, inputs)
                else:
                    expected = first_stage_reference(written.networks["first_stage_config"], name, inputs)
            assert float(found.std()) > 1e-2
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("name", compvis_models.FIRST_STAGES)
def test_first_stage_alone(name: str, tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.FIRST_STAGES[name])
    model = written.load()
    assert model.task == "reconstruction"
    assert model.schedule == {}
    assert model.latent.downscale == int(name.split("-")[1].removeprefix("f"))
    assert model.latent.encoding == name[:2]
    assert set(components(model)) == {"vae_encoder", "vae_decoder"}
    for component in model.components:
        inputs, found = run(component, component.compare_axes[0])
        with torch.no_grad():
            expected = first_stage_reference(written.networks[""], component.spec.name, inputs)
        assert torch.equal(found, expected)


def test_codeword_inputs_quantise_to_their_own_codeword(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-vq"])
    decoder = components(written.load())["vae_decoder"]
    latents = decoder.sample_inputs({"batch": 2, "latent_height": 16, "latent_width": 16}, np.random.default_rng(0))
    vectors = np.moveaxis(latents["latent_sample"], 1, -1).astype(np.float64)
    book = written.networks["first_stage_config"].quantize.embedding.weight.double().numpy()
    distances = np.sort(np.linalg.norm(vectors[..., None, :] - book, axis=-1), axis=-1)
    assert (distances[..., 1] > 2 * distances[..., 0]).all()
    assert distances[..., 0].max() > 0.01


def test_conditioning_of_each_family(tmp_path: Path) -> None:
    def conditioning(family: str) -> Any:
        return Written(tmp_path / family, compvis_models.DIFFUSION[family]).load().conditioning

    assert conditioning("unconditional-vq").cross_attention == "none"
    plain, null = conditioning("class"), conditioning("class-null")
    assert (plain.classes, plain.null_class, plain.unconditional) == (1000, None, "none")
    assert (null.classes, null.null_class, null.unconditional) == (1001, 1000, "null_class")
    assert conditioning("text-bert").unconditional == "empty_text"
    assert conditioning("layout").layout == Layout(92, 30, 8192, 8191, crop=True)
    semantic = conditioning("semantic")
    assert (semantic.labels, semantic.concat) == (7, (ConcatInput("segmentation", 3),))
    small = conditioning("super-resolution")
    assert (small.upscale, small.concat) == (4, (ConcatInput("low_resolution_image", 3),))
    masked, mask = conditioning("inpainting").concat
    assert (masked.source, masked.channels, masked.scaled, masked.hole_value) == ("masked_image_latent", 3, False, -1.0)
    assert (mask.source, mask.channels, mask.mask_values) == ("mask", 1, (-1.0, 1.0))
    retrieval = conditioning("retrieval")
    assert (retrieval.cross_attention, retrieval.embedding_width, retrieval.unconditional) == (
        "embeddings",
        16,
        "zeros",
    )


def test_inpainting_of_stable_diffusion(tmp_path: Path) -> None:
    model = compvis_models.ldm(
        compvis_models.kl(),
        compvis_models.unet(9, 4, 24),
        compvis_models.encoder("FrozenCLIPEmbedder"),
        4,
        scale_factor=0.18215,
        finetune_keys=None,
    )
    model["target"] = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    read = Written(tmp_path, model).load()
    mask, masked = read.conditioning.concat
    assert read.task == "inpainting"
    assert read.defaults.guidance_scale == 7.5
    assert (mask.source, mask.mask_values) == ("mask", (0.0, 1.0))
    assert (masked.source, masked.scaled, masked.posterior, masked.hole_value) == (
        "masked_image_latent",
        True,
        "sample",
        0.0,
    )


def unet_weight(model: SourceModel) -> Any:
    return components(model)["unet"].build().input_blocks[0][0].weight


def test_averaged_weights_are_the_model(tmp_path: Path) -> None:
    raw, averaged = "model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight"
    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-vq"])
    model = written.load()
    assert torch.equal(unet_weight(model), written.state[averaged])
    assert any("use_ema is true by default" in message for message in model.messages)
    written.model["params"]["use_ema"] = False
    model = written.load()
    assert torch.equal(unet_weight(model), written.state[raw])
    assert any("average in the file is not used" in message for message in model.messages)


def test_counters_alone_are_no_average(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-vq"])
    complete = dict(written.state)
    written.state = {name: value for name, value in complete.items() if not name.startswith("model_ema.diff")}
    assert "model_ema.decay" in written.state
    model = written.load()
    assert torch.equal(unet_weight(model), complete["model.diffusion_model.input_blocks.0.0.weight"])
    assert any("no averaged U-Net weights" in message for message in model.messages)
    del complete["model_ema.diffusion_modelinput_blocks00weight"]
    written.state = complete
    with pytest.raises(LatentEdgeError, match=r"incomplete: 1 of \d+ are missing"):
        written.load()


def test_scale_factor(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-kl"])
    assert written.load().latent.scale_factor == pytest.approx(0.37)
    written.model["params"]["scale_by_std"] = False
    model = written.load()
    assert model.latent.scale_factor == 1.0
    assert any("scale_by_std is false" in message for message in model.messages)
    written.model["params"]["scale_by_std"] = True
    del written.state["scale_factor"]
    assert any("no scale_factor" in message for message in written.load().messages)


def test_schedule(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-vq"])
    schedule = written.load().schedule
    assert schedule["dialect"] == "compvis"
    assert schedule["beta_schedule"] == "scaled_linear"
    assert (schedule["beta_start"], schedule["beta_end"]) == (0.0015, 0.0195)
    assert schedule["prediction_type"] == "epsilon"
    written.model["params"] |= {"parameterization": "v", "beta_schedule": "sqrt_linear"}
    model = written.load()
    assert model.schedule["prediction_type"] == "v_prediction"
    assert any("the checkpoint's is used" in message for message in model.messages)
    stored = np.cumprod(1 - np.float64(model.schedule["trained_betas"]))  # type: ignore[arg-type]
    np.testing.assert_allclose(stored, written.state["alphas_cumprod"].numpy(), rtol=1e-6)
    del written.state["alphas_cumprod"]
    schedule = written.load().schedule
    assert (schedule["beta_schedule"], schedule["beta_start"]) == ("linear", 0.0015)
    written.model["params"] |= {"parameterization": "x0", "beta_schedule": "cosine"}
    schedule = written.load().schedule
    assert schedule["prediction_type"] == "sample"
    # Nichol and Dhariwal (arXiv:2102.09672), equation 17.
    steps = np.arange(1001) / 1000
    alphas = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = np.minimum(1 - alphas[1:] / alphas[:-1], 0.999)
    np.testing.assert_allclose(schedule["trained_betas"], expected, rtol=1e-5)  # type: ignore[arg-type]
    written.model["params"]["parameterization"] = "score"
    with pytest.raises(UsageError, match="'score' is unknown"):
        written.load()


def all_tables(betas: Any) -> dict[str, Any]:
    """Every table of the schedule that a checkpoint holds, float32, from Ho et al. 2020 (arXiv:2006.11239)."""
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    tables = {
        "betas": betas,
        "alphas_cumprod": bar,
        "sqrt_recip_alphas_cumprod": bar**-0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1) ** 0.5,
        "posterior_mean_coef1": betas * before**0.5 / (1 - bar),
        "posterior_mean_coef2": (1 - before) * (1 - betas) ** 0.5 / (1 - bar),
        "posterior_log_variance_clipped": np.log(np.maximum(betas * (1 - before) / (1 - bar), 1e-20)),
    }
    return {name: torch.from_numpy(table).float() for name, table in tables.items()}


def rounded(written: Written, dtype: Any) -> Written:
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    written.state |= all_tables(betas)
    written.state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in written.state.items()
    }
    return written


def plan(schedule: Any, sampler: str, steps: int = 1000) -> Any:
    return samplers.prepare(schedule, sampler, steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_schedule_rounded_to_half_is_sampled_with(dtype: Any, tmp_path: Path) -> None:
    written = rounded(Written(tmp_path, compvis_models.DIFFUSION["unconditional-vq"]), dtype)
    model = written.load()
    assert unet_weight(model).dtype == torch.float32
    message = next(text for text in model.messages if "rounded to" in text)
    assert str(dtype).removeprefix("torch.") in message
    for sampler in ("ddim", "plms", "ddpm"):
        found = plan(model.schedule, sampler, 500)
        assert np.array_equal(found.alphas_cumprod, written.state["alphas_cumprod"].float().numpy()), sampler
    ancestral = plan(model.schedule, "ddpm").tables
    for name in all_tables(np.full(1, 0.5)).keys() & ancestral.keys():
        assert np.array_equal(ancestral[name], written.state[name].float().numpy()), name
    # What the message names gives the YAML's formula back.
    assert '{**pipeline.bundle.schedule, "trained_betas": None}' in message
    exact = {**model.schedule, "trained_betas": None}
    expected = all_tables(np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    for name in expected.keys() & ancestral.keys():
        np.testing.assert_allclose(plan(exact, "ddpm").tables[name], expected[name], rtol=1e-6)
    np.testing.assert_allclose(plan(exact, "ddim", 500).alphas_cumprod, expected["alphas_cumprod"], rtol=1e-6)


def test_a_schedule_rounded_until_it_begins_without_noise(tmp_path: Path) -> None:
    model = copy.deepcopy(compvis_models.DIFFUSION["unconditional-vq"])
    model["params"] |= {"linear_start": 0.00085, "linear_end": 0.012}
    written = Written(tmp_path, model)
    written.state["alphas_cumprod"] = written.state["alphas_cumprod"].bfloat16()
    assert written.state["alphas_cumprod"][1] == 1
    read = written.load()
    assert "trained_betas" not in read.schedule
    assert any("rounded to bfloat16" in message and "formula is used" in message for message in read.messages)


def test_a_schedule_that_ends_without_signal(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-vq"])
    angles = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    table = np.cumprod(np.clip(1 - (1 - angles[1:] / angles[:-1]), 0.001, 1)).astype(np.float16)
    table[:5] = np.float16([0.9995, 0.999, 0.9985, 0.998, 0.998])  # rounded alone, it would begin without noise
    table = np.minimum.accumulate(table)
    assert table[-1] == 0 < table[-2]
    written.state["alphas_cumprod"] = torch.from_numpy(table)
    schedule = written.load().schedule
    for sampler in ("ddim", "ddpm"):
        assert np.array_equal(plan(schedule, sampler, 500).alphas_cumprod, table.astype(np.float32))


@pytest.mark.parametrize(
    ("index", "value", "reason"),
    [(5, float("nan"), "1 of its 1000 numbers"), (0, 1.5, "from 0.00014"), (400, 0.99, "rises at timestep 400")],
)
def test_a_damaged_schedule(index: int, value: float, reason: str, tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-vq"])
    written.state["alphas_cumprod"][index] = value
    with pytest.raises(LatentEdgeError, match=reason) as caught:
        written.load()
    assert caught.value.hint


def test_the_variance_that_the_yaml_chooses(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-vq"])
    written.model["params"]["v_posterior"] = 1.0
    schedule = written.load().schedule
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    found = plan(schedule, "ddpm").tables["posterior_log_variance_clipped"]
    np.testing.assert_allclose(found, np.log(betas), rtol=1e-6)
    found = plan({**schedule, "trained_betas": None}, "ddpm").tables["posterior_log_variance_clipped"]
    assert np.abs(found - np.log(betas)).max() > 0.1


def test_defaults_that_bite_are_named(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["semantic"])
    for name in ("linear_start", "linear_end", "concat_mode"):
        del written.model["params"][name]
    messages = " ".join(written.load().messages)
    for expected in ("linear_start is not", "linear_end is not", "scale_factor is not", "concat_mode is not"):
        assert expected in messages
    classes = " ".join(Written(tmp_path / "class", compvis_models.DIFFUSION["class"]).load().messages)
    assert "n_classes is not in the YAML and is 1000 by default" in classes


def test_defaults_of_the_yaml(tmp_path: Path) -> None:
    extras = {"defaults": {"steps": 12, "guidance_scale": 4, "sampler": "plms", "height": 96}}
    written = Written(tmp_path, compvis_models.DIFFUSION["text-bert"], latentedge=extras, data={"ignored": True})
    defaults = written.load().defaults
    assert (defaults.steps, defaults.guidance_scale, defaults.sampler) == (12, 4.0, "plms")
    assert (defaults.height, defaults.width) == (96, 64)
    for wrong in ({"defaults": {"stpes": 3}}, {"defaults": {"steps": "many"}}, {"surprise": 1}, "text"):
        written.others["latentedge"] = wrong
        with pytest.raises(UsageError, match="latentedge"):
            written.load()


def test_null_class_of_the_yaml(tmp_path: Path) -> None:
    model = copy.deepcopy(compvis_models.DIFFUSION["class"])
    model["params"]["cond_stage_config"]["params"]["n_classes"] = 12
    written = Written(tmp_path, model)
    read = written.load()
    assert read.conditioning.null_class == 11
    assert read.defaults.guidance_scale == 1.0
    assert any("the last of 12" in message for message in read.messages)
    written.others["latentedge"] = {"null_class": None}
    assert written.load().conditioning.unconditional == "none"
    written.others["latentedge"] = {"null_class": 12}
    with pytest.raises(UsageError, match="from 0 to 11"):
        written.load()


def test_clip_keys_without_text_model(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["stable-diffusion"])
    _, expected = run(components(written.load())["text_encoder"], {"batch": 2})
    written.state = {
        name.replace("transformer.text_model.", "transformer."): value
        for name, value in written.state.items()
        if not name.endswith("position_ids")
    }
    assert "cond_stage_model.transformer.final_layer_norm.weight" in written.state
    _, found = run(components(written.load())["text_encoder"], {"batch": 2})
    assert torch.equal(found, expected)


def test_clip_of_another_size_must_be_described(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["stable-diffusion"])
    (tmp_path / "clip_text_config.json").unlink()
    with pytest.raises(LatentEdgeError, match="do not fit"):
        written.load()


def test_a_yaml_of_another_model(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["text-bert"])
    written.model["params"]["unet_config"]["params"]["channel_mult"] = [1, 2, 2]
    with pytest.raises(LatentEdgeError) as caught:
        written.load()
    assert caught.value.exit_code == 1
    assert "missing: model.diffusion_model." in caught.value.message
    assert caught.value.hint is not None
    written.model["params"]["unet_config"]["params"]["channel_mult"] = [1, 1]
    with pytest.raises(LatentEdgeError, match=r"of another shape: .*expected \[32"):
        written.load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown_option": 3}, "does not know unknown_option"),
        ({"conditioning_key": "adm"}, "lacks a label embedding, and conditioning_key is adm"),
        ({"conditioning_key": "cross"}, "'cross' is not supported"),
        ({"cond_stage_forward": "get_last_layer"}, "'get_last_layer' is not supported"),
        ({"timesteps": 500}, "500 timesteps, the checkpoint's schedule 1000"),
        ({"unet_config": {"params": {}}}, "unet_config has no target"),
        ({"linear_start": "small"}, "linear_start must be of type float"),
        ({"use_ema": "yes please"}, "use_ema must be true or false"),
    ],
)
def test_wrong_parameters(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["text-bert"])
    written.model["params"] |= change
    with pytest.raises(LatentEdgeError, match=message):
        written.load()


@pytest.mark.parametrize(
    ("heads", "found"), [({"num_head_channels": 7}, "heads of 7"), ({"num_heads": 5}, "5 attention")]
)
def test_heads_that_do_not_divide_the_channels(heads: dict[str, int], found: str, tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-kl"])
    written.model["params"]["unet_config"]["params"] |= heads
    with pytest.raises(UsageError, match=found):
        written.load()


def test_codewords_in_use_are_not_read(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-vq"])
    written.model["params"]["first_stage_config"]["params"]["remap"] = "codewords.npy"
    written.state["first_stage_model.quantize.used"] = torch.arange(16)
    assert written.load().task == "unconditional"


def test_wrong_network_parameters(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["text-bert"])
    network = written.model["params"]["unet_config"]["params"]
    network["num_haeds"] = 8
    with pytest.raises(UsageError, match="does not know the parameter num_haeds"):
        written.load()
    del network["num_haeds"]
    network["use_checkpoint"] = True
    assert written.load().task == "text-to-image"
    del network["model_channels"]
    with pytest.raises(UsageError, match="model_channels"):
        written.load()
    network["model_channels"] = 30
    with pytest.raises(UsageError, match="divisible"):
        written.load()
    network["model_channels"] = 32
    stage = written.model["params"]["first_stage_config"]["params"]["ddconfig"]
    del stage["z_channels"]
    with pytest.raises(UsageError, match="'z_channels' is missing"):
        written.load()
    stage["z_channels"] = 4
    written.model["params"]["unet_config"]["target"] = "os.system"
    with pytest.raises(UsageError, match=r"no network is known for the target 'os\.system'"):
        written.load()


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["text-bert"])
    compvis_models.write(tmp_path, written.model, written.state)
    text = (tmp_path / "config.yaml").read_text().replace("linear_start: 0.0015", "linear_start: 15e-4")
    (tmp_path / "config.yaml").write_text(text.replace("dropout: 0.0", "dropout: 1e-1"))
    assert compvis.load(tmp_path, SourceOptions()).schedule["beta_start"] == 0.0015
    ddconfig = read_config(tmp_path / "config.yaml").first_stage.params["ddconfig"]
    assert ddconfig["dropout"] == 0.1
    values = "a: '1e-4', b: -2E+3, c: 1.5e-2, d: .5e1, e: e5, f: 10, g: 1e-4"
    (tmp_path / "numbers.yaml").write_text(f"model: {{target: ldm.models.autoencoder.VQModel, params: {{{values}}}}}")
    read = read_config(tmp_path / "numbers.yaml").first_stage.params
    assert read == {"a": "1e-4", "b": -2000.0, "c": 0.015, "d": 5.0, "e": "e5", "f": 10, "g": 0.0001}


def test_files_of_a_folder(tmp_path: Path) -> None:
    written = Written(tmp_path, compvis_models.DIFFUSION["text-bert"])
    written.load()
    checkpoint, config = tmp_path / "model.ckpt", tmp_path / "config.yaml"
    assert not compvis.matches(checkpoint, SourceOptions())
    chosen = SourceOptions(config=config)
    assert compvis.matches(checkpoint, chosen)
    assert compvis.load(checkpoint, chosen).task == "text-to-image"
    (tmp_path / "other.ckpt").write_bytes(checkpoint.read_bytes())
    with pytest.raises(UsageError, match=r"exactly one checkpoint .*found model\.ckpt, other\.ckpt"):
        compvis.load(tmp_path, SourceOptions())
    (tmp_path / "other.ckpt").unlink()
    (tmp_path / "second.yaml").write_text("model: {}")
    with pytest.raises(UsageError, match="exactly one YAML"):
        compvis.load(tmp_path, SourceOptions())
    with pytest.raises(LatentEdgeError, match="has no target"):
        compvis.load(tmp_path, SourceOptions(config=tmp_path / "second.yaml"))
    (tmp_path / "second.yaml").write_text("model: [")
    with pytest.raises(LatentEdgeError, match="is no YAML file"):
        compvis.load(tmp_path, SourceOptions(config=tmp_path / "second.yaml"))
    with pytest.raises(UsageError, match="there is no YAML"):
        compvis.load(tmp_path, SourceOptions(config=tmp_path / "absent.yaml"))


def test_safetensors_give_the_same_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    written = Written(tmp_path, compvis_models.DIFFUSION["unconditional-vq"])
    expected = unet_weight(written.load())
    (tmp_path / "model.ckpt").unlink()
    save_file({name: value.contiguous() for name, value in written.state.items()}, tmp_path / "model.safetensors")
    model = compvis.load(tmp_path, SourceOptions())
    assert list(model.source.files) == ["model.safetensors"]
    assert torch.equal(unet_weight(model), expected)
