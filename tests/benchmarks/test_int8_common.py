"""Graphs of a table are judged by the same pictures and timed in the same rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from latentedge.benchmarks.int8_common import Clock, Judge, Setting, captured, full_plan, write_plan
from tests.calibration.graphs import write_bundle


def test_rows_are_judged_and_timed_together(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "test.bundle")
    setting = Setting.of(bundle.path, 2, 3, 2, None)
    clock = Clock()
    statistics, probes = captured(setting, tmp_path / "capture")
    plan, evidence = full_plan(setting, statistics, probes, setting.options())
    cost = clock.cost()
    assert 0 < cost["processor_seconds"] < 60
    assert cost["peak_mib"] > 10
    folder = bundle.path / "unet"
    whole = write_plan(bundle, plan, evidence, folder / "whole.onnx")
    quietest = max(plan.blocks, key=lambda block: len(block.layers))
    part = write_plan(bundle, plan.with_blocks(frozenset({quietest.name})), evidence, folder / "part.onnx")
    judge = Judge(setting, probes)
    rows = [(judge.row("whole", whole), whole), (judge.row("part", part), part)]
    assert 10 < rows[0][0].sqnr_db < rows[1][0].sqnr_db < 100, "fewer layers in INT8 are closer to fp32"
    timed = judge.timed(rows)
    assert [row.name for row in timed] == ["whole", "part"]
    for row, (before, _) in zip(timed, rows, strict=True):
        assert row.psnr_db == before.psnr_db
        assert row.ratio is not None
        assert row.ratio_low is not None
        assert 0.02 < row.ratio_low <= row.ratio < 50
