from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from latentedge.runtime.bundle import Bundle
from tests.calibration.graphs import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "test.bundle")
