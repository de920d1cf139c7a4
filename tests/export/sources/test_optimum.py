"""A folder file for file as optimum-onnx 0.1 exports Stable Diffusion, and the bundle from it as other tools read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.model import SourceOptions
from latentedge.export.sources import load_source
from latentedge.runtime import Pipeline
from tests.export.sources.test_onnx import DECODER, ENCODER, TEXT, TOKENS, UNET, WIDTH, write, write_json

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
#: What `optimum-cli export onnx --task text-to-image` wrote for a small Stable Diffusion, beside the graphs.
FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.onnx",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/model.onnx",
    "vae_decoder/config.json",
    "vae_decoder/model.onnx",
    "vae_encoder/config.json",
    "vae_encoder/model.onnx",
]
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.2",
    "_name_or_path": "somewhere/sd",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULE = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.35.2", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
}  # fmt: skip
STAGE = {
    "_class_name": "AutoencoderKL", "_name_or_path": "somewhere/sd/vae", "block_out_channels": [8, 8], "in_channels": 3,
    "out_channels": 3, "latent_channels": 4, "latents_mean": None, "latents_std": None, "sample_size": 16,
    "scaling_factor": 0.5, "shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True,
}  # fmt: skip


def write_tokenizer(folder: Path) -> int:
    """CLIP's slow tokenizer as transformers 4 saves it: four files, none of them ``tokenizer.json``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in MERGES), BEGIN, END]
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n")
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": END}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json", {**special, "model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"}
    )
    return len(tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names, dtypes, ranks and axes of inputs and outputs are optimum's; the arithmetic inside is a few nodes."""
    folder, random = tmp_path_factory.mktemp("optimum") / "sd", np.random.default_rng(0)
    words = write_tokenizer(folder / "tokenizer")
    sides = ('"b", 4, "h", "w"', '"batch_size", 4, "height", "width"')
    unet = UNET.replace("DTYPE", "float").replace("TIMESTEP timestep", "float[] timestep").replace("CODE", "1")
    unet = unet.replace(*sides).replace('"b", "tokens", 8', '"batch_size", "sequence_length", 8')
    write(folder / "unet" / "model.onnx", unet, tenth=np.float32([0.1]), small=np.float32([0.001]))
    decoder = DECODER.replace("DTYPE", "float").replace(
        '"b", 4, "h", "w"', '"batch_size", 4, "latent_height", "latent_width"'
    )
    decoder = decoder.replace('"b", 3, "H", "W"', '"batch_size", 3, "latent_height * 2", "latent_width * 2"')
    write(folder / "vae_decoder" / "model.onnx", decoder)
    encoder = ENCODER.replace("CHANNELS", "8").replace("NAME", "latent_parameters")
    encoder = encoder.replace('"b", 3, "H", "W"', '"batch_size", 3, "sample_height", "sample_width"')
    encoder = encoder.replace('"b", 8, "h", "w"', '"batch_size", 8, "sample_height / 2", "sample_width / 2"')
    write(folder / "vae_encoder" / "model.onnx", encoder, weight=random.normal(size=(8, 3, 2, 2)).astype(np.float32))
    text = TEXT.replace("INTEGER", "int64").replace('"b", "tokens"', '"batch_size", "sequence_length"')
    text = text.replace(', float["batch_size", "sequence_length", 8] "hidden_states.0")', ")").replace(
        '"b", 8', '"batch_size", 8'
    )
    text = text.replace('"hidden_states.0"', "embedded")
    table = random.normal(size=(words, WIDTH)).astype(np.float32)
    write(folder / "text_encoder" / "model.onnx", text, table=table)
    write_json(folder / "unet" / "config.json", {
        "_class_name": "UNet2DConditionModel", "_name_or_path": "somewhere/sd/unet", "addition_embed_type": None,
        "block_out_channels": [8, 8], "cross_attention_dim": WIDTH, "in_channels": 4, "out_channels": 4,
        "sample_size": 8, "time_cond_proj_dim": None,
    })  # fmt: skip
    write_json(folder / "text_encoder" / "config.json", {
        "architectures": ["CLIPTextModel"], "bos_token_id": words - 2, "eos_token_id": words - 1,
        "export_model_type": "clip-text", "hidden_size": WIDTH, "max_position_embeddings": TOKENS,
        "model_type": "clip_text_model", "num_hidden_layers": 1, "pad_token_id": 1, "projection_dim": 4,
        "vocab_size": words,
    })  # fmt: skip
    for name in ("vae_encoder", "vae_decoder"):
        write_json(folder / name / "config.json", STAGE)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULE)
    write_json(folder / "model_index.json", INDEX)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "sd.bundle"
    export_source(load_source(folder, SourceOptions()), path, ExportOptions())
    return path


def test_the_fixture_is_the_folder(folder: Path) -> None:
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == sorted(FILES)


def test_it_is_drawn_from_a_prompt(bundle: Path, folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    words = [vocabulary[token] for token in (BEGIN, "red</w>", "cat</w>")]
    ids = np.array([words + [vocabulary[END]] * (TOKENS - len(words))])
    latents = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
    with Pipeline.open(bundle, backend="onnxruntime", precision="fp32") as pipe:
        options = {"negative_prompt": "", "guidance_scale": 3.0, "steps": 3, "latents": latents}
        drawn = pipe.generate("Red  cat", **options)
        same = pipe.generate(prompt_ids=ids, **options)
        hidden = pipe.engine("text_encoder").run({"input_ids": ids})["last_hidden_state"]
        sample = np.concatenate([latents, 2 * latents])
        out = pipe.engine("unet").run(
            {"sample": sample, "timestep": np.float32([7, 7]), "encoder_hidden_states": hidden.repeat(2, 0)}
        )["out_sample"]
    np.testing.assert_array_equal(drawn.latents, same.latents)
    np.testing.assert_allclose(out, 0.1 * sample + 0.007 + hidden.mean(), atol=1e-5)


def test_other_tools_find_what_they_read(bundle: Path) -> None:
    """optimum's pipelines read a configuration beside each graph, and the classes of tokenizer and schedule."""
    for name in ("unet", "vae_decoder", "vae_encoder", "text_encoder"):
        config = json.loads((bundle / name / "config.json").read_text())
        assert "_name_or_path" not in config
        assert (bundle / name / "model.onnx").is_file()
    assert json.loads((bundle / "unet" / "config.json").read_text())["time_cond_proj_dim"] is None
    assert json.loads((bundle / "vae_decoder" / "config.json").read_text())["scaling_factor"] == 0.5
    assert json.loads((bundle / "text_encoder" / "config.json").read_text())["num_hidden_layers"] == 1
    index = json.loads((bundle / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizerFast"]
    assert json.loads((bundle / "tokenizer" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "CLIPTokenizerFast", "model_max_length": TOKENS, "pad_token": END,
    }  # fmt: skip
    schedule = json.loads((bundle / "scheduler" / "scheduler_config.json").read_text())
    assert schedule == SCHEDULE, "a field of our own would be a warning there"


def test_transformers_reads_the_tokenizer(bundle: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle / "tokenizer")
    with Pipeline.open(bundle, backend="onnxruntime", precision="fp32") as pipe:
        golden = pipe.bundle.tokenizers["tokenizer"].golden
    assert len(golden) > 3
    for prompt, ids in golden.items():
        found = tokenizer(prompt, padding="max_length", max_length=TOKENS, truncation=True).input_ids
        assert tuple(found) == ids


def test_a_bundle_is_a_source_again(bundle: Path) -> None:
    assert {part.spec.name for part in load_source(bundle, SourceOptions()).components} == {
        "text_encoder", "unet", "vae_encoder", "vae_decoder",
    }  # fmt: skip


def test_optimum_opens_the_bundle(bundle: Path) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime")
    torch = pytest.importorskip("torch")
    theirs = optimum.ORTDiffusionPipeline.from_pretrained(bundle)
    latents = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
    expected = theirs("red cat", num_inference_steps=3, guidance_scale=3.0, latents=torch.from_numpy(latents),
                      output_type="np").images  # fmt: skip
    with Pipeline.open(bundle, backend="onnxruntime", precision="fp32") as pipe:
        found = pipe.generate("red cat", steps=3, guidance_scale=3.0, latents=latents).array
    np.testing.assert_allclose(found, expected, atol=1e-4)
