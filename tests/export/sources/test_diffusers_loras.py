"""LoRA files merged at export against diffusers' own fused pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from latentedge.export.model import SourceModel, SourceOptions
from latentedge.export.sources import diffusers as source
from latentedge.runtime.errors import LatentEdgeError
from tests.export.sources import diffusers_models

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.fixture(autouse=True)
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest transformers may ask for a peft that is not there yet; what is compared here runs with the present one."""
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)


def write_lora(kind: Any, pipeline: Any, folder: Path, texts: tuple[str, ...], seed: int = 5) -> Path:
    """A LoRA of rank 4 and alpha 8 for the UNet and the text encoders, as diffusers' trainers write it."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    metadata: dict[str, dict[str, Any]] = {}
    torch.manual_seed(seed)
    for name, targets in (("unet", UNET_TARGETS), *((text, TEXT_TARGETS) for text in texts)):
        model = getattr(pipeline, name)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        model.add_adapter(config, adapter_name="written")
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        state = peft.get_peft_model_state_dict(model, adapter_name="written")
        metadata[name] = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in model.peft_config["written"].to_dict().items()
        }
        layers[name] = {key: tensor.detach().clone() for key, tensor in state.items()}
    options = {f"{name}_lora_layers": state for name, state in layers.items()}
    options |= {f"{name}_lora_adapter_metadata": values for name, values in metadata.items()}
    kind.save_lora_weights(folder, weight_name="lora.safetensors", **options)
    return folder / "lora.safetensors"


def module_outputs(model: SourceModel, name: str, **inputs: Any) -> torch.Tensor:
    part = next(entry for entry in model.components if entry.spec.name == name)
    assert part.build is not None
    with torch.no_grad():
        found = part.build()(*(torch.as_tensor(inputs[spec.name]) for spec in part.spec.inputs))
    result: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return result


def kohya_named(path: Path) -> Path:
    """The same LoRA with the names and alphas that kohya's trainer writes."""
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(path).items():
        part, _, rest = key.partition(".")
        layer, _, matrix = rest.replace(".lora_linear_layer.", ".lora_").rpartition(".lora_")
        prefix = "lora_unet_" if part == "unet" else "lora_te_text_model_"
        name = prefix + layer.removeprefix("text_model.").replace(".", "_")
        direction = "down" if matrix.startswith(("A", "down")) else "up"
        renamed[f"{name}.lora_{direction}.weight"] = tensor
        renamed[f"{name}.alpha"] = torch.tensor(8.0)
    save_file(renamed, path)
    return path


@pytest.mark.parametrize(
    ("name", "texts", "kohya"),
    [
        ("sd", ("text_encoder",), False),
        ("sd", ("text_encoder",), True),
        ("sdxl", ("text_encoder", "text_encoder_2"), False),
    ],
)
def test_merged_as_diffusers_fuses_it(name: str, texts: tuple[str, ...], kohya: bool, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = tmp_path / "model"
    kind = type(diffusers_models.save(name, folder))
    lora = write_lora(kind, kind.from_pretrained(folder), tmp_path / "lora", texts)
    if kohya:
        kohya_named(lora)
    plain = source.load(folder, SourceOptions())
    merged = source.load(folder, SourceOptions(loras=((lora, 0.7),)))
    theirs = kind.from_pretrained(folder)
    theirs.load_lora_weights(lora)
    theirs.fuse_lora(lora_scale=0.7)

    width = theirs.unet.config.cross_attention_dim
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": np.float32([200]),
        "encoder_hidden_states": torch.randn(1, 77, width),
        "text_embeds": torch.randn(1, 24),
        "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]),
    }
    added = {key: inputs[key] for key in ("text_embeds", "time_ids")}
    with torch.no_grad():
        expected = theirs.unet(
            inputs["sample"], 200, encoder_hidden_states=inputs["encoder_hidden_states"], added_cond_kwargs=added
        ).sample
    found = module_outputs(merged, "unet", **inputs)
    change = (module_outputs(plain, "unet", **inputs) - found).abs().max()
    assert (found - expected).abs().max() < 1e-4 * change

    ids = theirs.tokenizer("the red cat", padding="max_length", return_tensors="pt").input_ids
    for text in texts:
        with torch.no_grad():
            states = getattr(theirs, text)(ids).last_hidden_state
        found = module_outputs(merged, text, input_ids=ids)
        change = (module_outputs(plain, text, input_ids=ids) - found).abs().max()
        assert (found - states).abs().max() < 1e-4 * change
    assert merged.source.notes == ("LoRA lora.safetensors merged with scale 0.7",)
    assert "lora.safetensors" in merged.source.files


def test_a_convolution_and_a_negative_weight(tmp_path: Path) -> None:
    """Against the product of the two factors itself: W + weight * alpha / rank * B A."""
    pipeline = diffusers_models.save("sd", tmp_path / "model")
    layers = dict(pipeline.unet.named_modules())
    names = ("down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.time_emb_proj", "mid_block.attentions.0.proj_in")
    state, expected = {}, {}
    torch.manual_seed(2)
    for name in names:
        weight = layers[name].weight
        down = torch.randn(3, *weight.shape[1:]) / 10
        up = torch.randn(weight.shape[0], 3, *([1] * (weight.ndim - 2))) / 10
        key = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        expected[name] = weight - 0.5 * 2.0 / 3 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    save_file(state, tmp_path / "kohya.safetensors")
    model = source.load(tmp_path / "model", SourceOptions(loras=((tmp_path / "kohya.safetensors", -0.5),)))
    assert not any("alphas" in message for message in model.messages)
    part = next(entry for entry in model.components if entry.spec.name == "unet")
    assert part.build is not None
    merged = dict(part.build().unet.named_modules())
    for name in names:
        found = getattr(merged[name], "downsampling", merged[name]).weight
        assert (found - layers[name].weight).abs().max() > 1e-2
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)


def test_layers_of_different_alphas_are_said(tmp_path: Path) -> None:
    """Attention layers are merged with the commonest alpha, as diffusers does it; others keep theirs."""
    kind = type(diffusers_models.save("sd", tmp_path / "model"))
    lora = kohya_named(write_lora(kind, kind.from_pretrained(tmp_path / "model"), tmp_path / "lora", ()))
    original = load_file(lora)
    for layer, said in (("to_q", True), ("conv1", False)):
        changed = next(name for name in original if name.endswith(f"{layer}.alpha"))
        save_file({**original, changed: torch.tensor(4.0)}, lora)
        model = source.load(tmp_path / "model", SourceOptions(loras=((lora, 1.0),)))
        assert any("1 layers have another alpha" in message for message in model.messages) == said
        part = next(entry for entry in model.components if entry.spec.name == "unet")
        assert part.build is not None
        theirs = kind.from_pretrained(tmp_path / "model", safety_checker=None)
        layers = dict(theirs.unet.named_modules())
        key = changed.removesuffix(".alpha")
        (name,) = [entry for entry in layers if f"lora_unet_{entry.replace('.', '_')}" == key]
        weight = layers[name].weight.detach().clone()
        up, down = original[f"{key}.lora_up.weight"], original[f"{key}.lora_down.weight"]
        alpha = 8.0 if said else 4.0
        expected = weight + alpha / 4 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        torch.testing.assert_close(dict(part.build().unet.named_modules())[name].weight, expected, rtol=1e-5, atol=1e-6)
        theirs.load_lora_weights(lora)
        theirs.fuse_lora()
        theirs.unload_lora_weights()
        fused = dict(theirs.unet.named_modules())[name].weight
        torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)


def test_two_loras_add_up(tmp_path: Path) -> None:
    kind = type(diffusers_models.save("sd", tmp_path / "model"))
    paths = [
        write_lora(kind, kind.from_pretrained(tmp_path / "model"), tmp_path / str(seed), (), seed) for seed in (1, 2)
    ]
    weights = []
    for loras in ((), ((paths[0], 1.0),), ((paths[1], 0.5),), ((paths[0], 1.0), (paths[1], 0.5))):
        model = source.load(tmp_path / "model", SourceOptions(loras=loras))
        part = next(entry for entry in model.components if entry.spec.name == "unet")
        assert part.build is not None
        state = part.build().state_dict()
        key = next(name for name in state if name.endswith("attn1.to_q.weight"))
        assert not any("lora" in name for name in state)
        weights.append(state[key])
    none, first, second, both = weights
    assert (first - none).abs().max() > 0.01
    torch.testing.assert_close(both - none, (first - none) + (second - none), rtol=1e-5, atol=1e-6)


def _wide_pipeline() -> Any:
    pipeline = diffusers_models.stable_diffusion()
    pipeline.register_modules(unet=diffusers_models.unet(cross_attention_dim=40))
    return pipeline


def test_loras_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = type(diffusers_models.save("sd", tmp_path / "sd"))
    diffusers_models.save("ldm-uncond", tmp_path / "ldm")
    lora = write_lora(kind, kind.from_pretrained(tmp_path / "sd"), tmp_path / "lora", ())

    def load(folder: str, path: Path) -> SourceModel:
        return source.load(tmp_path / folder, SourceOptions(loras=((path, 1.0),)))

    with pytest.raises(LatentEdgeError, match="no LoRA file"):
        load("sd", tmp_path / "missing.safetensors")
    wide = write_lora(StableDiffusionPipeline, _wide_pipeline(), tmp_path / "wide", ())
    part = next(entry for entry in load("sd", wide).components if entry.spec.name == "unet")
    assert part.build is not None
    capsys.readouterr()
    with pytest.raises(LatentEdgeError, match="does not fit the unet"):
        part.build()
    assert capsys.readouterr() == ("", ""), "the libraries' own words come before ours"
    with pytest.raises(LatentEdgeError, match="merges no LoRA"):
        load("ldm", lora)
    with pytest.raises(LatentEdgeError, match=r"no LoRA that diffusers reads|changes none of"):
        load("sd", tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors")
    lora.write_bytes(lora.read_bytes()[:200])
    with pytest.raises(LatentEdgeError, match="no LoRA that diffusers reads"):
        load("sd", lora)
