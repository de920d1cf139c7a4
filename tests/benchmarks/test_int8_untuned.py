"""INT8 graphs with the ranges of one picture: written, linted, and judged before a pipeline takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from latentedge.benchmarks.int8_untuned import DECODER, DENOISER, PICTURES, judge, write_untuned
from latentedge.calibration.graph import load_graph
from latentedge.calibration.lint import lint
from latentedge.calibration.scene import Target
from latentedge.runtime.bundle import Bundle
from tests.calibration.graphs import write_bundle


def test_both_networks_are_quantised_and_what_they_are_worth_is_recorded(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "test.bundle", decoder_width=32).path
    bundle = Bundle.open(path)
    sizes = bundle.manifest.defaults
    request = {"steps": 3, "height": sizes.height, "width": sizes.width, "guidance_scale": 3.0, "seed": 0}
    write_untuned(bundle, request, "onnxruntime", 1)
    for component in (DENOISER, DECODER):
        graph, _ = Bundle.open(path).variant(component, "int8")
        model = load_graph(graph)
        assert any(node.op_type == "QuantizeLinear" for node in model.graph)
        assert lint(model, quantised_outputs=True) == []
    target = Target("onnxruntime", "int8", "fp32", 1, seconds=0.1)
    judged = judge(Bundle.open(path), target, request, lambda _: None)
    kept = Bundle.open(path)
    for component in (DENOISER, DECODER):
        records = kept.component(component).variants["int8"].measured
        assert records == judged.component(component).variants["int8"].measured
        quality = next(record for record in records if record["kind"] == "quality")
        assert quality["pictures"] == PICTURES
        # Rounding to 8 bits is seen, and the picture is still the picture.
        assert 20 < quality["psnr_worst_db"] <= quality["psnr_db"] < 90
    timed = [record for record in kept.component(DECODER).variants["int8"].measured if record["kind"] == "latency"]
    assert [record["backend"] for record in timed] == ["onnxruntime"]
