"""Folders of ONNX graphs, as optimum writes them: brought to the contract, written as a bundle, drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.model import SourceOptions
from latentedge.export.sources import load_source
from latentedge.export.sources import onnx as source
from latentedge.export.sources.onnx_contract import read_graph
from latentedge.runtime import Pipeline
from latentedge.runtime.errors import LatentEdgeError, UsageError

OPTIONS = SourceOptions()
WIDTH, TOKENS = 8, 77
UNET = """
<ir_version: 8, opset_import: ["" : 17]>
unet (DTYPE["b", 4, "h", "w"] sample, TIMESTEP timestep, DTYPE["b", "tokens", 8] encoder_hidden_states)
    => (DTYPE["b", 4, "h", "w"] out_sample)
<int64[4] spread = {-1, 1, 1, 1}>
{
    t = Cast <to = CODE> (timestep)
    t4 = Reshape (t, spread)
    scaled = Mul (t4, small)
    mean = ReduceMean <axes = [1, 2], keepdims = 1> (encoder_hidden_states)
    mean4 = Reshape (mean, spread)
    start = Mul (sample, tenth)
    timed = Add (start, scaled)
    out_sample = Add (timed, mean4)
}
"""
DECODER = """
<ir_version: 8, opset_import: ["" : 17]>
decoder (DTYPE["b", 4, "h", "w"] latent_sample) => (DTYPE["b", 3, "H", "W"] sample)
<float[4] scales = {1.0, 1.0, 2.0, 2.0}, int64[1] zero = {0}, int64[1] three = {3}, int64[1] one = {1}, float[0] roi = {}>
{
    rgb = Slice (latent_sample, zero, three, one)
    wide = Resize <mode = "nearest"> (rgb, roi, scales)
    sample = Tanh (wide)
}
"""
ENCODER = """
<ir_version: 8, opset_import: ["" : 17]>
encoder (float["b", 3, "H", "W"] sample) => (float["b", CHANNELS, "h", "w"] NAME)
{
    NAME = Conv <strides = [2, 2]> (sample, weight)
}
"""
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
text (INTEGER["b", "tokens"] input_ids)
    => (float["b", "tokens", 8] last_hidden_state, float["b", 8] pooler_output, float["b", "tokens", 8] "hidden_states.0")
<int64[1] first = {0}>
{
    "hidden_states.0" = Gather (table, input_ids)
    last_hidden_state = Tanh ("hidden_states.0")
    row = Gather <axis = 1> (last_hidden_state, first)
    pooler_output = ReduceMean <axes = [1], keepdims = 0> (row)
}
"""


def write(path: Path, text: str, **arrays: Any) -> None:
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    for value in model.graph.input:  # the text form has no way to write a scalar
        value.type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_unet(
    path: Path, timestep: str = 'int64["t"]', dtype: str = "float", hidden: str = "encoder_hidden_states"
) -> None:
    code, kind = ("10", np.float16) if dtype == "float16" else ("1", np.float32)
    text = UNET.replace("DTYPE", dtype).replace("TIMESTEP", timestep).replace("CODE", code)
    text = text.replace("encoder_hidden_states", hidden)
    write(path, text, tenth=np.array([0.1], kind), small=np.array([0.001], kind))


def exported(
    folder: Path, timestep: str = 'int64["t"]', integer: str = "int64", encoder: str = "latent_parameters"
) -> Path:
    """A folder as optimum writes one, with graphs of a few nodes."""
    random = np.random.default_rng(0)
    channels = 8 if encoder == "latent_parameters" else 4
    write_unet(folder / "unet" / "model.onnx", timestep)
    write(folder / "vae_decoder" / "model.onnx", DECODER.replace("DTYPE", "float"))
    weight = random.normal(size=(channels, 3, 2, 2)).astype(np.float32)
    text = ENCODER.replace("CHANNELS", str(channels)).replace("NAME", encoder)
    write(folder / "vae_encoder" / "model.onnx", text, weight=weight)
    table = random.normal(size=(40, WIDTH)).astype(np.float32)
    write(folder / "text_encoder" / "model.onnx", TEXT.replace("INTEGER", integer), table=table)
    unet = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "block_out_channels": [8, 8],
            "cross_attention_dim": WIDTH, "_class_name": "UNet2DConditionModel"}  # fmt: skip
    stage = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [8, 8],
             "scaling_factor": 0.5, "_class_name": "AutoencoderKL"}  # fmt: skip
    text_config = {"architectures": ["CLIPTextModel"], "hidden_size": WIDTH, "max_position_embeddings": TOKENS,
                   "vocab_size": 40, "num_hidden_layers": 1}  # fmt: skip
    write_json(folder / "unet" / "config.json", unet)
    write_json(folder / "vae_decoder" / "config.json", stage)
    write_json(folder / "vae_encoder" / "config.json", stage)
    write_json(folder / "text_encoder" / "config.json", text_config)
    schedule = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
    write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    write_json(folder / "model_index.json", {"_class_name": "ORTStableDiffusionPipeline"})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return exported(tmp_path / "model")


def adapted(file: Path, name: str, model_folder: Path) -> onnxruntime.InferenceSession:
    """The graph of component ``name`` as the exporter would write it."""
    component = next(part for part in load_source(model_folder, OPTIONS).components if part.spec.name == name)
    model = ir.load(file)
    assert component.adapt is not None
    component.adapt(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [value.name for value in proto.graph.input] == [spec.name for spec in component.spec.inputs]
    assert [value.name for value in proto.graph.output] == [spec.name for spec in component.spec.outputs]
    return onnxruntime.InferenceSession(proto.SerializeToString())


def test_it_is_told_from_a_torch_folder(folder: Path) -> None:
    model = load_source(folder, OPTIONS)
    assert model.source.layout == "onnx"
    assert {part.spec.name for part in model.components} == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert all(part.build is None for part in model.components)
    assert not source.matches(folder / "unet", OPTIONS)
    assert any("--tokenizer" in message for message in model.messages)
    assert any("whole timesteps" in message for message in model.messages)


@pytest.mark.parametrize(
    ("timestep", "takes_all"),
    [('int64["t"]', True), ("int64[1]", False), ("int64[]", False), ('float["t"]', True), ("float[]", False)],
)
def test_every_kind_of_timestep(tmp_path: Path, timestep: str, takes_all: bool) -> None:
    folder = exported(tmp_path / "model", timestep)
    session = adapted(folder / "unet" / "model.onnx", "unet", folder)
    assert session.get_inputs()[1].type == "tensor(float)"
    random = np.random.default_rng(1)
    sample = random.normal(size=(2, 4, 6, 4)).astype(np.float32)
    hidden = random.normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
    times = np.array([500.4, 20.0], np.float32)
    (found,) = session.run(None, {"sample": sample, "timestep": times, "encoder_hidden_states": hidden})
    used = np.rint(times) if timestep.startswith("int") else times
    used = used if takes_all else np.repeat(used[:1], 2)
    expected = 0.1 * sample + 0.001 * used[:, None, None, None] + hidden.mean((1, 2))[:, None, None, None]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    messages = " ".join(load_source(folder, OPTIONS).messages)
    assert ("one timestep for a whole batch" in messages) == (not takes_all)


def test_ids_of_32_bits(tmp_path: Path) -> None:
    folder = exported(tmp_path / "model", integer="int32")
    session = adapted(folder / "text_encoder" / "model.onnx", "text_encoder", folder)
    ids = np.arange(TOKENS, dtype=np.int64)[None] % 40
    hidden, pooled = session.run(None, {"input_ids": ids})
    original = onnxruntime.InferenceSession(str(folder / "text_encoder" / "model.onnx"))
    states = original.run(None, {"input_ids": ids.astype(np.int32)})
    np.testing.assert_array_equal(hidden, states[0])
    np.testing.assert_array_equal(pooled, states[1])


def test_half_precision_graphs_keep_their_precision(folder: Path) -> None:
    write_unet(folder / "unet" / "model.onnx", dtype="float16")
    component = next(part for part in load_source(folder, OPTIONS).components if part.spec.name == "unet")
    assert list(component.onnx_files) == ["fp16"]
    session = adapted(folder / "unet" / "model.onnx", "unet", folder)
    assert {value.type for value in session.get_inputs()} == {"tensor(float)"}
    assert session.get_outputs()[0].type == "tensor(float)"
    zeros = np.zeros((1, TOKENS, WIDTH), np.float32)
    feed = {"sample": np.ones((1, 4, 2, 2), np.float32), "timestep": np.float32([1]), "encoder_hidden_states": zeros}
    np.testing.assert_allclose(session.run(None, feed)[0], 0.101, atol=1e-3)


def test_an_encoder_that_gives_the_latent_itself(tmp_path: Path) -> None:
    model = load_source(exported(tmp_path / "model", encoder="latent_sample"), OPTIONS)
    assert model.latent.encoding == "plain"
    spec = next(part.spec for part in model.components if part.spec.name == "vae_encoder")
    assert spec.outputs[0].shape == ("batch", 4, "latent_height", "latent_width")


def test_a_bundle_that_draws(folder: Path, tmp_path: Path) -> None:
    bundle = export_source(load_source(folder, OPTIONS), tmp_path / "out.bundle", ExportOptions())
    component = bundle.component("unet")
    assert component.parity == {"note": "reference not available"}
    with Pipeline.open(tmp_path / "out.bundle", backend="onnxruntime", precision="fp32") as pipe:
        ids = np.ones((1, TOKENS), np.int64)
        latents = np.random.default_rng(2).normal(size=(1, 4, 8, 8)).astype(np.float32)
        options = {"prompt_ids": ids, "latents": latents, "guidance_scale": 1.0, "steps": 2}
        result = pipe.generate(**options)
        assert result.array.shape == (1, 16, 16, 3)
        expected = np.tanh(result.latents[:, :3].repeat(2, 2).repeat(2, 3) / 0.5).transpose(0, 2, 3, 1) / 2 + 0.5
        np.testing.assert_allclose(result.array, expected, atol=1e-5)
        out = pipe.engine("unet").run(
            {
                "sample": latents,
                "timestep": np.float32([3]),
                "encoder_hidden_states": np.zeros((1, TOKENS, WIDTH), np.float32),
            }
        )
        np.testing.assert_allclose(out["out_sample"], 0.1 * latents + 0.003, atol=1e-6)


def _cut(folder: Path) -> None:
    file = folder / "unet" / "model.onnx"
    file.write_bytes(file.read_bytes()[:100])


def _rename_input(folder: Path) -> None:
    write_unet(folder / "unet" / "model.onnx", hidden="states")


def _other_width(folder: Path) -> None:
    file = folder / "unet" / "config.json"
    write_json(file, {**json.loads(file.read_text()), "cross_attention_dim": 9})


def _fixed_size(folder: Path) -> None:
    write(
        folder / "vae_decoder" / "model.onnx",
        DECODER.replace("DTYPE", "float").replace('"b", 4, "h", "w"', "1, 4, 8, 8"),
    )


def _drawing(folder: Path) -> None:
    text = ENCODER.replace("CHANNELS", "4").replace("NAME", "latent_sample")
    text = text.replace("latent_sample = Conv <strides = [2, 2]> (sample, weight)",
                        "z = Conv <strides = [2, 2]> (sample, weight)\n noise = RandomNormalLike (z)\n"
                        "latent_sample = Add (z, noise)")  # fmt: skip
    write(folder / "vae_encoder" / "model.onnx", text, weight=np.ones((4, 3, 2, 2), np.float32))


def _without_decoder(folder: Path) -> None:
    (folder / "vae_decoder" / "model.onnx").unlink()


def _unknown(folder: Path) -> None:
    write_json(folder / "model_index.json", {"_class_name": "ORTFluxPipeline"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "no ONNX graph"),
        (_rename_input, "takes the inputs sample, timestep, states"),
        (_other_width, "takes texts of the width 9; text_encoder give 8"),
        (_fixed_size, r"latent_sample is FLOAT \[1, 4, 8, 8\]"),
        (_drawing, "draws its own noise"),
        (_without_decoder, "vae_decoder/model.onnx is missing"),
        (_unknown, "ORTFluxPipeline"),
    ],
)
def test_folders_that_do_not_meet_the_contract(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(LatentEdgeError, match=message):
        load_source(folder, OPTIONS)


def test_missing_weights_and_options_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "text_encoder" / "model.onnx")
    onnx.save(
        model,
        folder / "text_encoder" / "model.onnx",
        save_as_external_data=True,
        location="weights.pb",
        size_threshold=0,
    )
    assert {path.name for path in read_graph(folder / "text_encoder" / "model.onnx").files} == {
        "model.onnx",
        "weights.pb",
    }
    (folder / "text_encoder" / "weights.pb").unlink()
    with pytest.raises(LatentEdgeError, match=r"weights\.pb, which is missing"):
        load_source(folder, OPTIONS)
    with pytest.raises(UsageError, match="LoRA"):
        source.load(folder, SourceOptions(loras=((tmp_path / "x.safetensors", 1.0),)))
    with pytest.raises(UsageError, match="even-sizes"):
        source.load(folder, SourceOptions(even_sizes=True))


def test_without_an_encoder_only_text_is_left(folder: Path) -> None:
    (folder / "vae_encoder" / "model.onnx").unlink()
    model = load_source(folder, OPTIONS)
    assert "vae_encoder" not in {part.spec.name for part in model.components}
    assert any("no vae_encoder" in message for message in model.messages)
