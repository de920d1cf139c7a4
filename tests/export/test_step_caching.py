"""Step caching: the cut graphs give what the uncut one gives, and the interval is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentedge.export.errors import ExportError
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.hoisting import hoist_bundle
from latentedge.export.step_caching import cut, cut_bundle, joins
from latentedge.runtime import engines
from latentedge.runtime.bundle import Array, Bundle, file_sha256
from latentedge.runtime.engines import EngineOptions, open_engine
from latentedge.runtime.errors import UsageError
from tests.export.tiny import DECODER, UNET, TinyDecoder, TinyDenoiser, component, tiny_model

AXES = {"batch": 1, "latent_height": 8, "latent_width": 12}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caching") / "tiny.bundle"
    model = tiny_model(component(UNET, TinyDenoiser), component(DECODER, TinyDecoder))
    export_source(model, path, ExportOptions(precisions=("fp32", "fp16")))
    hoist_bundle(path)
    assert cut_bundle(path) == ("unet.full", "unet.shallow")
    return path


def inputs(timestep: float, seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    arrays: dict[str, Array] = {
        spec.name: generator.standard_normal(spec.resolve(AXES)).astype(np.float32) for spec in UNET.inputs
    }
    return {**arrays, "timestep": np.full(1, timestep, np.float32)}


def test_the_cut_graphs_are_declared_and_compared(bundle: Path) -> None:
    components = Bundle.open(bundle).manifest.components
    step, full, shallow = (components[f"unet.{name}"] for name in ("step", "full", "shallow"))
    assert full.inputs == step.inputs
    deep = full.outputs[1]
    assert deep.shape == ("batch", 32, "latent_height", "latent_width")
    assert deep in shallow.inputs
    assert len(shallow.inputs) < len(step.inputs)
    for part in (full, shallow):
        assert part.parity["fp32"]["psnr_db"] >= 100
        assert part.parity["fp16"]["psnr_db"] >= 45
        for variant in part.variants.values():
            assert file_sha256(bundle / variant.path) == variant.sha256


def test_a_list_of_full_steps_is_followed_and_begins_anew_with_each_picture(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    plain = open_engine(opened, "unet", "onnxruntime", "fp32", EngineOptions(threads=1))
    cached = open_engine(opened, "unet", "onnxruntime", "fp32", EngineOptions(threads=1, cache_full=(0, 1, 3)))
    with plain, cached:
        for _ in range(2):
            exact = []
            for index, timestep in enumerate((900.0, 700.0, 500.0, 300.0, 100.0)):
                arrays = inputs(timestep, seed=index) | {"encoder_hidden_states": inputs(0)["encoder_hidden_states"]}
                expected = plain.run(arrays)["out_sample"]
                for name in ("sample", "timestep") if index else arrays:
                    cached.bind(**AXES)
                    cached.write(name, arrays[name])
                cached.run()
                exact.append(bool(np.abs(cached.read("out_sample") - expected).max() < 1e-5 * np.abs(expected).max()))
            assert exact == [True, True, False, True, False]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_full_step_is_exact_and_the_others_reuse_the_deep_blocks(bundle: Path, precision: str) -> None:
    opened = Bundle.open(bundle)
    plain = open_engine(opened, "unet", "onnxruntime", precision, EngineOptions(threads=1))
    cached = open_engine(opened, "unet", "onnxruntime", precision, EngineOptions(threads=1, cache_interval=3))
    tolerance = 1e-5 if precision == "fp32" else 3e-3
    with plain, cached:
        for _ in range(2):  # the second picture begins with a full step again: its timestep is higher
            cached.bind(**AXES)
            for index, timestep in enumerate((900.0, 700.0, 500.0, 300.0, 100.0)):
                arrays = inputs(timestep, seed=index)
                arrays["encoder_hidden_states"] = inputs(0)["encoder_hidden_states"]
                expected = plain.run(arrays)["out_sample"]
                for name in ("sample", "timestep") if index else arrays:
                    cached.write(name, arrays[name])
                cached.run()
                error = np.abs(cached.read("out_sample") - expected).max() / np.abs(expected).max()
                if index % 3 == 0:
                    assert error < tolerance
                else:
                    assert error > 10 * tolerance  # another sample's deep blocks: a real reuse shows


def test_a_backend_that_runs_the_denoiser_whole_opens_the_parts_for_step_caching(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dataclasses.replace(engines.BACKENDS["onnxruntime"], hoisting=False)
    monkeypatch.setitem(engines.BACKENDS, "onnxruntime", whole)
    opened = Bundle.open(bundle)
    for options, kind in ((EngineOptions(), "OnnxRuntimeEngine"), (EngineOptions(cache_interval=2), "HoistedEngine")):
        with open_engine(opened, "unet", "onnxruntime", "fp32", options) as engine:
            assert type(engine).__name__ == kind


def test_a_new_prompt_begins_a_new_picture(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    plain = open_engine(opened, "unet", "onnxruntime", "fp32", EngineOptions(threads=1))
    cached = open_engine(opened, "unet", "onnxruntime", "fp32", EngineOptions(threads=1, cache_interval=9))
    with plain, cached:
        for seed, timestep in ((0, 900.0), (1, 500.0)):
            arrays = inputs(timestep, seed)
            expected, found = plain.run(arrays)["out_sample"], cached.run(arrays)["out_sample"]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


def test_other_components_open_as_ever(bundle: Path) -> None:
    options = EngineOptions(threads=1, cache_interval=3)
    with open_engine(Bundle.open(bundle), "vae_decoder", "onnxruntime", "fp32", options) as engine:
        assert engine.component.name == "vae_decoder"


def test_what_is_not_there_is_an_error(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 joins"):
        cut_bundle(bundle, depth=1)
    export_source(tiny_model(component(UNET, TinyDenoiser)), tmp_path / "whole.bundle", ExportOptions())
    with pytest.raises(UsageError, match="holds its denoiser whole"):
        cut_bundle(tmp_path / "whole.bundle")
    opened = Bundle.open(tmp_path / "whole.bundle")
    with pytest.raises(UsageError, match="no full and shallow"):
        open_engine(opened, "unet", "onnxruntime", "fp32", EngineOptions(cache_interval=2))


def test_a_cut_at_the_first_value_saves_nothing(bundle: Path) -> None:
    graph = ir.load(bundle / "unet" / "step.onnx").graph
    assert len(joins(graph)) == 1
    with pytest.raises(ExportError, match="no value named nonesuch"):
        cut(graph, "nonesuch")
