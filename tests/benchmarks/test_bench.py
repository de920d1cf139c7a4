"""``latentedge bench`` on a tiny bundle, from processes to report, plot, comparison, records and estimate."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from latentedge.benchmarks import records
from latentedge.benchmarks.commands import bench, parse_size
from latentedge.benchmarks.estimate import Device, back_test, device, estimate, graph_seconds
from latentedge.benchmarks.graph_cost import GraphCost, Operation
from latentedge.benchmarks.report import compare_reports, read_report, roofline_point
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.hoisting import hoist_bundle
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.errors import EngineError, UsageError
from latentedge.runtime.selection import choose, latency_record
from tests.export.tiny import tiny_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.bundle"
    schedule = {
        "dialect": "diffusers",
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.001,
        "beta_end": 0.01,
        "prediction_type": "epsilon",
    }
    model = dataclasses.replace(tiny_model(), schedule=schedule)
    export_source(model, path, ExportOptions(precisions=("fp32", "fp16")))
    hoist_bundle(path)
    return path


@pytest.fixture(scope="module")
def report(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("report") / "report.json"
    options = [
        "--backend",
        "onnxruntime",
        "--precision",
        "fp32,fp16",
        "--steps",
        "3",
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    found = CliRunner().invoke(bench, [str(bundle), *options, "-o", str(output), "--record"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return read_report(output)


def test_the_report_holds_what_was_asked_for(report: dict[str, Any], bundle: Path) -> None:
    assert [(row["backend"], row["precision"]) for row in report["rows"]] == [
        ("onnxruntime", "fp32"),
        ("onnxruntime", "fp16"),
    ]
    assert report["bundle"]["graphs"]["unet fp32"] == Bundle.open(bundle).component("unet").variants["fp32"].sha256
    for row in report["rows"]:
        assert len(row["samples"]["picture"]) == 2
        assert len(row["samples"]["step"]) == 6
        assert set(row["components"]) == {"unet", "vae_decoder"}
        assert 0 < sum(row["samples"]["step"][:3]) < row["samples"]["picture"][0]
        assert 0 < row["outside_engines"] < 1
        assert row["load"]["first_picture_seconds"] > row["picture"]["least"]
        assert row["memory"]["peak_rss"] > 20 << 20
    assert report["rows"][0]["ratio"]["ratio"] == 1


def test_the_roofline_follows_from_the_numbers(report: dict[str, Any]) -> None:
    row = report["rows"][0]
    point = roofline_point(report, row, "vae_decoder")
    assert point is not None
    cost = report["cost"]["vae_decoder"]
    assert point["flops_per_second"] == pytest.approx(cost["flops"] / row["components"]["vae_decoder"]["p50"])
    assert point["intensity"] == pytest.approx(cost["flops"] / (cost["weight_bytes"] + cost["io_bytes"]))
    assert point["share"] == pytest.approx(point["flops_per_second"] / report["peaks"]["onnxruntime fp32"])


def test_comparing_says_faster_slower_or_noise(report: dict[str, Any]) -> None:
    assert {row["verdict"] for row in compare_reports(report, report)} == {"within noise"}
    old = copy.deepcopy(report)
    old["rows"][0]["samples"]["picture"] = [9 * value for value in old["rows"][0]["samples"]["picture"]]
    verdicts = {(row["setting"], row["what"]): row["verdict"] for row in compare_reports(old, report)}
    assert verdicts["onnxruntime fp32", "picture"] == "faster"
    assert verdicts["onnxruntime fp16", "picture"] == "within noise"
    with pytest.raises(UsageError, match="fingerprint"):
        compare_reports({**report, "fingerprint": "another"}, report)


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for text in ("not json", "{}", '{"format": "latentedge-bench", "version": 99}'):
        path.write_text(text)
        with pytest.raises(UsageError):
            read_report(path)


def test_records_decide_what_auto_takes(report: dict[str, Any], bundle: Path) -> None:
    component = Bundle.open(bundle).component("unet")
    found = latency_record(component, "onnxruntime", "fp16", report["fingerprint"])
    assert found is not None
    assert found["ratio"] == report["rows"][1]["ratio"]["ratio"]
    quality = [record for record in component.variants["fp16"].measured if record["kind"] == "quality"]
    assert len(quality) == 1
    assert 30 < quality[0]["psnr_worst_db"] <= quality[0]["psnr_db"] < 100
    faster = found["ratio_low"] > 1
    assert (choose(Bundle.open(bundle), "onnxruntime").precision == "fp16") == faster


def test_a_newer_record_replaces_the_older(report: dict[str, Any], bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    again = records.with_record(manifest, "fp16", records.latency_record(report, report["rows"][1]))
    assert len(again.components["unet"].variants["fp16"].measured) == len(
        manifest.components["unet"].variants["fp16"].measured
    )


def test_psnr_of_known_pictures() -> None:
    black = np.zeros((1, 4, 4, 3), np.float32)
    assert records.psnr_db(black, black) == 100
    assert records.psnr_db(black, black + np.float32(0.1)) == pytest.approx(20, abs=1e-4)


def test_a_setting_that_cannot_run_is_an_error_when_it_is_alone(bundle: Path) -> None:
    with pytest.raises(UsageError):
        CliRunner().invoke(bench, [str(bundle), "--precision", "fp99"], catch_exceptions=False, standalone_mode=False)


def test_estimates_are_called_estimates(bundle: Path) -> None:
    found = CliRunner().invoke(bench, [str(bundle), "--estimate", "orin-nano"], catch_exceptions=False)
    assert found.exit_code == 0
    lines = [line for line in found.output.splitlines() if "Orin Nano" in line]
    assert lines
    assert all(line.startswith("estimate, not measured") for line in lines)
    with pytest.raises(UsageError, match="agx-orin"):
        device("toaster")


def test_an_estimate_scales_with_steps(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    four, eight = (estimate(opened, "agx-orin", "fp16", steps, None) for steps in (4, 8))
    assert eight["picture_seconds"] - four["picture_seconds"] == pytest.approx(4 * four["components"]["unet"])


def test_a_graph_takes_the_slower_of_computing_and_moving() -> None:
    machine = Device("test", {"fp32": 100.0}, 10.0, 1e9, "made up")
    computing = Operation("MatMul", 1000, 4, 4)
    moving = Operation("MatMul", 10, 400, 100)
    fused = Operation("Add", 1000, 0, 1000)
    cost = GraphCost((computing, moving, fused), 0, 0, 0)
    assert graph_seconds(cost, "fp32", machine, 0.5) == pytest.approx((1000 / 100 + 500 / 10) / 0.5)


def test_the_back_test_compares_with_what_was_measured(report: dict[str, Any], bundle: Path) -> None:
    rows = back_test(report, Bundle.open(bundle))
    assert {row["component"] for row in rows} == {"unet", "vae_decoder"}
    for row in rows:
        assert row["efficiency"] == pytest.approx(row["limit_seconds"] / row["measured_seconds"])


def test_sizes() -> None:
    assert parse_size("640x480") == (480, 640)
    with pytest.raises(UsageError):
        parse_size("640")


def test_a_worker_that_dies_is_an_error() -> None:
    from latentedge.benchmarks.processes import MeasuredProcess

    with (
        MeasuredProcess("nobody", ("python3", "-c", "import sys; sys.stdin.readline(); sys.exit(3)")) as process,
        pytest.raises(EngineError, match="exit code was 3"),
    ):
        process.ask("load")


def test_reports_are_strict_json(report: dict[str, Any]) -> None:
    json.dumps(report, allow_nan=False)
