"""What observation costs: each sample is drawn both ways, and what is kept does not grow with samples."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from latentedge.benchmarks.int8_observation import measure
from latentedge.calibration.capture import CaptureSettings
from tests.calibration.graphs import write_bundle


def test_samples_are_drawn_both_ways_and_statistics_do_not_grow(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "test.bundle").path
    few, more = (measure(CaptureSettings(str(path), samples=samples, steps=6, threads=1)) for samples in (2, 5))
    assert (len(few.plain_seconds), len(more.observed_seconds), len(more.peaks)) == (2, 5, 5)
    assert few.tensors == more.tensors > 0
    assert few.statistics_bytes == more.statistics_bytes > few.tensors * 100_000
    assert more.slowdown.low <= more.slowdown.ratio <= more.slowdown.high
    assert more.processor_slowdown.ratio > 0
