"""``latentedge build`` for backends that compile when they load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from latentedge.export.builders import BuildRequest, Range, builder_of
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.cli import run
from latentedge.runtime.errors import EngineError, UsageError
from latentedge.runtime.machine import machine_fingerprint
from tests.export.tensorrt.tiny_graphs import graph, write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path, fp32=graph(), fp16=graph(dtype=np.float16))


def test_every_precision_is_timed_and_recorded(bundle: Bundle) -> None:
    rows = builder_of("onnxruntime")(BuildRequest(bundle, "onnxruntime", notify=lambda message: None))
    assert [(row.component, row.precision) for row in rows] == [("unet", "fp32"), ("unet", "fp16")]
    for row in rows:
        records = Bundle.open(bundle.path).component("unet").variants[row.precision].measured
        assert [(record["kind"], record["machine"]) for record in records] == [("latency", machine_fingerprint())]
        assert records[0]["seconds"] == row.seconds > 0


def test_the_command_prints_seconds_and_no_empty_columns(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(bundle.path), "--backend", "onnxruntime"], debug=False) == 0
    header = capsys.readouterr().out.splitlines()[0].split()
    assert header == ["component", "precision", "target", "compiles", "engines", "seconds"]
    assert run(["build", str(bundle.path), "--backend", "onnxruntime", "--json"], debug=False) == 0
    assert [row["precision"] for row in json.loads(capsys.readouterr().out)] == ["fp32", "fp16"]


@pytest.mark.parametrize("settings", [{"check": True}, {"batch": Range(1, 2)}, {"stripped": True}])
def test_settings_that_only_a_compiler_has_are_refused(bundle: Bundle, settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="the backend onnxruntime has no --"):
        builder_of("onnxruntime")(BuildRequest(bundle, "onnxruntime", **settings))


def test_a_single_precision_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="times every precision"):
        builder_of("onnxruntime")(BuildRequest(bundle, "onnxruntime", ("fp16",)))


def test_a_graph_that_does_not_open_is_an_error(bundle: Bundle) -> None:
    (bundle.path / "unet/model.fp16.onnx").write_bytes(b"damaged")
    with pytest.raises(EngineError, match="cannot load"):
        builder_of("onnxruntime")(BuildRequest(bundle, "onnxruntime", notify=lambda message: None))
