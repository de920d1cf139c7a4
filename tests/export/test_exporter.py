"""The whole way from torch modules to a proven bundle, and every way in which it must refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import onnx
import torch
from torch import Tensor, nn

from latentedge.export import onnx_files
from latentedge.export.errors import ExportError
from latentedge.export.exporter import REFERENCE_MISSING, ExportOptions, export_source
from latentedge.export.model import TokenizerSource
from latentedge.runtime.bundle import MANIFEST_NAME, Bundle
from latentedge.runtime.engines import EngineOptions, open_engine
from latentedge.runtime.errors import ParityError, UsageError
from latentedge.runtime.verify import verify_bundle
from tests.export.tiny import DECODER, UNET, TinyDecoder, TinyDenoiser, component, seeded, tiny_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("export") / "tiny.bundle"
    return export_source(tiny_model(), output, ExportOptions(("fp32", "fp16")))


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_graphs_compute_what_torch_computes_on_sizes_that_were_not_traced(bundle: Bundle) -> None:
    module = seeded(TinyDenoiser)().eval()
    generator = np.random.default_rng(3)
    for batch, height, width in ((1, 4, 10), (3, 22, 6)):
        sample = generator.standard_normal((batch, 4, height, width)).astype(np.float32)
        timestep = generator.uniform(0, 999, batch).astype(np.float32)
        context = generator.standard_normal((batch, 7, 16)).astype(np.float32)
        with torch.no_grad():
            expected = module(*map(torch.from_numpy, (sample, timestep, context))).numpy()
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": context}
        for precision, tolerance in (("fp32", 1e-5), ("fp16", 5e-3)):
            with open_engine(bundle, "unet", "onnxruntime", precision, EngineOptions()) as engine:
                found = engine.run(inputs)["out_sample"]
            assert np.abs(expected).max() > 0.5
            assert np.abs(found - expected).max() < tolerance


def test_manifest_holds_numbers_and_floors(bundle: Bundle) -> None:
    for name in ("unet", "vae_decoder"):
        found = bundle.component(name)
        assert found.parity["fp32"]["psnr_db"] > found.parity["fp32"]["floor_psnr_db"] == 80.0
        assert found.parity["fp16"]["psnr_db"] > found.parity["fp16"]["floor_psnr_db"] == 45.0
        report = json.loads((bundle.path / "reports" / "parity" / f"{name}.json").read_text())
        assert report["variants"]["fp32"][0]["outputs"].keys() == {spec.name for spec in found.outputs}
    assert bundle.component("unet").parity["fp32"]["cases"] == 5


def test_fp16_graph_is_fp16_with_fp32_angles_and_ends(bundle: Bundle) -> None:
    path, variant = bundle.variant("unet", "fp16")
    graph = onnx.load(path).graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    half = {array.name for array in graph.initializer if array.data_type == onnx.TensorProto.FLOAT16}
    assert {"conv_in.weight_fp16", "to_q.weight_fp16", "time.weight_fp16"} <= half
    kept = variant.measured[1]
    assert kept["kind"] == "float32_nodes"
    assert {name.rpartition("/")[2] for name in kept["reasons"]} == {"Cos", "Sin", "Mul", "Unsqueeze"}
    # A timestep of 999.5 is not a float16: the graph must not round it.
    inputs = {
        "sample": np.zeros((1, 4, 4, 4), np.float32),
        "timestep": np.array([999.5], np.float32),
        "encoder_hidden_states": np.zeros((1, 7, 16), np.float32),
    }
    outputs = []
    for precision in ("fp32", "fp16"):
        with open_engine(bundle, "unet", "onnxruntime", precision, EngineOptions()) as engine:
            outputs.append(engine.run(inputs)["out_sample"])
    assert np.abs(outputs[0] - outputs[1]).max() < 2e-3


def test_graph_names_follow_the_modules(bundle: Bundle) -> None:
    graph = onnx.load(bundle.variant("unet", "fp32")[0]).graph
    names = {node.name for node in graph.node}
    assert {"conv_in/Conv", "to_k/MatMul", "norm/LayerNormalization"} <= names
    assert len(names) == len(graph.node)
    assert not {"Identity", "GroupNormalization"} & {node.op_type for node in graph.node}
    assert not any(node.metadata_props or node.doc_string for node in graph.node)


def test_declared_axes_are_on_the_graph(bundle: Bundle) -> None:
    graph = onnx.load(bundle.variant("vae_decoder", "fp32")[0]).graph
    sides = [dimension.dim_param or dimension.dim_value for dimension in graph.output[0].type.tensor_type.shape.dim]
    assert sides == ["batch", 3, "2*latent_height", "2*latent_width"]


def test_preview_map_is_close_to_the_decoder(bundle: Bundle) -> None:
    preview = bundle.manifest.latent.preview
    assert preview is not None
    assert len(preview) == 5


def test_verify_passes_and_finds_one_flipped_byte(bundle: Bundle) -> None:
    assert verify_bundle(bundle.path, "onnxruntime").ok
    path, _ = bundle.variant("vae_decoder", "fp32")
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    try:
        report = verify_bundle(bundle.path, "onnxruntime")
    finally:
        path.write_bytes(original)
    assert [check.subject for check in report.checks if check.status == "FAILED"] == ["vae_decoder/model.onnx"]


def test_a_flipped_byte_of_any_file_is_found(bundle: Bundle) -> None:
    files = [path for path in sorted(bundle.path.rglob("*")) if path.is_file() and path.name != MANIFEST_NAME]
    assert {path.suffix for path in files} == {".json", ".npz", ".onnx"}
    for path in files:
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 3] ^= 4
        path.write_bytes(damaged)
        try:
            checks = verify_bundle(bundle.path, "onnxruntime").checks
        finally:
            path.write_bytes(original)
        subject = path.relative_to(bundle.path).as_posix()
        assert subject in [check.subject for check in checks if check.status == "FAILED"]


def test_precision_that_only_fp16_leaves_no_fp32_graph(tmp_path: Path) -> None:
    model = tiny_model(component(DECODER, TinyDecoder))
    bundle = export_source(model, tmp_path / "half.bundle", ExportOptions(("fp16",)))
    assert list(bundle.component("vae_decoder").variants) == ["fp16"]
    assert [path.name for path in (bundle.path / "vae_decoder").iterdir()] == ["model.fp16.onnx"]
    assert verify_bundle(bundle.path, "onnxruntime").ok


def test_external_weights_in_both_precisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "EXTERNAL_DATA_LIMIT", 1000)
    model = tiny_model(component(DECODER, TinyDecoder))
    bundle = export_source(model, tmp_path / "large.bundle", ExportOptions(("fp32", "fp16")))
    files = ["model.fp16.onnx", "model.fp16.onnx.data", "model.onnx", "model.onnx.data"]
    assert left_behind(bundle.path / "vae_decoder") == files
    report = verify_bundle(bundle.path, "onnxruntime")
    assert report.ok
    assert {"vae_decoder/model.onnx.data", "vae_decoder/model.fp16.onnx.data"} <= {c.subject for c in report.checks}


class DependsOnMode(nn.Module):
    """Adds noise that tracing freezes: the graph cannot reproduce it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, latent_sample: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.interpolate(latent_sample[:, :3], scale_factor=2.0) * (1.0 + 0.01 * self.calls)


def test_parity_below_the_floor_fails_and_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_model(component(DECODER, DependsOnMode))
    with pytest.raises(ParityError, match=r"vae_decoder in fp32 .* sample has \d+\.\d dB PSNR .* floor is 80 dB"):
        export_source(model, tmp_path / "wrong.bundle", ExportOptions())
    assert left_behind(tmp_path) == []


class GivesNan(nn.Module):
    def forward(self, latent_sample: Tensor) -> Tensor:
        return nn.functional.interpolate(torch.log(latent_sample[:, :3]), scale_factor=2.0)


def test_an_original_that_gives_nan_proves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="the original itself gives"):
        export_source(tiny_model(component(DECODER, GivesNan)), tmp_path / "nan.bundle", ExportOptions())
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("no weights"), KeyboardInterrupt(), MemoryError()])
def test_a_failing_second_component_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def build() -> nn.Module:
        raise error

    failing = dataclasses.replace(component(UNET, TinyDenoiser), build=build)
    model = tiny_model(component(DECODER, TinyDecoder), failing)
    with pytest.raises(type(error)):
        export_source(model, tmp_path / "half.bundle", ExportOptions())
    assert left_behind(tmp_path) == []


def test_a_failed_overwrite_keeps_the_old_bundle(tmp_path: Path) -> None:
    output = tmp_path / "tiny.bundle"
    export_source(tiny_model(component(DECODER, TinyDecoder)), output, ExportOptions())
    digest = Bundle.open(output).digest()
    with pytest.raises(UsageError, match="exists"):
        export_source(tiny_model(component(DECODER, TinyDecoder)), output, ExportOptions())
    with pytest.raises(ParityError):
        export_source(tiny_model(component(DECODER, DependsOnMode)), output, ExportOptions(overwrite=True))
    assert Bundle.open(output).digest() == digest
    other = tiny_model(component(DECODER, TinyDecoder), family="other")
    assert export_source(other, output, ExportOptions(overwrite=True)).manifest.family == "other"
    assert left_behind(tmp_path) == ["tiny.bundle"]


def test_overwrite_spares_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a bundle"):
        export_source(tiny_model(), tmp_path, ExportOptions(overwrite=True))
    assert left_behind(tmp_path) == ["precious.txt"]


class FixedBatch(nn.Module):
    def forward(self, latent_sample: Tensor) -> Tensor:
        return nn.functional.interpolate(latent_sample.reshape(2, 4, 8, 12)[:, :3], scale_factor=2.0)


def test_a_network_that_takes_one_size_only_is_refused(tmp_path: Path) -> None:
    source = component(DECODER, FixedBatch)
    fixed = dataclasses.replace(source, compare_axes=({"batch": 2, "latent_height": 8, "latent_width": 12},))
    with pytest.raises(ExportError, match="compared with one length only"):
        export_source(tiny_model(fixed), tmp_path / "fixed.bundle", ExportOptions())
    with pytest.raises(ExportError, match=r"the original fails with .*'batch': 1"):
        export_source(tiny_model(source), tmp_path / "fixed.bundle", ExportOptions())
    assert left_behind(tmp_path) == []


def test_declared_shapes_are_compared_with_the_network(tmp_path: Path) -> None:
    output = dataclasses.replace(DECODER.outputs[0], shape=("batch", 3, "4*latent_height", "4*latent_width"))
    wrong = component(dataclasses.replace(DECODER, outputs=(output,)), TinyDecoder)
    with pytest.raises(ExportError, match=r"declared float32 \[2, 3, 32, 48\].*gives float32 \[2, 3, 16, 24\]"):
        export_source(tiny_model(wrong), tmp_path / "wrong.bundle", ExportOptions())


def test_int8_is_refused_with_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8") as caught:
        export_source(tiny_model(), tmp_path / "x.bundle", ExportOptions(("fp32", "int8")))
    assert "calibrate" in str(caught.value)


def test_onnx_sources_get_a_manifest_and_a_note(tmp_path: Path, bundle: Bundle) -> None:
    files = {"fp32": bundle.variant("vae_decoder", "fp32")[0]}
    source = dataclasses.replace(component(DECODER, TinyDecoder), build=None, onnx_files=files)
    copied = export_source(tiny_model(source), tmp_path / "copy.bundle", ExportOptions())
    assert copied.component("vae_decoder").parity == {"note": REFERENCE_MISSING}
    report = verify_bundle(copied.path, "onnxruntime")
    assert report.ok
    assert [check.detail for check in report.checks if check.kind == "parity"] == [REFERENCE_MISSING]
    with pytest.raises(UsageError, match="not in fp16"):
        export_source(tiny_model(source), tmp_path / "more.bundle", ExportOptions(("fp16",)))


def word_tokenizer(ids: tuple[int, ...]) -> TokenizerSource:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "heart": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=4, pad_id=0)
    tokenizer.enable_truncation(4)
    return TokenizerSource(tokenizer.to_str(), 4, {"red heart": ids})


def test_tokenizer_ids_are_compared_when_written_and_when_verified(tmp_path: Path) -> None:
    good = tiny_model(component(DECODER, TinyDecoder), tokenizers={"tokenizer": word_tokenizer((1, 2, 0, 0))})
    bundle = export_source(good, tmp_path / "good.bundle", ExportOptions())
    assert verify_bundle(bundle.path, "onnxruntime").ok
    manifest = bundle.path / MANIFEST_NAME
    data = json.loads(manifest.read_text())
    data["tokenizers"]["tokenizer"]["golden"]["red heart"] = [2, 1, 0, 0]
    manifest.write_text(json.dumps(data))
    failed = [check for check in verify_bundle(bundle.path, "onnxruntime").checks if check.status == "FAILED"]
    assert [check.kind for check in failed] == ["tokenizer"]
    bad = tiny_model(component(DECODER, TinyDecoder), tokenizers={"tokenizer": word_tokenizer((1, 1, 0, 0))})
    with pytest.raises(ExportError, match="red heart"):
        export_source(bad, tmp_path / "bad.bundle", ExportOptions())
    assert left_behind(tmp_path) == ["good.bundle"]
