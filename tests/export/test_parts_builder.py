"""``latentedge build`` for onnxruntime and openvino: parts, step caching, compiled models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentedge.export.builders import BuildRequest
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.parts_builder import prepare
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.engines import EngineOptions, open_engine
from tests.export.tiny import tiny_model

PARTS = {"unet.conditioning", "unet.timestep", "unet.step"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("build") / "tiny.bundle"
    export_source(tiny_model(), path, ExportOptions())
    return path


def test_compiled_models_are_kept_and_the_runtime_takes_them(bundle: Path) -> None:
    pytest.importorskip("openvino")
    messages: list[str] = []
    opened = prepare(BuildRequest(Bundle.open(bundle), "openvino", step_caching=True, notify=messages.append))
    assert PARTS | {"unet.full", "unet.shallow"} <= set(opened.manifest.components)
    blobs = {path: path.stat().st_mtime_ns for path in (bundle / "engines").rglob("*.blob")}
    assert len(blobs) >= len(opened.manifest.components)
    component = opened.component("vae_decoder")
    with open_engine(opened, "vae_decoder", "openvino", "fp32", EngineOptions()) as engine:
        engine.bind(**{name: axis.opt for name, axis in component.axes.items()})
        engine.write("latent_sample", np.zeros(component.inputs[0].resolve(engine.axes), np.float32))
        engine.run()
    assert {path: path.stat().st_mtime_ns for path in (bundle / "engines").rglob("*.blob")} == blobs
    assert any(message.startswith("denoiser in parts") for message in messages)


def test_without_step_caching_its_graphs_are_not_kept_in_the_manifest(bundle: Path) -> None:
    opened = prepare(BuildRequest(Bundle.open(bundle), "onnxruntime", notify=lambda message: None))
    assert {name for name in opened.manifest.components if "." in name} == PARTS
