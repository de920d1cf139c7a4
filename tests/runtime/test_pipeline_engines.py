"""Which engines a pipeline opens, on what, and when it frees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from latentedge.runtime.engines import EngineOptions
from latentedge.runtime.errors import BundleError, EngineError
from latentedge.runtime.pipeline import Pipeline
from tests.runtime import matmul

INPUTS = {"x": np.ones((2, 4), np.float32)}


def opened(folder: Path, *, low_memory: bool = False) -> Pipeline:
    bundle = matmul.write_bundle(folder)
    return Pipeline.open(bundle.path, "onnxruntime", "fp32", options=EngineOptions(low_memory=low_memory))


def test_a_component_is_opened_once_and_computes(tmp_path: Path) -> None:
    with opened(tmp_path) as pipe:
        engine = pipe.engine("unet")
        np.testing.assert_allclose(engine.run(INPUTS)["y"], INPUTS["x"] @ matmul.weight(0), atol=1e-6)
        assert pipe.engine("vae_decoder") is not engine
        assert pipe.engine("unet") is engine
    with pytest.raises(EngineError, match="was closed"):
        engine.run(INPUTS)


def test_with_little_memory_one_engine_is_open_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path, low_memory=True) as pipe:
        first = pipe.engine("unet")
        second = pipe.engine("vae_decoder")
        with pytest.raises(EngineError, match="was closed"):
            first.run(INPUTS)
        np.testing.assert_allclose(second.run(INPUTS)["y"], INPUTS["x"] @ matmul.weight(1), atol=1e-6)
        np.testing.assert_allclose(pipe.engine("unet").run(INPUTS)["y"], INPUTS["x"] @ matmul.weight(0), atol=1e-6)


def test_a_changed_graph_does_not_run(tmp_path: Path) -> None:
    with opened(tmp_path) as pipe:
        (tmp_path / "unet" / "model.onnx").write_bytes(matmul.graph(1))
        with pytest.raises(BundleError, match="is damaged: its SHA-256"):
            pipe.engine("unet")
        pipe.engine("vae_decoder")
